// SPDX-License-Identifier: Apache-2.0
#include "raw_read.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "error.hpp"
#include "uring.hpp"

namespace flashd {

double raw_read(const std::string& path, uint64_t offset, std::span<std::byte> memory, uint64_t block, unsigned depth) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    if (!fd) throw Error(Failure::system, "open", errno, path);
    std::string refused;
    int number = 0;
    auto ring = Ring::create(depth, refused, number);
    if (!ring) throw Error(Failure::system, "io_uring_setup", number, path);
    // Registered outside the measured time, so that the limit has every advantage of the streamer.
    bool fixed = ring->register_buffer_table(static_cast<unsigned>((memory.size() + block - 1) / block));
    for (uint64_t start = 0; fixed && start < memory.size(); start += block) {
        const uint64_t length = std::min<uint64_t>(block, memory.size() - start);
        fixed = ring->register_buffer(static_cast<unsigned>(start / block), {memory.data() + start, length});
    }
    const auto started = std::chrono::steady_clock::now();
    unsigned in_flight = 0;
    for (uint64_t next = 0; next < memory.size() || in_flight > 0;) {
        for (; in_flight < depth && next < memory.size(); ++in_flight) {
            const uint64_t length = std::min<uint64_t>(block, memory.size() - next);
            io_uring_sqe& entry = ring->prepare();
            entry.opcode = fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
            entry.buf_index = static_cast<uint16_t>(next / block);
            entry.fd = fd.get();
            entry.off = offset + next;
            entry.addr = reinterpret_cast<uintptr_t>(memory.data() + next);
            entry.len = static_cast<uint32_t>(length);
            entry.user_data = length;
            next += length;
        }
        if (number = ring->wait(); number != 0) throw Error(Failure::system, "io_uring_enter", number, path);
        while (const auto completion = ring->next_completion()) {
            --in_flight;
            if (completion->result != static_cast<int>(completion->tag))
                throw Error(Failure::system, "read", completion->result < 0 ? -completion->result : EIO, path);
        }
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace flashd
