// SPDX-License-Identifier: Apache-2.0
#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "error.hpp"

namespace flashd {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
}

UniqueFd::~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
}

int UniqueFd::release() { return std::exchange(fd_, -1); }

File::File(int fd, std::string path, Access access, bool want_direct)
    : path_(std::move(path)), buffered_(::fcntl(fd, F_DUPFD_CLOEXEC, 3)) {
    if (!buffered_) throw Error(Failure::system, "dup", errno, path_);
    if (!want_direct) {
        open_refused_ = "O_DIRECT was not asked for";
        return;
    }
    const std::string self = "/proc/self/fd/" + std::to_string(buffered_.get());
    const int mode = access == Access::read ? O_RDONLY : O_RDWR;
    direct_ = UniqueFd(::open(self.c_str(), mode | O_DIRECT | O_CLOEXEC));
    if (!direct_) open_refused_ = std::string("O_DIRECT refused: ") + std::strerror(errno);
    direct_works_ = static_cast<bool>(direct_);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      buffered_(std::move(other.buffered_)),
      direct_(std::move(other.direct_)),
      open_refused_(std::move(other.open_refused_)),
      direct_works_(other.direct_works_.load()) {}

bool File::takes_direct(uint64_t offset, uint64_t length, const void* address) const {
    return has_direct() && ((offset | length | reinterpret_cast<uintptr_t>(address)) & (alignment - 1)) == 0;
}

std::string File::direct_refused() const {
    if (has_direct()) return {};
    return direct_ ? "O_DIRECT refused: accepted at open, then EINVAL" : open_refused_;
}

void File::pass_by_direct() {
    direct_works_ = false;
    direct_ = UniqueFd();
    open_refused_ = "read from the page cache, which has all of it";
}

bool File::is_cached(uint64_t offset, uint64_t length) const {
    // cachestat(2), since Linux 6.5; written out because C libraries and headers are older.
    constexpr long cachestat = 451;
    const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    const struct {
        uint64_t offset, length;
    } range{offset, length};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages{};
    if (::syscall(cachestat, buffered_.get(), &range, &pages, 0U) != 0) return false;
    const uint64_t spanned = (offset + length + page - 1) / page - offset / page;
    return pages.cached >= spanned;
}

uint64_t File::end_before(uint64_t offset) const {
    struct stat status{};
    const bool known = ::fstat(buffered_.get(), &status) == 0 && S_ISREG(status.st_mode);
    return known ? std::min(offset, static_cast<uint64_t>(status.st_size)) : offset;
}

void File::preallocate(uint64_t size) const {
    if (size == 0) return;
    while (::fallocate(buffered_.get(), 0, 0, static_cast<off_t>(size)) != 0) {
        // Some file systems cannot (FUSE, for example); then writing fails by itself when the disk is full.
        if (errno == EOPNOTSUPP || errno == ENOSYS) return;
        if (errno != EINTR) throw Error(Failure::system, "fallocate", errno, path_);
    }
}

void File::truncate(uint64_t size) const {
    if (::ftruncate(buffered_.get(), static_cast<off_t>(size)) != 0)
        throw Error(Failure::system, "ftruncate", errno, path_);
}

void File::sync() const {
    if (::fsync(buffered_.get()) != 0) throw Error(Failure::system, "fsync", errno, path_);
}

}  // namespace flashd
