// SPDX-License-Identifier: Apache-2.0
// Plans the requests of a transfer: pure arithmetic, no I/O.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flashd {

// A byte range of a file that belongs at an offset of the memory.
struct Read {
    uint32_t file;
    uint64_t file_offset;
    uint64_t memory_offset;
    uint64_t length;
};

// A byte range of a source file that belongs at an offset of the target file.
struct Piece {
    uint32_t file;
    uint64_t source_offset;
    uint64_t target_offset;
    uint64_t length;
};

// Splits reads at multiples of `block` in memory, and cuts off tails that O_DIRECT could not take.
std::vector<Read> split(std::span<const Read> reads, uint64_t block);

// Returns the parts of `pieces` (sorted by target offset) that lie in [start, start + length) of the target.
std::vector<Piece> within(std::span<const Piece> pieces, uint64_t start, uint64_t length);

}  // namespace flashd
