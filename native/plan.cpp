// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>

#include "file.hpp"

namespace flashd {

std::vector<Read> split(std::span<const Read> reads, uint64_t block) {
    std::vector<Read> result;
    for (Read rest : reads) {
        while (rest.length > 0) {
            uint64_t length = std::min(rest.length, block - rest.memory_offset % block);
            if (rest.file_offset % alignment == 0 && length > alignment) length = align_down(length);
            result.push_back({rest.file, rest.file_offset, rest.memory_offset, length});
            rest.file_offset += length;
            rest.memory_offset += length;
            rest.length -= length;
        }
    }
    return result;
}

std::vector<Piece> within(std::span<const Piece> pieces, uint64_t start, uint64_t length) {
    const auto ends_after = [](const Piece& piece, uint64_t offset) {
        return piece.target_offset + piece.length <= offset;
    };
    std::vector<Piece> result;
    for (auto piece = std::lower_bound(pieces.begin(), pieces.end(), start, ends_after);
         piece != pieces.end() && piece->target_offset < start + length; ++piece) {
        const uint64_t from = std::max(piece->target_offset, start);
        const uint64_t to = std::min(piece->target_offset + piece->length, start + length);
        if (from < to)
            result.push_back({piece->file, piece->source_offset + (from - piece->target_offset), from, to - from});
    }
    return result;
}

}  // namespace flashd
