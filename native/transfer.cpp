// SPDX-License-Identifier: Apache-2.0
#include "transfer.hpp"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "cpu_clock.hpp"
#include "error.hpp"

namespace flashd {

Transfer::Transfer(uint64_t total, Body body)
    : total_(total), thread_([this, body = std::move(body)]() mutable { run(std::move(body)); }) {}

Transfer::~Transfer() {
    cancel();
    thread_.join();
}

void Transfer::run(Body body) {
    const auto started = std::chrono::steady_clock::now();
    std::exception_ptr error;
    try {
        body(*this);
        stop_if_cancelled();
    } catch (...) {
        error = std::current_exception();
    }
    body = nullptr;  // closes its files, which may take as long as reading them: only then is it finished
    result.size = total_;
    result.cpu_seconds += thread_cpu_seconds();
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    const std::lock_guard lock(mutex_);
    error_ = error;
    finished_ = true;
    ended_.notify_all();
}

void Transfer::cancel() { cancelled_ = true; }

bool Transfer::finished() const {
    const std::lock_guard lock(mutex_);
    return finished_;
}

bool Transfer::wait(double seconds) {
    std::unique_lock lock(mutex_);
    const auto ended = [this] { return finished_; };
    if (seconds < 0) {
        ended_.wait(lock, ended);
        return true;
    }
    return ended_.wait_for(lock, std::chrono::duration<double>(seconds), ended);
}

const Result& Transfer::outcome() const {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
    return result;
}

void Transfer::stop_if_cancelled() const {
    if (cancelled_) throw Error(Failure::cancelled, "transfer", 0, "");
}

void Transfer::fell_back(const std::string& reason) {
    if (reason.empty() || result.fallback.find(reason) != std::string::npos) return;
    result.fallback += (result.fallback.empty() ? "" : "; ") + reason;
}

void parallel_for(Transfer& transfer, size_t count, unsigned threads, double& cpu_seconds,
                  const std::function<void(const Next&)>& work) {
    std::atomic<size_t> taken{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr first_error;
    const Next next = [&]() -> std::optional<size_t> {
        if (failed || transfer.cancelled()) return std::nullopt;
        const size_t index = taken++;
        return index < count ? std::optional(index) : std::nullopt;
    };
    const auto run = [&] {
        try {
            work(next);
        } catch (...) {
            const std::lock_guard lock(mutex);
            if (!failed.exchange(true)) first_error = std::current_exception();
        }
        const std::lock_guard lock(mutex);
        cpu_seconds += thread_cpu_seconds();
    };
    std::vector<std::jthread> pool;
    for (size_t i = 0; i < std::min<size_t>(threads, count); ++i) pool.emplace_back(run);
    pool.clear();
    if (first_error) std::rethrow_exception(first_error);
    transfer.stop_if_cancelled();
}

}  // namespace flashd
