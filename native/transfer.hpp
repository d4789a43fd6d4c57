// SPDX-License-Identifier: Apache-2.0
// A running transfer: its thread, progress, cancel and result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace flashd {

enum class Backend { automatic, io_uring, threads };

struct Options {
    uint64_t block = 8 << 20;
    unsigned depth = 12;
    Backend backend = Backend::automatic;
    bool direct = true;
    unsigned populate_threads = 0;  // 0: as many as there are processors, four at most
    unsigned digest_threads = 2;
    unsigned copy_threads = 0;  // 0: as many as there are processors, sixteen at most
    uint64_t piece = 2 << 20;   // what such a thread sends to a device at once
    unsigned pieces = 4;        // and how many of them are on their way while it fills the next
    // Reads from the page cache if it has the data; otherwise O_DIRECT bypasses it.
    bool page_cache = true;
};

struct Result {
    uint64_t size = 0;
    double seconds = 0;
    double cpu_seconds = 0;
    double populate_cpu_seconds = 0;
    double digest_cpu_seconds = 0;
    Backend backend = Backend::threads;
    bool direct = false;
    bool fixed_files = false;
    bool fixed_buffers = false;
    uint64_t block = 0;
    unsigned depth = 0;
    uint64_t staging = 0;  // the most staging memory that was in use at once
    std::string fallback;  // why not the fastest path; empty if it was
    std::string digests;
};

class Transfer {
  public:
    // The body runs in its own thread; it fills `result` and throws Error.
    using Body = std::function<void(Transfer&)>;

    Transfer(uint64_t total, Body body);
    ~Transfer();  // cancels and joins
    Transfer(const Transfer&) = delete;
    Transfer& operator=(const Transfer&) = delete;

    uint64_t total() const { return total_; }
    uint64_t done() const { return done_; }
    void cancel();
    bool finished() const;
    // Returns false if it still runs after `seconds`; a negative limit waits forever.
    bool wait(double seconds);
    // Returns the result, or throws the error, after it has finished.
    const Result& outcome() const;

    // For bodies.
    Result result;
    void advance(uint64_t bytes) { done_ += bytes; }
    const std::atomic<bool>& cancelled() const { return cancelled_; }
    void stop_if_cancelled() const;
    void fell_back(const std::string& reason);

  private:
    void run(Body body);

    const uint64_t total_;
    std::atomic<uint64_t> done_{0};
    std::atomic<bool> cancelled_{false};
    mutable std::mutex mutex_;
    std::condition_variable ended_;
    bool finished_ = false;
    std::exception_ptr error_;
    std::thread thread_;
};

// Returns the next index, or nothing if none is left, another thread has failed, or the transfer is cancelled.
using Next = std::function<std::optional<size_t>()>;

// Runs `work` on `threads` threads, each of which takes the next index below `count` until none is left. The first
// error ends them all and is thrown. `cpu_seconds` grows by what the threads used.
void parallel_for(Transfer& transfer, size_t count, unsigned threads, double& cpu_seconds,
                  const std::function<void(const Next&)>& work);

}  // namespace flashd
