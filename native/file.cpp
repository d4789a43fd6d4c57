// SPDX-License-Identifier: Apache-2.0
#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

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
        direct_refused_ = "O_DIRECT was not asked for";
        return;
    }
    const std::string self = "/proc/self/fd/" + std::to_string(buffered_.get());
    const int mode = access == Access::read ? O_RDONLY : O_RDWR;
    direct_ = UniqueFd(::open(self.c_str(), mode | O_DIRECT | O_CLOEXEC));
    if (!direct_) direct_refused_ = std::string("O_DIRECT refused: ") + std::strerror(errno);
}

int File::descriptor(uint64_t offset, uint64_t length, const void* address) const {
    const bool aligned = ((offset | length | reinterpret_cast<uintptr_t>(address)) & (alignment - 1)) == 0;
    return direct_ && aligned ? direct_.get() : buffered_.get();
}

void File::give_up_direct(const char* reason) {
    direct_ = UniqueFd();
    direct_refused_ = std::string("O_DIRECT refused: ") + reason;
}

uint64_t File::size() const {
    struct stat status{};
    if (::fstat(buffered_.get(), &status) != 0) throw Error(Failure::system, "fstat", errno, path_);
    return static_cast<uint64_t>(status.st_size);
}

void File::preallocate(uint64_t size) const {
    // Not every file system can (tmpfs can, FUSE may not); writing then finds out about a full disk by itself.
    if (size > 0 && ::fallocate(buffered_.get(), 0, 0, static_cast<off_t>(size)) != 0 && errno != EOPNOTSUPP)
        throw Error(Failure::system, "fallocate", errno, path_, size);
}

void File::truncate(uint64_t size) const {
    if (::ftruncate(buffered_.get(), static_cast<off_t>(size)) != 0)
        throw Error(Failure::system, "ftruncate", errno, path_, size);
}

void File::sync() const {
    if (::fsync(buffered_.get()) != 0) throw Error(Failure::system, "fsync", errno, path_);
}

}  // namespace flashd
