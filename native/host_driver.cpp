// SPDX-License-Identifier: Apache-2.0
// Host memory that behaves like a GPU's: each stream is a thread that performs its copies later, in order.
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "driver.hpp"

namespace flashd {

namespace {

class HostStream {
  public:
    ~HostStream() {
        {
            const std::lock_guard lock(mutex_);
            ended_ = true;
        }
        changed_.notify_all();
    }

    void push(std::function<void()> work) {
        {
            const std::lock_guard lock(mutex_);
            queue_.push_back(std::move(work));
        }
        changed_.notify_all();
    }

    void synchronize() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return queue_.empty(); });
    }

  private:
    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
            if (queue_.empty()) return;
            const std::function<void()>& work = queue_.front();  // stays at the front until it is done
            lock.unlock();
            work();
            lock.lock();
            queue_.pop_front();
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> queue_;
    bool ended_ = false;
    std::jthread thread_{[this] { run(); }};
};

// Like CUDA's events, complete until it is recorded.
struct HostEvent {
    std::mutex mutex;
    std::condition_variable changed;
    unsigned pending = 0;
};

HostStream* stream_of(Driver::Stream stream) { return static_cast<HostStream*>(stream); }
HostEvent* event_of(Driver::Event event) { return static_cast<HostEvent*>(event); }

}  // namespace

const Driver& host_driver() {
    static const Driver table{
        .name = "host",
        .set_context = [](Driver::Context) { return 0; },
        .create_stream =
            [](Driver::Stream* stream, unsigned) {
                *stream = new HostStream;
                return 0;
            },
        .destroy_stream =
            [](Driver::Stream stream) {
                delete stream_of(stream);
                return 0;
            },
        .synchronize_stream =
            [](Driver::Stream stream) {
                stream_of(stream)->synchronize();
                return 0;
            },
        .create_event =
            [](Driver::Event* event, unsigned) {
                *event = new HostEvent;
                return 0;
            },
        .destroy_event =
            [](Driver::Event event) {
                delete event_of(event);
                return 0;
            },
        .record_event =
            [](Driver::Event opaque, Driver::Stream stream) {
                HostEvent* event = event_of(opaque);
                {
                    const std::lock_guard lock(event->mutex);
                    ++event->pending;
                }
                stream_of(stream)->push([event] {
                    const std::lock_guard lock(event->mutex);
                    --event->pending;
                    event->changed.notify_all();
                });
                return 0;
            },
        .synchronize_event =
            [](Driver::Event opaque) {
                HostEvent* event = event_of(opaque);
                std::unique_lock lock(event->mutex);
                event->changed.wait(lock, [event] { return event->pending == 0; });
                return 0;
            },
        .copy_async =
            [](Driver::Address to, Driver::Address from, size_t length, Driver::Stream stream) {
                stream_of(stream)->push(
                    [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), length); });
                return 0;
            },
        .register_memory = [](void*, size_t, unsigned) { return 0; },
        .unregister_memory = [](void*) { return 0; },
        .name_of_status =
            [](Driver::Status, const char** name) {
                *name = "HOST_ERROR";
                return 0;
            },
    };
    return table;
}

}  // namespace flashd
