// SPDX-License-Identifier: Apache-2.0
// The processor time of a thread, which the streamer reports beside bandwidth.
#pragma once

#include <ctime>

namespace flashd {

inline double thread_cpu_seconds() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace flashd
