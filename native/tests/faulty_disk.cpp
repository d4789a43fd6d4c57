// SPDX-License-Identifier: Apache-2.0
#include "faulty_disk.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

FaultyDisk& faulty_disk() {
    static FaultyDisk disk;
    return disk;
}

namespace {

ssize_t move(long call, int fd, void* address, size_t length, off_t offset) {
    FaultyDisk& disk = faulty_disk();
    const unsigned number = ++disk.calls;
    if (disk.interrupted > 0) {
        --disk.interrupted;
        errno = EINTR;
        return -1;
    }
    if (disk.error != 0) {
        errno = disk.error;
        return -1;
    }
    const bool direct = (::fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    if (direct && disk.refuses_direct) {
        ::usleep(2000);  // long enough for other threads to be refused as well
        errno = EINVAL;
        return -1;
    }
    ssize_t moved = ::syscall(call, fd, address, length, offset);
    // Like a signal or a full socket: fewer bytes than requested, at least one, in no particular alignment. Bytes moved
    // beyond them are moved again.
    if (disk.short_results && moved > 1) moved = std::max<ssize_t>(1, moved * (number % 7) / 8 + 1);
    return moved;
}

}  // namespace

extern "C" ssize_t pread(int fd, void* address, size_t length, off_t offset) {
    return move(SYS_pread64, fd, address, length, offset);
}

extern "C" ssize_t pwrite(int fd, const void* address, size_t length, off_t offset) {
    return move(SYS_pwrite64, fd, const_cast<void*>(address), length, offset);
}
