// SPDX-License-Identifier: Apache-2.0
// The streamer without Python, on a disk that misbehaves, for the sanitizers: tests/native/sanitize builds and runs it.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "copy.hpp"
#include "device.hpp"
#include "digest.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "faulty_disk.hpp"
#include "load.hpp"
#include "memory.hpp"
#include "plan.hpp"
#include "staging.hpp"
#include "write.hpp"

using namespace flashd;

namespace {

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (false)

using Bytes = std::vector<std::byte>;

constexpr uint64_t block = 64 << 10;
constexpr uint64_t data_offset = 4096;

Bytes some_bytes(size_t length, unsigned seed) {
    std::minstd_rand random(seed);
    Bytes result(length);
    for (auto& byte : result) byte = static_cast<std::byte>(random() >> 8);
    return result;
}

std::span<const std::byte> part(const Bytes& bytes, size_t start) { return std::span(bytes).subspan(start); }

bool same(std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

std::string table_of(std::span<const std::byte> data, uint64_t grid) {
    std::string table;
    for (uint64_t start = 0; start < data.size(); start += grid) {
        const Digest found = digest(data.subspan(start, std::min<uint64_t>(grid, data.size() - start)));
        table.append(reinterpret_cast<const char*>(found.data()), found.size());
    }
    return table;
}

// A file that has a name only while it is created.
class TestFile {
  public:
    explicit TestFile(const Bytes& contents = {}) {
        std::string path = "streamer-test-XXXXXX";
        fd_ = UniqueFd(::mkstemp(path.data()));
        CHECK(fd_);
        ::unlink(path.c_str());
        CHECK(::write(fd_.get(), contents.data(), contents.size()) == static_cast<ssize_t>(contents.size()));
    }

    File open(File::Access access = File::Access::read) const { return {fd_.get(), "file", access, true}; }
    std::vector<File> open_alone() const {
        std::vector<File> files;
        files.push_back(open());
        return files;
    }
    Bytes contents() const {
        Bytes result(static_cast<size_t>(::lseek(fd_.get(), 0, SEEK_END)));
        CHECK(::lseek(fd_.get(), 0, SEEK_SET) == 0);
        CHECK(::read(fd_.get(), result.data(), result.size()) == static_cast<ssize_t>(result.size()));
        return result;
    }

  private:
    UniqueFd fd_;
};

// How a transfer ended.
struct Ending {
    Result result;
    std::optional<Error> error;
};

Ending ended(const std::unique_ptr<Transfer>& transfer) {
    CHECK(transfer->wait(-1));
    try {
        return {transfer->outcome(), std::nullopt};
    } catch (const Error& error) {
        return {{}, error};
    }
}

Options options_of(Backend backend) { return {.block = block, .depth = 4, .backend = backend}; }

const Backend backends[] = {Backend::io_uring, Backend::threads};

void plans_are_cut_at_the_grid() {
    const Read reads[] = {{0, data_offset, 0, 3 * block + 5000}, {1, 17, 3 * block + 5000, 100}};
    uint64_t next = 0;
    for (const Read& read : split(reads, block)) {
        CHECK(read.memory_offset == next);
        CHECK(read.length > 0);
        CHECK(read.memory_offset / block == (read.memory_offset + read.length - 1) / block);
        CHECK(read.file == 1 || read.length % alignment == 0 || read.length < alignment);
        next += read.length;
    }
    CHECK(next == 3 * block + 5100);

    const Piece pieces[] = {{0, 100, 0, 10}, {1, 0, 10, 0}, {2, 50, 10, 20}, {3, 0, 30, 5}};
    const auto found = within(pieces, 5, 10);
    CHECK(found.size() == 2);
    CHECK(found[0].source_offset == 105 && found[0].target_offset == 5 && found[0].length == 5);
    CHECK(found[1].source_offset == 50 && found[1].target_offset == 10 && found[1].length == 5);
    CHECK(within(pieces, 35, 10).empty());
}

void loads_and_writes_are_exact() {
    for (const Backend backend : backends)
        for (const size_t length : {size_t{1}, size_t{4096}, size_t{block + 1}, size_t{9 * block + 4097}}) {
            const Bytes contents = some_bytes(data_offset + length, 1);
            const TestFile file(contents);
            Buffer memory(align_up(length));
            const std::span<std::byte> region{memory.data(), length};
            const auto transfer =
                load(file.open_alone(), {{0, data_offset, 0, length}}, region,
                     DigestTable(3 * 4096, table_of(part(contents, data_offset), 3 * 4096)), true, options_of(backend));
            CHECK(!ended(transfer).error);
            CHECK(transfer->done() == length);
            CHECK(same(region, part(contents, data_offset)));

            const TestFile target(some_bytes(20 * block, 2));
            CHECK(!ended(write(target.open(File::Access::write), 0, region, options_of(backend))).error);
            CHECK(same(target.contents(), region));
        }
}

void copies_are_exact() {
    const Bytes contents = some_bytes(700'001, 3);
    const TestFile source(contents);
    const std::vector<Piece> pieces = {{0, 1, 0, 300'000}, {0, 12, 300'000, 77}, {0, 200'003, 300'077, 499'998}};
    Bytes expected;
    for (const Piece& piece : pieces)
        expected.insert(expected.end(), contents.begin() + static_cast<ptrdiff_t>(piece.source_offset),
                        contents.begin() + static_cast<ptrdiff_t>(piece.source_offset + piece.length));
    const TestFile target{Bytes(data_offset)};
    const auto ending = ended(copy(source.open_alone(), pieces, target.open(File::Access::write), data_offset, block,
                                   options_of(Backend::automatic)));
    CHECK(!ending.error);
    CHECK(same(part(target.contents(), data_offset), expected));
    CHECK(ending.result.digests == table_of(expected, block));
    CHECK(!ended(verify(target.open(), data_offset, expected.size(), DigestTable(block, ending.result.digests),
                        options_of(Backend::automatic)))
               .error);
}

// Runs everything on threads while `arrange` makes the disk misbehave in ways that must not matter.
void survives(const std::function<void(FaultyDisk&)>& arrange, const char* fallback) {
    const Bytes contents = some_bytes(20 * block + 999, 4);
    const TestFile file(contents);
    Buffer memory(align_up(contents.size()));
    const std::span<std::byte> region{memory.data(), contents.size()};
    arrange(faulty_disk());
    const auto ending =
        ended(load(file.open_alone(), {{0, 0, 0, contents.size()}}, region, {}, false, options_of(Backend::threads)));
    CHECK(!ending.error);
    CHECK(same(region, contents));
    CHECK(ending.result.fallback == fallback);
    arrange(faulty_disk());
    const TestFile target;
    CHECK(!ended(write(target.open(File::Access::write), 0, region, options_of(Backend::threads))).error);
    CHECK(same(target.contents(), contents));
    arrange(faulty_disk());
    copies_are_exact();
    CHECK(faulty_disk().calls > 0);
}

void a_misbehaving_disk_does_not_matter() {
    FaultyDisk& disk = faulty_disk();
    survives([](FaultyDisk& d) { d.interrupted = 50; }, "");
    disk.interrupted = 0;
    survives([](FaultyDisk& d) { d.short_results = true; }, "");
    disk.short_results = false;
    survives([](FaultyDisk& d) { d.refuses_direct = true; }, "O_DIRECT refused: accepted at open, then EINVAL");
    disk.refuses_direct = false;
}

void a_failing_disk_is_named() {
    const TestFile file(some_bytes(8 * block, 5));
    Buffer memory(8 * block);
    const std::span<std::byte> region{memory.data(), memory.size()};
    faulty_disk().error = EIO;
    const auto reading =
        ended(load(file.open_alone(), {{0, 0, 0, region.size()}}, region,
                   DigestTable(block, std::string(8 * digest_bytes, 'x')), true, options_of(Backend::threads)));
    const auto writing = ended(write(file.open(File::Access::write), 0, region, options_of(Backend::threads)));
    faulty_disk().error = 0;
    CHECK(reading.error && reading.error->number == EIO && reading.error->path == "file");
    CHECK(reading.error->operation == "read" && reading.error->offset % block == 0);
    CHECK(writing.error && writing.error->number == EIO && writing.error->operation == "write");
}

void endings_are_told_apart() {
    const Bytes contents = some_bytes(8 * block, 6);
    const TestFile file(contents);
    Buffer memory(16 * block);
    for (const Backend backend : backends) {
        const auto truncated = ended(load(file.open_alone(), {{0, 0, 0, 16 * block}}, {memory.data(), memory.size()},
                                          {}, false, options_of(backend)));
        CHECK(truncated.error && truncated.error->kind == Failure::truncated && truncated.error->offset == 8 * block);

        std::string table = table_of(contents, block);
        table[5 * digest_bytes] ^= 1;
        const auto corrupt = ended(load(file.open_alone(), {{0, 0, 0, 8 * block}}, {memory.data(), 8 * block},
                                        DigestTable(block, table), false, options_of(backend)));
        CHECK(corrupt.error && corrupt.error->kind == Failure::corrupt && corrupt.error->offset == 5 * block);

        const auto transfer = load(file.open_alone(), {{0, 0, 0, 8 * block}}, {memory.data(), 8 * block},
                                   DigestTable(block, table_of(contents, block)), true, options_of(backend));
        transfer->cancel();
        const auto cancelled = ended(transfer);
        CHECK(!cancelled.error || cancelled.error->kind == Failure::cancelled);
        // Dropped while it runs: it must be awaited before its memory is freed.
        load(file.open_alone(), {{0, 0, 0, 8 * block}}, {memory.data(), 8 * block}, {}, true, options_of(backend));
    }
}

// A driver that counts its objects, and fails in one of its calls.
struct FaultyDriver {
    std::atomic<int> calls{0};
    int fails_at = 0;  // the number of the call, from 1 on; 0 for none
    std::atomic<int> streams{0};
    std::atomic<int> events{0};

    bool strikes() { return ++calls == fails_at; }
};

FaultyDriver& faulty_driver() {
    static FaultyDriver driver;
    return driver;
}

constexpr Driver::Status refused = 700;

const Driver& faulty_table() {
    static const Driver table = [] {
        Driver made = host_driver();
        made.create_stream = [](Driver::Stream* stream, unsigned flags) {
            if (faulty_driver().strikes()) return refused;
            ++faulty_driver().streams;
            return host_driver().create_stream(stream, flags);
        };
        made.destroy_stream = [](Driver::Stream stream) {
            --faulty_driver().streams;
            return host_driver().destroy_stream(stream);
        };
        made.create_event = [](Driver::Event* event, unsigned flags) {
            if (faulty_driver().strikes()) return refused;
            ++faulty_driver().events;
            return host_driver().create_event(event, flags);
        };
        made.destroy_event = [](Driver::Event event) {
            --faulty_driver().events;
            return host_driver().destroy_event(event);
        };
        made.record_event = [](Driver::Event event, Driver::Stream stream) {
            return faulty_driver().strikes() ? refused : host_driver().record_event(event, stream);
        };
        made.synchronize_event = [](Driver::Event event) {
            // Like a real driver, it fails and leaves the copy in flight.
            return faulty_driver().strikes() ? refused : host_driver().synchronize_event(event);
        };
        made.copy_async = [](Driver::Address to, Driver::Address from, size_t length, Driver::Stream stream) {
            return faulty_driver().strikes() ? refused : host_driver().copy_async(to, from, length, stream);
        };
        made.register_memory = [](void* start, size_t length, unsigned flags) {
            return faulty_driver().strikes() ? refused : host_driver().register_memory(start, length, flags);
        };
        return made;
    }();
    return table;
}

// One of the transfers with a device, and the bytes expected after success.
struct DeviceTransfer {
    const char* name;
    std::function<std::unique_ptr<Transfer>(const std::shared_ptr<Staging>&)> start;
    std::function<bool()> is_exact;
};

void a_failing_driver_leaves_nothing_behind() {
    constexpr size_t length = 7 * block + 123;
    const Bytes contents = some_bytes(length, 7);
    const TestFile file(contents);
    const TestFile target;
    Bytes device = contents, host = contents;
    const std::string table = table_of(contents, block);
    const auto address = reinterpret_cast<Driver::Address>(device.data());
    const auto loaded = [&] { return same(device, contents); };
    const auto load_by = [&](Backend backend, bool page_cache) {
        return [&, backend, page_cache](const std::shared_ptr<Staging>& staging) {
            Options options = options_of(backend);
            options.page_cache = page_cache;
            return load_device(file.open(), 0, length, address, DigestTable(block, table), staging, options);
        };
    };
    std::vector<DeviceTransfer> transfers = {
        {"load by io_uring", load_by(Backend::io_uring, false), loaded},
        {"load by threads", load_by(Backend::threads, false), loaded},
        {"load from the page cache", load_by(Backend::automatic, true), loaded},
        {"write",
         [&](const std::shared_ptr<Staging>& staging) {
             return write_device(target.open(File::Access::write), 0, address, length, staging,
                                 options_of(Backend::automatic));
         },
         [&] { return same(target.contents(), contents); }},
    };
    for (const bool registered : {false, true}) {
        transfers.push_back({"upload",
                             [&, registered](const std::shared_ptr<Staging>& staging) {
                                 return upload(host, address, registered, staging, options_of(Backend::automatic));
                             },
                             loaded});
        transfers.push_back({"download",
                             [&, registered](const std::shared_ptr<Staging>& staging) {
                                 return download(address, host, registered, staging, options_of(Backend::automatic));
                             },
                             [&] { return same(host, contents); }});
    }
    FaultyDriver& driver = faulty_driver();
    for (const DeviceTransfer& transfer : transfers) {
        driver.fails_at = 0;
        const auto staging = std::make_shared<Staging>(Device{&faulty_table(), nullptr}, block, 3);
        const int events = driver.events;
        for (int call = 1;; ++call) {
            device = host = contents;
            driver.calls = 0;
            driver.fails_at = call;
            const auto ending = ended(transfer.start(staging));
            const bool struck = driver.calls >= call;
            driver.fails_at = 0;
            CHECK(driver.streams == 0 && driver.events == events);
            // With many threads, the failing call may be one whose result is no longer needed.
            if (struck) CHECK(ending.error && ending.error->kind == Failure::device);
            const auto again = ended(transfer.start(staging));
            CHECK(!again.error);
            CHECK(transfer.is_exact());
            if (!struck) break;
            CHECK(call < 1000);
        }
        CHECK(staging->peak() <= 3 * block);
    }
    CHECK(driver.events == 0);
}

void staging_memory_that_cannot_be_had_leaves_nothing() {
    FaultyDriver& driver = faulty_driver();
    for (int call = 1; call <= 4; ++call) {
        driver.calls = 0;
        driver.fails_at = call;
        bool failed = false;
        try {
            const Staging staging(Device{&faulty_table(), nullptr}, block, 3);
        } catch (const Error& error) {
            failed = error.kind == Failure::device;
        }
        CHECK(failed && driver.events == 0);
    }
    driver.fails_at = 0;
}

}  // namespace

int main() {
    plans_are_cut_at_the_grid();
    loads_and_writes_are_exact();
    copies_are_exact();
    a_misbehaving_disk_does_not_matter();
    a_failing_disk_is_named();
    endings_are_told_apart();
    a_failing_driver_leaves_nothing_behind();
    staging_memory_that_cannot_be_had_leaves_nothing();
    std::puts("streamer: all native tests passed");
}
