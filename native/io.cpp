// SPDX-License-Identifier: Apache-2.0
#include "io.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <optional>

#include "error.hpp"
#include "uring.hpp"

namespace flashd {

namespace {

// A registered buffer holds 1 GiB at most (io_uring_register(2)).
constexpr uint64_t fixed_buffer = 1 << 30;

const char* operation(Direction direction) { return direction == Direction::read ? "read" : "write"; }

// A request and how far it has come. After a short result the rest is asked for again, from an aligned offset.
struct Progress {
    Request request{};
    uint64_t done = 0;

    uint64_t offset() const { return request.offset + done; }
    std::byte* address() const { return request.address + done; }
    bool complete() const { return done >= request.length; }
    uint64_t wanted() const {
        const uint64_t left = request.length - done;
        return std::min(align_up(left), request.capacity - done);
    }
    void advance(uint64_t bytes) { done = done + bytes >= request.length ? request.length : align_down(done + bytes); }
};

// Takes what the kernel said of a request. True if the request (or its rest) must be issued again.
bool must_repeat(Direction direction, File& file, Progress& progress, int64_t result, int error) {
    const bool short_of_block = result > 0 && static_cast<uint64_t>(result) < std::min(progress.wanted(), alignment);
    if (error == EINTR || error == EAGAIN) return true;
    if (error == EINVAL && file.has_direct()) {
        file.give_up_direct("EINVAL, although it was accepted at open");
        return true;
    }
    if (error != 0) throw Error(Failure::system, operation(direction), error, file.path(), progress.offset());
    const uint64_t left = progress.request.length - progress.done;
    const bool at_end = result == 0 || (short_of_block && static_cast<uint64_t>(result) < left);
    // A read that ends inside a block has met the end of the file: reads are otherwise cut at block boundaries.
    if (at_end && direction == Direction::read && progress.offset() + static_cast<uint64_t>(result) >= file.size())
        throw Error(Failure::truncated, "read", 0, file.path(), progress.offset() + static_cast<uint64_t>(result));
    if (result == 0) throw Error(Failure::system, operation(direction), EIO, file.path(), progress.offset());
    // Without O_DIRECT any offset will do, so a short result inside a block still is progress.
    if (static_cast<uint64_t>(result) < left && align_down(static_cast<uint64_t>(result)) == 0 && !file.has_direct())
        progress.done += static_cast<uint64_t>(result);
    else
        progress.advance(static_cast<uint64_t>(result));
    return !progress.complete();
}

class UringQueue {
  public:
    UringQueue(Transfer& transfer, Direction direction, std::span<File> files, Ring ring, unsigned depth)
        : transfer_(transfer), direction_(direction), files_(files), ring_(std::move(ring)), slots_(depth) {
        for (unsigned slot = 0; slot < depth; ++slot) free_.push_back(depth - 1 - slot);
    }

    void register_files() {
        std::vector<int> fds;
        for (const File& file : files_) {
            fds.push_back(file.descriptor(0, 0, nullptr));
            fds.push_back(file.buffered());
        }
        transfer_.result.fixed_files = fixed_files_ = ring_.register_files(fds);
    }

    void register_buffers(std::span<std::byte> memory) {
        std::vector<iovec> buffers;
        for (uint64_t start = 0; start < memory.size(); start += fixed_buffer)
            buffers.push_back({memory.data() + start, std::min<uint64_t>(fixed_buffer, memory.size() - start)});
        if (buffers.empty() || !ring_.register_buffers(buffers)) return;
        fixed_memory_ = memory;
        transfer_.result.fixed_buffers = true;
    }

    void run(std::span<const Request> requests, const Hooks& hooks) {
        size_t next = 0;
        std::exception_ptr error;
        // Even after an error or a cancel, the kernel owns the memory of what is in flight: it must be awaited.
        while (in_flight() > 0 || (next < requests.size() && !error && !transfer_.cancelled())) {
            while (!error && !transfer_.cancelled() && next < requests.size() && !free_.empty()) {
                hooks.before(requests[next]);
                const unsigned slot = free_.back();
                free_.pop_back();
                slots_[slot] = {requests[next++]};
                issue(slot);
            }
            if (in_flight() == 0) break;
            if (const int number = ring_.submit_and_wait(); number != 0)
                throw Error(Failure::system, "io_uring_enter", number, files_[0].path());
            while (const auto completion = ring_.next_completion()) {
                try {
                    completed(static_cast<unsigned>(completion->tag), completion->result, error != nullptr, hooks);
                } catch (...) {
                    if (!error) error = std::current_exception();
                }
            }
        }
        if (error) std::rethrow_exception(error);
        transfer_.stop_if_cancelled();
    }

