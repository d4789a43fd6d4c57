// SPDX-License-Identifier: Apache-2.0
// Pieces of files, at any offsets, into one new file, with the digests of its blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "file.hpp"
#include "plan.hpp"
#include "transfer.hpp"

namespace flashd {

// Writes [region, region + sum of pieces) of the target, whose first `region` bytes are left as they are, and gives the
// digest of each `block` of that part. Pieces are sorted by target offset, counted from `region`, without holes.
// Memory: two blocks a thread. The target is preallocated, cut to its size and fsynced; it ends with the pieces, or at
// `file_size` if that is further, so that a file can be filled by several copies, in any order.
std::unique_ptr<Transfer> copy(std::vector<File> sources, std::vector<Piece> pieces, File target, uint64_t region,
                               uint64_t block, const Options& options, uint64_t file_size = 0);

}  // namespace flashd
