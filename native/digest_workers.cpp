// SPDX-License-Identifier: Apache-2.0
#include "digest_workers.hpp"

#include <algorithm>

namespace flashd {

DigestWorkers::DigestWorkers(std::span<const std::byte> memory, const DigestTable& digests, std::span<const Read> reads,
                             std::span<const File> files, unsigned threads)
    : memory_(memory), digests_(digests), files_(files), blocks_(digests.size()), queue_(threads, [this](size_t index) {
          compare(index);
      }) {
    for (const Read& part : split(reads, digests.block())) {
        Block& block = blocks_.at(part.memory_offset / digests.block());
        if (part.memory_offset % digests.block() == 0) {
            block.file = part.file;
            block.file_offset = part.file_offset;
        }
        block.length += part.length;
    }
    for (Block& block : blocks_) block.missing = block.length;
}

// After a transfer that failed or was cancelled, the remaining comparisons are of no use.
DigestWorkers::~DigestWorkers() { queue_.drop(); }

void DigestWorkers::arrived(uint64_t memory_offset, uint64_t length) {
    const uint64_t grid = digests_.block();
    queue_.check();
    for (const uint64_t end = memory_offset + length; memory_offset < end;) {
        const size_t index = memory_offset / grid;
        const uint64_t part = std::min(end, (index + 1) * grid) - memory_offset;
        memory_offset += part;
        blocks_[index].missing -= part;
        if (blocks_[index].missing == 0) queue_.add(index);
    }
}

double DigestWorkers::finish() { return queue_.finish(); }

void DigestWorkers::compare(size_t index) const {
    const Block& block = blocks_[index];
    digests_.check(index, memory_.subspan(index * digests_.block(), block.length), files_[block.file].path(),
                   block.file_offset);
}

}  // namespace flashd
