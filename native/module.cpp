// SPDX-License-Identifier: Apache-2.0
// The streamer's Python module, flashd._native, which only flashd/io/streamer.py uses. Its types for mypy,
// flashd/_native.pyi, are generated from it at build.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <tuple>
#include <vector>

#include "copy.hpp"
#include "device.hpp"
#include "digest.hpp"
#include "error.hpp"
#include "load.hpp"
#include "memory.hpp"
#include "raw_read.hpp"
#include "staging.hpp"
#include "transfer.hpp"
#include "write.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace flashd;

namespace {

using OpenFile = std::tuple<int, std::string>;

std::span<std::byte> memory_at(uintptr_t address, uint64_t size) {
    return {reinterpret_cast<std::byte*>(address), size};
}

// Reopening a file may never return if its server is gone, so other threads must be able to run meanwhile.
std::vector<File> open_all(const std::vector<OpenFile>& files, bool direct) {
    const nb::gil_scoped_release others_go_on;
    std::vector<File> result;
    for (const auto& [fd, path] : files) result.emplace_back(fd, path, File::Access::read, direct);
    return result;
}

File open_target(const OpenFile& file, bool direct) {
    const nb::gil_scoped_release others_go_on;
    return File(std::get<0>(file), std::get<1>(file), File::Access::write, direct);
}

DigestTable table_of(uint64_t block, const nb::bytes& table) {
    return {block, std::string(table.c_str(), table.size())};
}

// Uses our own pointer, because the binding's would need the interpreter's lock when a transfer's thread releases it.
struct SharedStaging {
    std::shared_ptr<Staging> pointer;
};

const char* kind_name(Failure kind) {
    switch (kind) {
        case Failure::system:
            return "system";
        case Failure::memory:
            return "memory";
        case Failure::truncated:
            return "truncated";
        case Failure::corrupt:
            return "corrupt";
        case Failure::cancelled:
            return "cancelled";
        case Failure::device:
            return "device";
    }
    return "system";
}

// The type of flashd._native.Error; lives as long as the module.
PyObject* error_type = nullptr;

void translate(const std::exception_ptr& caught, void*) {
    try {
        std::rethrow_exception(caught);
    } catch (const Error& error) {
        const nb::object offset =
            error.offset == no_offset ? nb::object(nb::none()) : nb::object(nb::int_(error.offset));
        const nb::tuple args = nb::make_tuple(kind_name(error.kind), error.operation, error.number, error.path, offset);
        PyErr_SetObject(error_type, args.ptr());
    } catch (const std::system_error& error) {
        // Raised only by the start of a transfer's threads, when the process may have no more.
        const nb::tuple args = nb::make_tuple("system", "start", error.code().value(), "a thread", nb::none());
        PyErr_SetObject(error_type, args.ptr());
    }
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The compiled streamer. Sizes and offsets in bytes; only flashd/io/streamer.py speaks to it.";
    const std::string error_name = nb::cast<std::string>(m.attr("__name__")) + ".Error";
    error_type = PyErr_NewExceptionWithDoc(
        error_name.c_str(),
        "args: kind (system, memory, truncated, corrupt, cancelled, device), operation, errno, path, offset or None.",
        PyExc_Exception, nullptr);
    m.attr("Error") = nb::steal(error_type);
    Py_INCREF(error_type);
    nb::register_exception_translator(translate);

    nb::enum_<Backend>(m, "Backend")
        .value("AUTO", Backend::automatic)
        .value("IO_URING", Backend::io_uring)
        .value("THREADS", Backend::threads);

    nb::class_<Options>(m, "Options")
        .def(
            "__init__",
            [](Options* self, uint64_t block, unsigned depth, Backend backend, bool direct, unsigned populate_threads,
               unsigned digest_threads, unsigned copy_threads, uint64_t piece, unsigned pieces, bool page_cache) {
                new (self) Options{.block = block,
                                   .depth = depth,
                                   .backend = backend,
                                   .direct = direct,
                                   .populate_threads = populate_threads,
                                   .digest_threads = digest_threads,
                                   .copy_threads = copy_threads,
                                   .piece = piece,
                                   .pieces = pieces,
                                   .page_cache = page_cache};
            },
            "block"_a, "depth"_a, "backend"_a, "direct"_a, "populate_threads"_a, "digest_threads"_a, "copy_threads"_a,
            "piece"_a, "pieces"_a, "page_cache"_a);

    nb::class_<Result>(m, "Result")
        .def_ro("size", &Result::size)
        .def_ro("seconds", &Result::seconds)
        .def_ro("cpu_seconds", &Result::cpu_seconds)
        .def_ro("populate_cpu_seconds", &Result::populate_cpu_seconds)
        .def_ro("digest_cpu_seconds", &Result::digest_cpu_seconds)
        .def_ro("backend", &Result::backend)
        .def_ro("direct", &Result::direct)
        .def_ro("fixed_files", &Result::fixed_files)
        .def_ro("fixed_buffers", &Result::fixed_buffers)
        .def_ro("block", &Result::block)
        .def_ro("depth", &Result::depth)
        .def_ro("staging", &Result::staging)
        .def_ro("fallback", &Result::fallback)
        .def_prop_ro("digests", [](const Result& r) { return nb::bytes(r.digests.data(), r.digests.size()); });

    nb::class_<Transfer>(m, "Transfer")
        .def_prop_ro("total", &Transfer::total)
        .def_prop_ro("done", &Transfer::done)
        .def_prop_ro("finished", &Transfer::finished)
        .def("cancel", &Transfer::cancel)
        .def("wait", &Transfer::wait, "seconds"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("outcome", &Transfer::outcome, nb::rv_policy::reference_internal);

    m.def(
        "load",
        [](const std::vector<OpenFile>& files,
           const std::vector<std::tuple<uint32_t, uint64_t, uint64_t, uint64_t>>& reads, uintptr_t address,
           uint64_t size, uint64_t digest_block, const nb::bytes& digests, bool populate, const Options& options) {
            std::vector<Read> plan;
            for (const auto& [file, file_offset, memory_offset, length] : reads)
                plan.push_back({file, file_offset, memory_offset, length});
            return load(open_all(files, options.direct), std::move(plan), memory_at(address, size),
                        table_of(digest_block, digests), populate, options);
        },
        "files"_a, "reads"_a, "address"_a, "size"_a, "digest_block"_a, "digests"_a, "populate"_a, "options"_a);

    m.def(
        "verify",
        [](const OpenFile& file, uint64_t start, uint64_t length, uint64_t digest_block, const nb::bytes& digests,
           const Options& options) {
            return verify(std::move(open_all({file}, options.direct)[0]), start, length,
                          table_of(digest_block, digests), options);
        },
        "file"_a, "start"_a, "length"_a, "digest_block"_a, "digests"_a, "options"_a);

    m.def(
        "write",
        [](const OpenFile& target, uint64_t offset, uintptr_t address, uint64_t size, const Options& options) {
            return write(open_target(target, options.direct), offset, memory_at(address, size), options);
        },
        "target"_a, "offset"_a, "address"_a, "size"_a, "options"_a);

    m.def(
        "copy",
        [](const std::vector<OpenFile>& files,
           const std::vector<std::tuple<uint32_t, uint64_t, uint64_t, uint64_t>>& pieces, const OpenFile& target,
           uint64_t region, uint64_t digest_block, const Options& options, uint64_t file_size) {
            std::vector<Piece> plan;
            for (const auto& [file, source_offset, target_offset, length] : pieces)
                plan.push_back({file, source_offset, target_offset, length});
            return copy(open_all(files, options.direct), std::move(plan), open_target(target, options.direct), region,
                        digest_block, options, file_size);
        },
        "files"_a, "pieces"_a, "target"_a, "region"_a, "digest_block"_a, "options"_a, "file_size"_a);

    nb::class_<SharedStaging>(m, "Staging")
        .def_prop_ro("block", [](const SharedStaging& staging) { return staging.pointer->block(); })
        .def_prop_ro("size", [](const SharedStaging& staging) { return staging.pointer->memory().size(); })
        .def_prop_ro("peak", [](const SharedStaging& staging) { return staging.pointer->peak(); });

    m.def(
        "staging",
        [](const std::string& driver, uintptr_t context, uint64_t block, unsigned count) {
            const Driver& table = driver == "cuda" ? cuda_driver() : host_driver();
            const Device device{&table, reinterpret_cast<Driver::Context>(context)};
            return SharedStaging{std::make_shared<Staging>(device, block, count)};
        },
        "driver"_a, "context"_a, "block"_a, "count"_a, nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "load_device",
        [](const OpenFile& file, uint64_t start, uint64_t length, uint64_t target, uint64_t digest_block,
           const nb::bytes& digests, const SharedStaging& staging, const Options& options) {
            return load_device(std::move(open_all({file}, options.direct)[0]), start, length, target,
                               table_of(digest_block, digests), staging.pointer, options);
        },
        "file"_a, "start"_a, "length"_a, "target"_a, "digest_block"_a, "digests"_a, "staging"_a, "options"_a);

    m.def(
        "write_device",
        [](const OpenFile& target, uint64_t offset, uint64_t source, uint64_t length, const SharedStaging& staging,
           const Options& options) {
            return write_device(open_target(target, options.direct), offset, source, length, staging.pointer, options);
        },
        "target"_a, "offset"_a, "source"_a, "length"_a, "staging"_a, "options"_a);

    m.def(
        "upload",
        [](uintptr_t address, uint64_t size, uint64_t target, bool registered, const SharedStaging& staging,
           const Options& options) {
            return upload(memory_at(address, size), target, registered, staging.pointer, options);
        },
        "address"_a, "size"_a, "target"_a, "registered"_a, "staging"_a, "options"_a);

    m.def(
        "download",
        [](uint64_t source, uintptr_t address, uint64_t size, bool registered, const SharedStaging& staging,
           const Options& options) {
            return download(source, memory_at(address, size), registered, staging.pointer, options);
        },
        "source"_a, "address"_a, "size"_a, "registered"_a, "staging"_a, "options"_a);

    m.def(
        "raw_read",
        [](const std::string& path, uint64_t offset, uintptr_t address, uint64_t size, uint64_t block, unsigned depth) {
            return raw_read(path, offset, memory_at(address, size), block, depth);
        },
        "path"_a, "offset"_a, "address"_a, "size"_a, "block"_a, "depth"_a, nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "blake3",
        [](nb::bytes data) {
            const Digest found = digest({reinterpret_cast<const std::byte*>(data.c_str()), data.size()});
            return nb::bytes(reinterpret_cast<const char*>(found.data()), found.size());
        },
        "data"_a);
}
