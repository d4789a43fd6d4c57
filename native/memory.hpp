// SPDX-License-Identifier: Apache-2.0
// Memory that transfers use: buffers of huge pages, and pages made present ahead of the reads that fill them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace flashd {

// Makes memory present before it is written to. Returns 0 or an errno.
int populate(std::span<std::byte> memory);

// Anonymous memory aligned for huge pages and advised to have them.
class Buffer {
  public:
    explicit Buffer(uint64_t size);
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&&) = delete;
    ~Buffer();

    std::byte* data() const { return data_; }
    uint64_t size() const { return size_; }

  private:
    void* mapping_;
    uint64_t mapped_;
    std::byte* data_;
    uint64_t size_;
};

// Populates a region front to back with helper threads, and lets readers wait until they have come far enough.
class Populator {
  public:
    Populator(std::span<std::byte> region, unsigned threads, const std::atomic<bool>& cancel);
    ~Populator();

    // Blocks until the region up to `end` is present, or populating has ended. Throws Error (memory) if it failed.
    void wait_until(uint64_t end);
    // Waits for the helper threads. Returns the CPU seconds they used.
    double finish();

  private:
    void run();

    std::span<std::byte> region_;
    const std::atomic<bool>& cancel_;
    std::atomic<uint64_t> next_{0};
    std::mutex mutex_;
    std::condition_variable progressed_;
    std::vector<bool> done_;
    uint64_t done_prefix_ = 0;
    unsigned running_ = 0;
    int error_ = 0;
    double cpu_seconds_ = 0;
    std::vector<std::jthread> threads_;
};

}  // namespace flashd
