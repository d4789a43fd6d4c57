// SPDX-License-Identifier: Apache-2.0
// The entry points of a GPU's driver that the data path needs, with CUDA's own signatures. One table is filled from
// libcuda.so.1, opened at run time, so that neither building nor installing flashd needs a toolkit; the other works
// on host memory, as asynchronously as a GPU, for machines and tests without one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashd {

constexpr unsigned no_timing = 2;  // CU_EVENT_DISABLE_TIMING

struct Driver {
    using Status = int;  // CUresult: 0 is success
    using Address = unsigned long long;
    using Context = void*;
    using Stream = void*;
    using Event = void*;

    std::string name;
    Status (*set_context)(Context);
    Status (*create_stream)(Stream*, unsigned flags);
    Status (*destroy_stream)(Stream);
    Status (*synchronize_stream)(Stream);
    Status (*create_event)(Event*, unsigned flags);
    Status (*destroy_event)(Event);
    Status (*record_event)(Event, Stream);
    Status (*synchronize_event)(Event);
    // Either address may be the device's or the host's.
    Status (*copy_async)(Address to, Address from, size_t length, Stream);
    Status (*register_memory)(void* start, size_t length, unsigned flags);
    Status (*unregister_memory)(void* start);
    Status (*name_of_status)(Status, const char** name);
};

const Driver& host_driver();
// Throws Error if there is no driver, or if it lacks an entry point.
const Driver& cuda_driver();

// A device: its driver, and the context that a thread must enter before calling it.
struct Device {
    const Driver* driver;
    Driver::Context context;

    void enter() const;
    // Throws Error (device) unless the status is success; `operation` is the entry point.
    void check(Driver::Status status, const char* operation) const;
};

}  // namespace flashd
