// SPDX-License-Identifier: Apache-2.0
#include "io.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "error.hpp"
#include "uring.hpp"

namespace flashd {

namespace {

// IORING_MAX_REG_BUFFERS of the kernel.
constexpr uint64_t most_buffers = 1 << 14;

const char* operation(Direction direction) { return direction == Direction::read ? "read" : "write"; }

// A request and its progress.
struct Progress {
    Request request{};
    uint64_t done = 0;
    bool direct = false;  // how it was issued last

    uint64_t offset() const { return request.offset + done; }
    std::byte* address() const { return request.address + done; }
    uint64_t wanted() const { return std::min(align_up(request.length - done), request.capacity - done); }
    bool complete() const { return done == request.length; }

    // After a short result, requests the rest, from an aligned offset if that still makes progress.
    void advance(uint64_t bytes) {
        const uint64_t reached = std::min(done + bytes, request.length);
        const bool can_realign = direct && reached < request.length && align_down(reached) > done;
        done = can_realign ? align_down(reached) : reached;
    }
};

// Takes the kernel's answer: a number of bytes, or a negative errno. Returns whether the rest must be requested.
bool must_continue(Direction direction, File& file, Progress& progress, int64_t answer) {
    if (answer == -EINTR || answer == -EAGAIN) return true;
    if (answer == -EINVAL && progress.direct) {
        file.give_up_direct();
        return true;
    }
    if (answer == 0 && direction == Direction::read)
        throw Error(Failure::truncated, "read", 0, file.path(), file.end_before(progress.offset()));
    if (answer <= 0) {
        const int number = answer == 0 ? EIO : static_cast<int>(-answer);
        throw Error(Failure::system, operation(direction), number, file.path(), progress.offset());
    }
    progress.advance(static_cast<uint64_t>(answer));
    return !progress.complete();
}

class UringQueue {
  public:
    UringQueue(Transfer& transfer, Direction direction, std::span<File> files, Ring ring, unsigned depth)
        : transfer_(transfer), direction_(direction), files_(files), ring_(std::move(ring)), slots_(depth) {
        for (unsigned slot = depth; slot-- > 0;) free_.push_back(slot);
    }

    // File number i is registered as 2i (O_DIRECT) and 2i + 1 (buffered).
    void register_files() {
        std::vector<int> fds;
        for (const File& file : files_) {
            fds.push_back(file.descriptor(file.has_direct()));
            fds.push_back(file.descriptor(false));
        }
        transfer_.result.fixed_files = fixed_files_ = ring_.register_files(fds);
    }

    // Each part of the memory is registered when the first read into it is issued, while the disk is busy. Registering
    // all of it beforehand took 5 % of a load.
    void register_buffers(std::span<std::byte> memory, uint64_t block) {
        const uint64_t count = (memory.size() + block - 1) / block;
        if (count == 0 || count > most_buffers || !ring_.register_buffer_table(static_cast<unsigned>(count))) return;
        memory_ = memory;
        buffer_ = block;
        registered_.resize(count);
        transfer_.result.fixed_buffers = true;
    }

    void run(std::span<const Request> requests, const Hooks& hooks) {
        size_t next = 0;
        for (;;) {
            while (!stopping() && next < requests.size() && !free_.empty()) {
                bool started = false;
                guarded([&] { started = start(requests[next], hooks); });
                if (!started) break;
                ++next;
            }
            // Even after an error or a cancel the kernel owns the memory of requests in flight, so they are awaited.
            if (free_.size() == slots_.size()) {
                if (stopping() || next == requests.size()) break;
                continue;
            }
            check(ring_.wait());
            while (const auto completion = ring_.next_completion())
                guarded([&] { completed(static_cast<unsigned>(completion->tag), completion->result, hooks); });
        }
        if (error_) std::rethrow_exception(error_);
        transfer_.stop_if_cancelled();
    }

  private:
    bool stopping() const { return error_ || transfer_.cancelled(); }

    template <class Step>
    void guarded(Step step) {
        try {
            step();
        } catch (...) {
            if (!error_) error_ = std::current_exception();
        }
    }

