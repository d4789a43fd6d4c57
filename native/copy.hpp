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
// Memory: two blocks a thread. The target is preallocated, truncated to its size and fsynced.
std::unique_ptr<Transfer> copy(std::vector<File> sources, std::vector<Piece> pieces, File target, uint64_t region,
                               uint64_t block, const Options& options);

}  // namespace flashd
