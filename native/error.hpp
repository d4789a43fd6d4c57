// SPDX-License-Identifier: Apache-2.0
// The one exception that native code throws. Python translates it once, in flashd/io/streamer.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace flashd {

// Value 0 of `offset` is a real offset, so "no offset" needs a value of its own.
inline constexpr uint64_t no_offset = UINT64_MAX;

enum class Failure { system, memory, truncated, corrupt, cancelled, device };

struct Error : std::runtime_error {
    // `operation` is the system call or step that failed; `number` is errno, or 0. For a device,
    // `number` is the driver's status and `path` the device's name.
    Error(Failure kind_, std::string operation_, int number_, std::string path_, uint64_t offset_ = no_offset)
        : std::runtime_error(operation_),
          kind(kind_),
          operation(std::move(operation_)),
          number(number_),
          path(std::move(path_)),
          offset(offset_) {}

    Failure kind;
    std::string operation;
    int number;
    std::string path;
    uint64_t offset;
};

}  // namespace flashd
