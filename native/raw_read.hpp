// SPDX-License-Identifier: Apache-2.0
// The yardstick of `flash bench stream`: a bare sequential O_DIRECT read of a file through io_uring into prepared
// memory, without the streamer's planning, retries, progress and digests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace flashd {

// Returns the seconds for reading `memory.size()` bytes from `offset`. All three must be aligned.
double raw_read(const std::string& path, uint64_t offset, std::span<std::byte> memory, uint64_t block, unsigned depth);

}  // namespace flashd
