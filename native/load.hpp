// SPDX-License-Identifier: Apache-2.0
// Loads files into memory, and compares files with their digests.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "digest.hpp"
#include "file.hpp"
#include "plan.hpp"
#include "transfer.hpp"

namespace flashd {

// Reads every byte to its final place. With digests, each block of `memory` (the data region of a checkpoint) is
// compared as soon as it has arrived. With `populate`, helper threads make the memory present ahead of the reads.
std::unique_ptr<Transfer> load(std::vector<File> files, std::vector<Read> reads, std::span<std::byte> memory,
                               DigestTable digests, bool populate, const Options& options);

// Reads [start, start + length) of a file and compares it with its digests, keeping nothing.
std::unique_ptr<Transfer> verify(File file, uint64_t start, uint64_t length, DigestTable digests,
                                 const Options& options);

}  // namespace flashd