    void check(int number) const {
        if (number != 0) throw Error(Failure::system, "io_uring_enter", number, files_[0].path());
    }

    // Returns false if the request cannot start until another one is complete.
    bool start(Request request, const Hooks& hooks) {
        const bool nothing_in_flight = free_.size() == slots_.size();
        if (!hooks.before(request, nothing_in_flight)) return false;
        const unsigned slot = free_.back();
        slots_[slot] = {.request = request};
        prepare(slot);
        free_.pop_back();
        // Submitted at once, not in batches: the next `before` may block, and one system call per block is cheap.
        check(ring_.submit());
        return true;
    }

    void prepare(unsigned slot) {
        Progress& progress = slots_[slot];
        const Request& request = progress.request;
        const File& file = files_[request.file];
        const uint64_t length = progress.wanted();
        const bool reading = direction_ == Direction::read;
        progress.direct = file.takes_direct(progress.offset(), length, progress.address());
        io_uring_sqe& entry = ring_.prepare();
        entry.opcode = reading ? IORING_OP_READ : IORING_OP_WRITE;
        entry.fd = file.descriptor(progress.direct);
        if (fixed_files_) {
            entry.fd = static_cast<int>(2 * request.file + (progress.direct ? 0 : 1));
            entry.flags = IOSQE_FIXED_FILE;
        }
        entry.off = progress.offset();
        entry.addr = reinterpret_cast<uintptr_t>(progress.address());
        entry.len = static_cast<uint32_t>(length);
        entry.user_data = slot;
        if (const auto buffer = buffer_of(progress.address(), length)) {
            entry.opcode = reading ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
            entry.buf_index = *buffer;
        }
    }

    // Returns the registered buffer that contains a range, if any.
    std::optional<uint16_t> buffer_of(std::byte* address, uint64_t length) {
        if (!transfer_.result.fixed_buffers) return std::nullopt;
        const auto start = static_cast<uint64_t>(address - memory_.data());
        const uint64_t index = start / buffer_;
        const uint64_t from = index * buffer_;
        const uint64_t size = std::min(buffer_, memory_.size() - from);
        if (start + length > from + size) return std::nullopt;
        if (!registered_[index]) {
            registered_[index] = ring_.register_buffer(static_cast<unsigned>(index), {memory_.data() + from, size});
            // RLIMIT_MEMLOCK is reached: registered parts stay registered, and the rest works without.
            transfer_.result.fixed_buffers = registered_[index];
            if (!registered_[index]) return std::nullopt;
        }
        return static_cast<uint16_t>(index);
    }

    void completed(unsigned slot, int answer, const Hooks& hooks) {
        Progress& progress = slots_[slot];
        free_.push_back(slot);
        if (must_continue(direction_, files_[progress.request.file], progress, answer)) {
            if (stopping()) return;
            prepare(slot);
            free_.pop_back();
            check(ring_.submit());
            return;
        }
        transfer_.advance(progress.request.length);
        hooks.after(progress.request);
    }

