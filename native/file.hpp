// SPDX-License-Identifier: Apache-2.0
// An open file, with and without O_DIRECT, and complete reads and writes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace flashd {

// O_DIRECT: offset, length and address aligned to the logical block (open(2)). 4 KiB satisfies every device in use.
inline constexpr uint64_t alignment = 4096;

constexpr uint64_t align_down(uint64_t value) { return value & ~(alignment - 1); }
constexpr uint64_t align_up(uint64_t value) { return align_down(value + alignment - 1); }

class UniqueFd {
  public:
    UniqueFd() = default;
    explicit UniqueFd(int fd) : fd_(fd) {}
    UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
    UniqueFd& operator=(UniqueFd&& other) noexcept;
    UniqueFd(const UniqueFd&) = delete;
    UniqueFd& operator=(const UniqueFd&) = delete;
    ~UniqueFd();

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    int release();

  private:
    int fd_ = -1;
};

// The caller keeps its descriptor: `buffered` is a duplicate, and `direct` our own description, opened through
// /proc/self/fd, which needs no permission beyond the caller's descriptor.
class File {
  public:
    enum class Access { read, write };

    File(int fd, std::string path, Access access, bool want_direct);
    File(File&& other) noexcept;
    File& operator=(File&&) = delete;

    const std::string& path() const { return path_; }
    bool has_direct() const { return direct_works_; }
    // Tells whether a request may use the O_DIRECT description: it is aligned, and the file allows it.
    bool takes_direct(uint64_t offset, uint64_t length, const void* address) const;
    int descriptor(bool direct) const { return direct ? direct_.get() : buffered_.get(); }
    // Returns why there is no O_DIRECT; empty if there is.
    std::string direct_refused() const;
    // Makes the file buffered after a request failed with EINVAL although the open had succeeded, as on FUSE and some
    // overlays. Any thread may call this; the description stays open for the requests of others.
    void give_up_direct() { direct_works_ = false; }
    // Makes the file buffered because the page cache has its contents.
    void pass_by_direct();

    // Tells whether a whole range is in the page cache; false if the kernel cannot say.
    bool is_cached(uint64_t offset, uint64_t length) const;
    // Returns the end of the file after a read at `offset` met it. Blocks are read in any order, so that several reads
    // may be beyond the end.
    uint64_t end_before(uint64_t offset) const;
    void preallocate(uint64_t size) const;
    void truncate(uint64_t size) const;
    void sync() const;

  private:
    std::string path_;
    UniqueFd buffered_;
    UniqueFd direct_;
    std::string open_refused_;
    std::atomic<bool> direct_works_{false};
};

}  // namespace flashd
