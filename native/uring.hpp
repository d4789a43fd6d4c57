// SPDX-License-Identifier: Apache-2.0
// An io_uring by its three system calls and its shared rings (io_uring(7)), without liburing.
#pragma once

#include <linux/io_uring.h>
#include <sys/uio.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "file.hpp"

namespace flashd {

class Ring {
  public:
    // Returns nothing if the kernel or a seccomp filter refuses; `refused` then says why, and `number` is the errno.
    static std::optional<Ring> create(unsigned entries, std::string& refused, int& number);
    Ring(Ring&& other) noexcept;
    Ring& operator=(Ring&&) = delete;
    ~Ring();

    bool register_files(std::span<const int> fds);
    // Registers a table of `count` buffers, to be filled one by one (Linux 5.19).
    bool register_buffer_table(unsigned count);
    bool register_buffer(unsigned index, iovec buffer);

    // Returns the next free submission entry, zeroed. Callers keep no more requests in flight than there are entries.
    io_uring_sqe& prepare();
    // Submits the prepared entries. Returns 0 or an errno.
    int submit() { return enter(0); }
    // The same, and waits for at least one completion.
    int wait() { return enter(1); }

    struct Completion {
        uint64_t tag;
        int result;
    };
    std::optional<Completion> next_completion();

  private:
    Ring() = default;
    int enter(unsigned completions);

    UniqueFd fd_;
    void* rings_ = nullptr;
    size_t rings_size_ = 0;
    io_uring_sqe* entries_ = nullptr;
    size_t entries_size_ = 0;
    unsigned* submit_tail_ = nullptr;
    unsigned submit_mask_ = 0;
    unsigned* complete_head_ = nullptr;
    unsigned* complete_tail_ = nullptr;
    unsigned complete_mask_ = 0;
    io_uring_cqe* completions_ = nullptr;
    unsigned prepared_ = 0;   // filled in by us
    unsigned published_ = 0;  // visible to the kernel and not taken yet
};

}  // namespace flashd
