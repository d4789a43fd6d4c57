// SPDX-License-Identifier: Apache-2.0
// An open file, with and without O_DIRECT, and whole reads and writes on it.
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

// The caller's descriptor stays the caller's: `buffered` is a duplicate and `direct` a description of our own, opened
// through /proc/self/fd, which needs no right beyond the one the caller's descriptor already proves.
class File {
  public:
    enum class Access { read, write };

    File(int fd, std::string path, Access access, bool want_direct);
    File(File&& other) noexcept;
    File& operator=(File&&) = delete;

    const std::string& path() const { return path_; }
    bool has_direct() const { return direct_works_; }
    // Whether a request may use the O_DIRECT description: it is aligned, and the file allows it.
    bool takes_direct(uint64_t offset, uint64_t length, const void* address) const;
    int descriptor(bool direct) const { return direct ? direct_.get() : buffered_.get(); }
    // Why there is no O_DIRECT; empty if there is.
    std::string direct_refused() const;
    // For a request that failed with EINVAL although the open succeeded, as FUSE and some overlays do: from here on the
    // file is buffered. Any thread may call it; the description stays open for the requests of others.
    void give_up_direct() { direct_works_ = false; }
    // Because the page cache has what will be read.
    void pass_by_direct();

    // Whether all of a range is in the page cache; false where the kernel cannot tell.
    bool is_cached(uint64_t offset, uint64_t length) const;
    // Where the file ends, given that a read at `offset` met its end: blocks are read in any order, and it may have
    // been the first of several beyond the end.
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