    Transfer& transfer_;
    Direction direction_;
    std::span<File> files_;
    Ring ring_;
    std::vector<Progress> slots_;
    std::vector<unsigned> free_;
    std::exception_ptr error_;
    bool fixed_files_ = false;
    std::span<std::byte> memory_;
    uint64_t buffer_ = 0;
    std::vector<bool> registered_;
};

void execute_with_threads(Transfer& transfer, Direction direction, std::span<File> files,
                          std::span<const Request> requests, unsigned threads, const Hooks& hooks) {
    std::mutex mutex;
    parallel_for(transfer, requests.size(), threads, transfer.result.cpu_seconds, [&](const Next& next) {
        while (const auto index = next()) {
            Request request = requests[*index];
            hooks.before(request, true);
            try {
                transfer.stop_if_cancelled();
                execute_one(direction, files[request.file], request);
                const std::lock_guard lock(mutex);
                transfer.advance(request.length);
                hooks.after(request);
            } catch (...) {
                hooks.dropped(request);
                throw;
            }
        }
    });
}

std::optional<Ring> make_ring(Transfer& transfer, const Options& options) {
    if (options.backend == Backend::threads) return std::nullopt;
    std::string refused;
    int number = 0;
    auto ring = Ring::create(options.depth, refused, number);
    if (!ring && options.backend == Backend::io_uring)
        throw Error(Failure::system, "io_uring_setup", number, "io_uring");
    transfer.fell_back(refused);
    return ring;
}

// Reports which files did not take the fast path, and why.
void note_direct(Transfer& transfer, std::span<const File> files, std::span<const Request> requests) {
    bool direct = true;
    for (const File& file : files) {
        direct = direct && file.has_direct();
        transfer.fell_back(file.direct_refused());
    }
    // Tails of less than a block cannot be direct, and cost nothing.
    const auto buffered = [&](const Request& request) {
        const uint64_t wanted = std::min(align_up(request.length), request.capacity);
        return wanted >= alignment && !files[request.file].takes_direct(request.offset, wanted, request.address);
    };
    if (direct && std::any_of(requests.begin(), requests.end(), buffered)) {
        direct = false;
        transfer.fell_back("O_DIRECT is impossible: file and memory offsets are not aligned alike");
    }
    transfer.result.direct = direct;
}

}  // namespace

std::vector<Request> requests_for(std::span<const Read> plan, std::span<std::byte> memory) {
    uint64_t end = 0;
    for (const Read& read : plan) end = std::max(end, read.memory_offset + read.length);
    std::vector<Request> requests;
    for (const Read& read : plan) {
        const bool last = read.memory_offset + read.length == end;
        const uint64_t room = std::min(align_up(read.length), memory.size() - read.memory_offset);
        requests.push_back({.file = read.file,
                            .offset = read.file_offset,
                            .address = memory.data() + read.memory_offset,
                            .length = read.length,
                            .capacity = last ? room : read.length});
    }
    return requests;
}

bool take_from_page_cache(std::span<File> files, std::span<const Read> reads, Options& options) {
    if (!options.page_cache || options.backend != Backend::automatic) return false;
    // Samples suffice: counting the million pages of a model takes half as long as reading them. Pages that turn out to
    // be missing are read from the disk, through the page cache.
    constexpr uint64_t samples = 256;
    constexpr uint64_t sample = 64 << 10;
    for (const Read& read : reads) {
        const uint64_t step = std::max(sample, align_down(read.length / samples));
        for (uint64_t start = 0; start < read.length; start += step)
            if (!files[read.file].is_cached(read.file_offset + start, std::min(sample, read.length - start)))
                return false;
    }
    for (File& file : files) file.pass_by_direct();
    const unsigned processors = std::max(1U, std::thread::hardware_concurrency());
    options.backend = Backend::threads;
    options.depth = std::min(processors, 16U);
    options.digest_threads = std::max(options.digest_threads, std::min(processors / 2, 8U));
    return true;
}

void execute_one(Direction direction, File& file, const Request& request) {
    Progress progress{.request = request};
    while (!progress.complete()) {
        const uint64_t length = progress.wanted();
        progress.direct = file.takes_direct(progress.offset(), length, progress.address());
        const int fd = file.descriptor(progress.direct);
        const auto offset = static_cast<off_t>(progress.offset());
        const ssize_t moved = direction == Direction::read ? ::pread(fd, progress.address(), length, offset)
                                                           : ::pwrite(fd, progress.address(), length, offset);
        must_continue(direction, file, progress, moved < 0 ? -errno : moved);
    }
}

void execute(Transfer& transfer, Direction direction, std::span<File> files, std::span<const Request> requests,
             const Options& options, std::span<std::byte> memory, const Hooks& hooks) {
    Result& result = transfer.result;
    result.block = options.block;
    result.depth = options.depth;
    if (auto ring = make_ring(transfer, options)) {
        result.backend = Backend::io_uring;
        UringQueue queue(transfer, direction, files, std::move(*ring), options.depth);
        queue.register_files();
        queue.register_buffers(memory, options.block);
        queue.run(requests, hooks);
    } else {
        result.backend = Backend::threads;
        execute_with_threads(transfer, direction, files, requests, options.depth, hooks);
    }
    note_direct(transfer, files, requests);
}

}  // namespace flashd
