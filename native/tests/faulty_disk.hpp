// SPDX-License-Identifier: Apache-2.0
// A disk that misbehaves on demand: this test executable's own pread and pwrite replace the C library's.
#pragma once

#include <atomic>

struct FaultyDisk {
    std::atomic<unsigned> interrupted{0};     // so many calls fail with EINTR first
    std::atomic<bool> short_results{false};   // every call moves only a part, of odd length
    std::atomic<bool> refuses_direct{false};  // O_DIRECT was accepted at open, and every request fails with EINVAL
    std::atomic<int> error{0};                // every call fails with this errno
    std::atomic<unsigned> calls{0};
};

FaultyDisk& faulty_disk();
