// SPDX-License-Identifier: Apache-2.0
// Threads that compare blocks with their digests while later blocks are still being read.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "digest.hpp"
#include "file.hpp"
#include "plan.hpp"

namespace flashd {

// Blocks of the digest grid and requests need not be the same size: a block is compared once all of it has arrived.
class DigestWorkers {
  public:
    // `reads` cover `memory` from its start, without holes, as far as the digests go.
    DigestWorkers(std::span<const std::byte> memory, const DigestTable& digests, std::span<const Read> reads,
                  std::span<const File> files, unsigned threads);
    ~DigestWorkers();

    // Called by one thread at a time. Throws the first mismatch that was found so far.
    void arrived(uint64_t memory_offset, uint64_t length);
    // Waits until all that arrived is compared; throws the first mismatch. Returns the CPU seconds used.
    double finish();

  private:
    struct Block {
        uint32_t file = 0;
        uint64_t file_offset = 0;
        uint64_t length = 0;
        uint64_t missing = 0;
    };

    void run();
    void compare(size_t index) const;
    void end();

    std::span<const std::byte> memory_;
    const DigestTable& digests_;
    std::span<const File> files_;
    std::vector<Block> blocks_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<size_t> queue_;
    std::exception_ptr error_;
    bool ended_ = false;
    double cpu_seconds_ = 0;
    std::vector<std::jthread> threads_;
};

}  // namespace flashd
