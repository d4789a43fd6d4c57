// SPDX-License-Identifier: Apache-2.0
// What a memory that weights live in can do for a transfer: a table of entry points, filled once.
// The host's table is plain memory. A GPU's is filled from its driver library, opened at run time, so that neither
// building nor installing flashd needs a toolkit.
#pragma once

#include <cstddef>

namespace flashd {

struct Driver {
    const char* name;
    void (*copy)(void* to, const void* from, size_t length);
    // Makes memory present before it is written to. 0 or an errno.
    int (*populate)(void* start, size_t length);
};

const Driver& host_driver();

}  // namespace flashd