  private:
    size_t in_flight() const { return slots_.size() - free_.size(); }

    void issue(unsigned slot) {
        const Progress& progress = slots_[slot];
        const File& file = files_[progress.request.file];
        io_uring_sqe& entry = ring_.prepare();
        const uint64_t length = progress.wanted();
        const bool reading = direction_ == Direction::read;
        entry.opcode = reading ? IORING_OP_READ : IORING_OP_WRITE;
        entry.fd = file.descriptor(progress.offset(), length, progress.address());
        if (fixed_files_) {
            entry.fd = static_cast<int>(2 * progress.request.file + (entry.fd == file.buffered() ? 1 : 0));
            entry.flags = IOSQE_FIXED_FILE;
        }
        entry.off = progress.offset();
        entry.addr = reinterpret_cast<uintptr_t>(progress.address());
        entry.len = static_cast<uint32_t>(length);
        entry.user_data = slot;
        if (!fixed_memory_.empty()) {
            const auto start = static_cast<uint64_t>(progress.address() - fixed_memory_.data());
            if (start / fixed_buffer == (start + length - 1) / fixed_buffer && start + length <= fixed_memory_.size()) {
                entry.opcode = reading ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
                entry.buf_index = static_cast<uint16_t>(start / fixed_buffer);
            }
        }
    }

    void completed(unsigned slot, int result, bool failed, const Hooks& hooks) {
        Progress& progress = slots_[slot];
        File& file = files_[progress.request.file];
        bool repeat = false;
        try {
            repeat = must_repeat(direction_, file, progress, std::max(result, 0), result < 0 ? -result : 0);
        } catch (...) {
            free_.push_back(slot);
            throw;
        }
        if (repeat && !failed && !transfer_.cancelled()) {
            issue(slot);
            return;
        }
        free_.push_back(slot);
        if (repeat) return;
        transfer_.advance(progress.request.length);
        hooks.after(progress.request);
    }

    Transfer& transfer_;
    Direction direction_;
    std::span<File> files_;
    Ring ring_;
    std::vector<Progress> slots_;
    std::vector<unsigned> free_;
    bool fixed_files_ = false;
    std::span<std::byte> fixed_memory_;
};

void execute_with_threads(Transfer& transfer, Direction direction, std::span<File> files,
                          std::span<const Request> requests, unsigned threads, const Hooks& hooks) {
    std::mutex mutex;
    parallel_for(transfer, requests.size(), threads, transfer.result.cpu_seconds, [&] {
        return [&](size_t index) {
            const Request& request = requests[index];
            hooks.before(request);
            execute_one(direction, files[request.file], request);
            const std::lock_guard lock(mutex);
            transfer.advance(request.length);
            hooks.after(request);
        };
    });
}

std::optional<Ring> make_ring(Transfer& transfer, const Options& options) {
    if (options.backend == Backend::threads) return std::nullopt;
    std::string refused;
    auto ring = Ring::create(std::max(options.depth, 1U), refused);
    if (!ring && options.backend == Backend::io_uring) throw Error(Failure::system, refused, ENOSYS, "");
    transfer.fell_back(refused);
    return ring;
}

}  // namespace

void execute_one(Direction direction, File& file, const Request& request) {
    Progress progress{request};
    bool repeat = request.length > 0;
    while (repeat) {
        const uint64_t length = progress.wanted();
        const int fd = file.descriptor(progress.offset(), length, progress.address());
        const auto offset = static_cast<off_t>(progress.offset());
        const ssize_t result = direction == Direction::read ? ::pread(fd, progress.address(), length, offset)
                                                            : ::pwrite(fd, progress.address(), length, offset);
        repeat = must_repeat(direction, file, progress, std::max<ssize_t>(result, 0), result < 0 ? errno : 0);
    }
}

void execute(Transfer& transfer, Direction direction, std::span<File> files, std::span<const Request> requests,
             const Options& options, std::span<std::byte> memory, const Hooks& hooks) {
    Result& result = transfer.result;
    result.block = options.block;
    result.depth = options.depth;
    auto ring = make_ring(transfer, options);
    if (ring) {
        result.backend = Backend::io_uring;
        UringQueue queue(transfer, direction, files, std::move(*ring), std::max(options.depth, 1U));
        queue.register_files();
        if (!memory.empty()) queue.register_buffers(memory);
        queue.run(requests, hooks);
    } else {
        result.backend = Backend::threads;
        execute_with_threads(transfer, direction, files, requests, std::max(options.depth, 1U), hooks);
    }
    result.direct = std::all_of(files.begin(), files.end(), [](const File& file) { return file.has_direct(); });
    for (const File& file : files)
        if (options.direct) transfer.fell_back(file.direct_refused());
}

}  // namespace flashd
