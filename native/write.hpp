// SPDX-License-Identifier: Apache-2.0
// Writes memory to a file.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "file.hpp"
#include "transfer.hpp"

namespace flashd {

// Writes `memory` at `offset` of the target, preallocates and fsyncs it. The file is cut to the end of the memory.
std::unique_ptr<Transfer> write(File target, uint64_t offset, std::span<std::byte> memory, const Options& options);

}  // namespace flashd
