// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "cpu_clock.hpp"
#include "error.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace flashd {

namespace {
constexpr uint64_t huge_page = 2 << 20;
// Large enough to make the system call's cost negligible, small enough for the first read to start at once.
constexpr uint64_t populate_step = 16 << 20;
}  // namespace

int populate(std::span<std::byte> memory) {
    while (::madvise(memory.data(), memory.size(), MADV_POPULATE_WRITE) != 0) {
        // Kernels before 5.14 cannot: then the reads fault pages in, which is slower but correct.
        if (errno == EINVAL) return 0;
        if (errno != EAGAIN && errno != EINTR) return errno;
    }
    return 0;
}

Buffer::Buffer(uint64_t size) : size_(size) {
    mapped_ = size + huge_page;
    mapping_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw Error(Failure::memory, "mmap", errno, "");
    const auto address = (reinterpret_cast<uintptr_t>(mapping_) + huge_page - 1) & ~(huge_page - 1);
    data_ = reinterpret_cast<std::byte*>(address);
    ::madvise(data_, size_, MADV_HUGEPAGE);
}

Buffer::Buffer(Buffer&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapped_(other.mapped_),
      data_(other.data_),
      size_(other.size_) {}

Buffer::~Buffer() {
    if (mapping_ != nullptr) ::munmap(mapping_, mapped_);
}

Populator::Populator(std::span<std::byte> region, unsigned threads, const std::atomic<bool>& cancel)
    : region_(region), cancel_(cancel), done_((region.size() + populate_step - 1) / populate_step), running_(threads) {
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
}

Populator::~Populator() {
    next_ = done_.size();  // nobody waits any more
    threads_.clear();
}

double Populator::finish() {
    threads_.clear();
    return cpu_seconds_;
}

void Populator::run() {
    for (uint64_t index; (index = next_++) < done_.size() && !cancel_;) {
        const uint64_t start = index * populate_step;
        const uint64_t length = std::min(populate_step, region_.size() - start);
        const int error = populate(region_.subspan(start, length));
        const std::lock_guard lock(mutex_);
        if (error != 0) error_ = error;
        done_[index] = true;
        while (done_prefix_ < done_.size() && done_[done_prefix_]) ++done_prefix_;
        progressed_.notify_all();
        if (error != 0) break;
    }
    const std::lock_guard lock(mutex_);
    cpu_seconds_ += thread_cpu_seconds();
    --running_;
    progressed_.notify_all();
}

void Populator::wait_until(uint64_t end) {
    const uint64_t wanted = (std::min<uint64_t>(end, region_.size()) + populate_step - 1) / populate_step;
    std::unique_lock lock(mutex_);
    progressed_.wait(lock, [&] { return done_prefix_ >= wanted || running_ == 0 || error_ != 0; });
    if (error_ != 0) throw Error(Failure::memory, "populate", error_, "", end);
}

}  // namespace flashd
