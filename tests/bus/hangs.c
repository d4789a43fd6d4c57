/* SPDX-License-Identifier: Apache-2.0
 * Preloaded: reads of weights hang, as they do where a disk or a file server has gone, while a file is there. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static ssize_t hang(int fd, void *address, size_t length, off_t offset) {
    while (length > 65536 && access(getenv("HANGS_WHILE"), F_OK) == 0) usleep(10000);
    return syscall(SYS_pread64, fd, address, length, offset);
}
ssize_t pread(int fd, void *address, size_t length, off_t offset) { return hang(fd, address, length, offset); }
ssize_t pread64(int fd, void *address, size_t length, off_t offset) { return hang(fd, address, length, offset); }
