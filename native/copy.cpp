// SPDX-License-Identifier: Apache-2.0
#include "copy.hpp"

#include <algorithm>
#include <cstring>

#include "digest.hpp"
#include "error.hpp"
#include "io.hpp"
#include "memory.hpp"

namespace flashd {

namespace {

// For smaller pieces an O_DIRECT window costs more than the page cache.
constexpr uint64_t worth_a_window = 128 << 10;

// A model that was just downloaded or dropped is in the page cache, and reading it from the disk again would halve the
// speed. (RWF_NOWAIT cannot test for this, because it starts a read-ahead of missing pages.)
void read_piece(File& file, const Piece& piece, std::byte* to, Buffer& window) {
    const uint64_t start = align_down(piece.source_offset);
    const uint64_t lead = piece.source_offset - start;
    if (piece.length < worth_a_window || !file.has_direct() || file.is_cached(piece.source_offset, piece.length)) {
        execute_one(Direction::read, file, {0, piece.source_offset, to, piece.length, piece.length});
        return;
    }
    const uint64_t length = lead + piece.length;
    execute_one(Direction::read, file, {0, start, window.data(), length, align_up(length)});
    std::memcpy(to, window.data() + lead, piece.length);
}

}  // namespace

std::unique_ptr<Transfer> copy(std::vector<File> sources, std::vector<Piece> pieces, File target, uint64_t region,
                               uint64_t block, const Options& options, uint64_t file_size) {
    const uint64_t total = pieces.empty() ? 0 : pieces.back().target_offset + pieces.back().length;
    const uint64_t size = std::max(file_size, region + total);
    auto from = std::make_shared<std::vector<File>>(std::move(sources));
    auto to = std::make_shared<File>(std::move(target));
    return std::make_unique<Transfer>(total, [=, pieces = std::move(pieces)](Transfer& transfer) {
        to->preallocate(align_up(size));
        const size_t blocks = (total + block - 1) / block;
        std::string digests(blocks * digest_bytes, '\0');
        parallel_for(transfer, blocks, options.depth, transfer.result.cpu_seconds, [&](const Next& next) {
            const Buffer assembled(align_up(block));
            Buffer window(align_up(block) + 2 * alignment);
            while (const auto index = next()) {
                const uint64_t start = *index * block;
                const uint64_t length = std::min(block, total - start);
                for (const Piece& piece : within(pieces, start, length)) {
                    transfer.stop_if_cancelled();
                    read_piece((*from)[piece.file], piece, assembled.data() + (piece.target_offset - start), window);
                }
                const Digest found = digest({assembled.data(), length});
                std::memcpy(digests.data() + *index * digest_bytes, found.data(), digest_bytes);
                // The tail is padded to a block for O_DIRECT; the truncate below removes the padding.
                std::memset(assembled.data() + length, 0, align_up(length) - length);
                const uint64_t padded = align_up(length);
                execute_one(Direction::write, *to, {0, region + start, assembled.data(), padded, padded});
                transfer.advance(length);
            }
        });
        to->truncate(size);
        to->sync();
        transfer.result.digests = std::move(digests);
        transfer.result.direct = to->has_direct();
        transfer.result.block = block;
        transfer.result.depth = options.depth;
        transfer.fell_back(to->direct_refused());
    });
}

}  // namespace flashd
