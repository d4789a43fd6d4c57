// SPDX-License-Identifier: Apache-2.0
#include "copy.hpp"

#include <sys/uio.h>

#include <algorithm>
#include <cstring>

#include "digest.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "io.hpp"
#include "memory.hpp"

namespace flashd {

namespace {

// Below this, an O_DIRECT window costs more than the page cache does.
constexpr uint64_t worth_a_window = 128 << 10;

// What of a piece is in the page cache already: a model that was just downloaded or dropped usually is, and reading it
// again from the disk would halve the speed. RWF_NOWAIT never waits for the disk (preadv2(2)).
uint64_t read_cached(const File& file, const Piece& piece, std::byte* to) {
    uint64_t done = 0;
    while (done < piece.length) {
        const iovec part{to + done, piece.length - done};
        const ssize_t got =
            ::preadv2(file.buffered(), &part, 1, static_cast<off_t>(piece.source_offset + done), RWF_NOWAIT);
        if (got <= 0) break;
        done += static_cast<uint64_t>(got);
    }
    return done;
}

void read_piece(File& file, const Piece& piece, std::byte* to, Buffer& window) {
    const uint64_t cached = read_cached(file, piece, to);
    const uint64_t offset = piece.source_offset + cached;
    const uint64_t length = piece.length - cached;
    if (length == 0) return;
    if (length < worth_a_window || !file.has_direct()) {
        execute_one(Direction::read, file, {0, offset, to + cached, length, length});
        return;
    }
    const uint64_t start = align_down(offset);
    const uint64_t lead = offset - start;
    execute_one(Direction::read, file, {0, start, window.data(), lead + length, align_up(lead + length)});
    host_driver().copy(to + cached, window.data() + lead, length);
}

}  // namespace

std::unique_ptr<Transfer> copy(std::vector<File> sources, std::vector<Piece> pieces, File target, uint64_t region,
                               uint64_t block, const Options& options) {
    const uint64_t total = pieces.empty() ? 0 : pieces.back().target_offset + pieces.back().length;
    auto from = std::make_shared<std::vector<File>>(std::move(sources));
    auto to = std::make_shared<File>(std::move(target));
    return std::make_unique<Transfer>(total, [=, pieces = std::move(pieces)](Transfer& transfer) {
        to->preallocate(align_up(region + total));
        const size_t blocks = (total + block - 1) / block;
        std::string digests(blocks * digest_bytes, '\0');
        parallel_for(transfer, blocks, options.depth, transfer.result.cpu_seconds, [&] {
            auto assembled = std::make_shared<Buffer>(align_up(block));
            auto window = std::make_shared<Buffer>(align_up(block) + 2 * alignment);
            return [&, assembled, window](size_t index) {
                const uint64_t start = index * block;
                const uint64_t length = std::min(block, total - start);
                for (const Piece& piece : within(pieces, start, length)) {
                    transfer.stop_if_cancelled();
                    read_piece((*from)[piece.file], piece, assembled->data() + (piece.target_offset - start), *window);
                }
                const Digest found = digest({assembled->data(), length});
                std::memcpy(digests.data() + index * digest_bytes, found.data(), digest_bytes);
                // The tail is padded to a block for O_DIRECT; the truncate below takes the padding away again.
                std::memset(assembled->data() + length, 0, align_up(length) - length);
                const uint64_t padded = align_up(length);
                execute_one(Direction::write, *to, {0, region + start, assembled->data(), padded, padded});
                transfer.advance(length);
            };
        });
        to->truncate(region + total);
        to->sync();
        transfer.result.digests = std::move(digests);
        transfer.result.direct = to->has_direct();
        transfer.result.block = block;
        transfer.result.depth = options.depth;
        if (options.direct) transfer.fell_back(to->direct_refused());
    });
}

}  // namespace flashd
