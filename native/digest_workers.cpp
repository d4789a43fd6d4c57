// SPDX-License-Identifier: Apache-2.0
#include "digest_workers.hpp"

#include <algorithm>

#include "cpu_clock.hpp"

namespace flashd {

DigestWorkers::DigestWorkers(std::span<const std::byte> memory, const DigestTable& digests, std::span<const Read> reads,
                             std::span<const File> files, unsigned threads)
    : memory_(memory), digests_(digests), files_(files), blocks_(digests.size()) {
    for (const Read& part : split(reads, digests.block())) {
        Block& block = blocks_.at(part.memory_offset / digests.block());
        if (part.memory_offset % digests.block() == 0) {
            block.file = part.file;
            block.file_offset = part.file_offset;
        }
        block.length += part.length;
    }
    for (Block& block : blocks_) block.missing = block.length;
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
}

DigestWorkers::~DigestWorkers() {
    {
        const std::lock_guard lock(mutex_);
        queue_.clear();  // the transfer has failed or was cancelled: nobody wants to know any more
    }
    end();
}

void DigestWorkers::arrived(uint64_t memory_offset, uint64_t length) {
    const uint64_t grid = digests_.block();
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
    for (const uint64_t end = memory_offset + length; memory_offset < end;) {
        const size_t index = memory_offset / grid;
        const uint64_t part = std::min(end, (index + 1) * grid) - memory_offset;
        memory_offset += part;
        blocks_[index].missing -= part;
        if (blocks_[index].missing > 0) continue;
        queue_.push_back(index);
        changed_.notify_one();
    }
}

double DigestWorkers::finish() {
    end();
    if (error_) std::rethrow_exception(error_);
    return cpu_seconds_;
}

void DigestWorkers::end() {
    {
        const std::lock_guard lock(mutex_);
        ended_ = true;
    }
    changed_.notify_all();
    threads_.clear();
}

void DigestWorkers::run() {
    std::unique_lock lock(mutex_);
    for (;;) {
        changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
        if (queue_.empty()) break;
        const size_t index = queue_.front();
        queue_.pop_front();
        lock.unlock();
        std::exception_ptr error;
        try {
            compare(index);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        if (error && !error_) error_ = error;
    }
    cpu_seconds_ += thread_cpu_seconds();
}

void DigestWorkers::compare(size_t index) const {
    const Block& block = blocks_[index];
    digests_.check(index, memory_.subspan(index * digests_.block(), block.length), files_[block.file].path(),
                   block.file_offset);
}

}  // namespace flashd
