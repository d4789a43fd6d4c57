// SPDX-License-Identifier: Apache-2.0
// Memory into a file.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "file.hpp"
#include "transfer.hpp"

namespace flashd {

// Writes `memory` at `offset` of the target, preallocated and fsynced. The file ends where the memory does.
std::unique_ptr<Transfer> write(File target, uint64_t offset, std::span<std::byte> memory, const Options& options);

}  // namespace flashd
