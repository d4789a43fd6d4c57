// SPDX-License-Identifier: Apache-2.0
// A queue of work for threads of its own.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_clock.hpp"

namespace flashd {

// The threads begin items in the order in which they were added. The first error is kept, and thrown by the next call.
// Its length is not limited: items are added only as fast as blocks are read.
template <typename Item>
class WorkQueue {
  public:
    WorkQueue(unsigned threads, std::function<void(const Item&)> work) : work_(std::move(work)) {
        for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
    }
    // Waits until all items are done.
    ~WorkQueue() { end(); }
    WorkQueue(const WorkQueue&) = delete;
    WorkQueue& operator=(const WorkQueue&) = delete;

    void add(const Item& item) {
        {
            const std::lock_guard lock(mutex_);
            items_.push_back(item);
        }
        changed_.notify_one();
    }

    void check() {
        const std::lock_guard lock(mutex_);
        if (error_) std::rethrow_exception(error_);
    }

    // Forgets the items that no thread has begun.
    void drop() {
        const std::lock_guard lock(mutex_);
        items_.clear();
    }

    // Waits until all items are done; nothing can be added afterwards. Returns the CPU seconds used.
    double finish() {
        end();
        check();
        return cpu_seconds_;
    }

  private:
    void end() {
        {
            const std::lock_guard lock(mutex_);
            ended_ = true;
        }
        changed_.notify_all();
        threads_.clear();
    }

    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return ended_ || !items_.empty(); });
            if (items_.empty()) break;
            const Item item = items_.front();
            items_.pop_front();
            lock.unlock();
            std::exception_ptr error;
            try {
                work_(item);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error && !error_) error_ = error;
        }
        cpu_seconds_ += thread_cpu_seconds();
    }

    std::function<void(const Item&)> work_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Item> items_;
    std::exception_ptr error_;
    bool ended_ = false;
    double cpu_seconds_ = 0;
    std::vector<std::jthread> threads_;
};

}  // namespace flashd
