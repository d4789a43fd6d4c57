// SPDX-License-Identifier: Apache-2.0
#include "driver.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace flashd {

namespace {

int populate_host(void* start, size_t length) {
    while (::madvise(start, length, MADV_POPULATE_WRITE) != 0) {
        // Before 5.14 the kernel cannot: the reads then fault pages in on their way, slower but not wrong.
        if (errno == EINVAL) return 0;
        if (errno != EAGAIN && errno != EINTR) return errno;
    }
    return 0;
}

}  // namespace

const Driver& host_driver() {
    static constexpr Driver table{
        .name = "host",
        .copy = [](void* to, const void* from, size_t length) { std::memcpy(to, from, length); },
        .populate = populate_host,
    };
    return table;
}

}  // namespace flashd
