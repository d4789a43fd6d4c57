// SPDX-License-Identifier: Apache-2.0
// Copies pieces of files, at any offsets, into one new file, with the digests of its blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "file.hpp"
#include "plan.hpp"
#include "transfer.hpp"

namespace flashd {

// Writes [region, region + sum of pieces) of the target, leaves its first `region` bytes alone, and returns the digest
// of each `block` of the written part. Pieces are sorted by target offset, counted from `region`, without holes.
// Memory: two blocks per thread. The target is preallocated, cut to its size and fsynced. It ends with the pieces, or
// at `file_size` if that is greater, so that several copies can fill a file in any order.
std::unique_ptr<Transfer> copy(std::vector<File> sources, std::vector<Piece> pieces, File target, uint64_t region,
                               uint64_t block, const Options& options, uint64_t file_size = 0);

}  // namespace flashd
