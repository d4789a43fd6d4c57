// SPDX-License-Identifier: Apache-2.0
// The yardstick of `flash bench stream`: the barest sequential O_DIRECT read of a file through io_uring into memory
// that is ready, with none of the streamer's planning, retrying, progress or digests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace flashd {

// Seconds for reading `memory.size()` bytes from `offset` on. All three must be aligned.
double raw_read(const std::string& path, uint64_t offset, std::span<std::byte> memory, uint64_t block, unsigned depth);

}  // namespace flashd
