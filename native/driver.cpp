// SPDX-License-Identifier: Apache-2.0
#include "driver.hpp"

#include <dlfcn.h>

#include <cerrno>

#include "error.hpp"

namespace flashd {

namespace {

// The library stays open, because its threads would not survive unloading.
void* open_library() {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw Error(Failure::device, "dlopen", ENOENT, "libcuda.so.1");
    return library;
}

template <class Function>
void find(void* library, const char* name, Function& entry) {
    entry = reinterpret_cast<Function>(::dlsym(library, name));
    if (entry == nullptr) throw Error(Failure::device, name, ENOSYS, "libcuda.so.1");
}

Driver load_cuda() {
    void* library = open_library();
    Driver table{};
    table.name = "cuda";
    // Names as cuda.h maps them to the versions whose signatures driver.hpp declares.
    find(library, "cuCtxSetCurrent", table.set_context);
    find(library, "cuStreamCreate", table.create_stream);
    find(library, "cuStreamDestroy_v2", table.destroy_stream);
    find(library, "cuStreamSynchronize", table.synchronize_stream);
    find(library, "cuEventCreate", table.create_event);
    find(library, "cuEventDestroy_v2", table.destroy_event);
    find(library, "cuEventRecord", table.record_event);
    find(library, "cuEventSynchronize", table.synchronize_event);
    find(library, "cuMemcpyAsync", table.copy_async);
    find(library, "cuMemHostRegister_v2", table.register_memory);
    find(library, "cuMemHostUnregister", table.unregister_memory);
    find(library, "cuGetErrorName", table.name_of_status);
    return table;
}

}  // namespace

const Driver& cuda_driver() {
    static const Driver table = load_cuda();
    return table;
}

void Device::enter() const { check(driver->set_context(context), "set context"); }

void Device::check(Driver::Status status, const char* operation) const {
    if (status == 0) return;
    const char* name = nullptr;
    if (driver->name_of_status(status, &name) != 0 || name == nullptr) name = "unknown error";
    throw Error(Failure::device, operation, status, name);
}

}  // namespace flashd
