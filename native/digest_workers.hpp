// SPDX-License-Identifier: Apache-2.0
// Threads that compare blocks with their digests while later blocks are still being read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "digest.hpp"
#include "file.hpp"
#include "plan.hpp"
#include "work_queue.hpp"

namespace flashd {

// Blocks of the digest grid and requests need not be the same size: a block is compared once all of it has arrived.
class DigestWorkers {
  public:
    // `reads` cover `memory` without holes, from its start to the end of the digests.
    DigestWorkers(std::span<const std::byte> memory, const DigestTable& digests, std::span<const Read> reads,
                  std::span<const File> files, unsigned threads);
    ~DigestWorkers();

    // Called by one thread at a time. Throws the first mismatch found so far.
    void arrived(uint64_t memory_offset, uint64_t length);
    // Waits until everything that arrived is compared; throws the first mismatch. Returns the CPU seconds used.
    double finish();

  private:
    struct Block {
        uint32_t file = 0;
        uint64_t file_offset = 0;
        uint64_t length = 0;
        uint64_t missing = 0;
    };

    void compare(size_t index) const;

    std::span<const std::byte> memory_;
    const DigestTable& digests_;
    std::span<const File> files_;
    std::vector<Block> blocks_;
    WorkQueue<size_t> queue_;  // ends before the blocks that it compares
};

}  // namespace flashd
