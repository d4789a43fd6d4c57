// SPDX-License-Identifier: Apache-2.0
// What a memory that weights live in can do for a transfer: a table of entry points, filled once.
// The host's table is plain memory. A GPU's is filled from its driver library, opened at run time, so that neither
// building nor installing flashd needs a toolkit.
#pragma once

#include <cstddef>

namespace flashd {

struct Driver {
    const char* name;
    // True if a file can be read straight into this memory, without a staging ring between.
    bool reads_directly;
    void (*copy)(void* to, const void* from, size_t length);
};

const Driver& host_driver();

}  // namespace flashd
