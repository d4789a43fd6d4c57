// SPDX-License-Identifier: Apache-2.0
// Counts the mutating system calls below one folder, and kills the process or
// fails the call at a chosen one.
//
// LD_PRELOAD this. FAULTS_ROOT is the folder; FAULTS_CONTROL is a file of 4096
// bytes that holds `struct control`, which the campaign (faults.py) maps and
// writes while the process runs. Syncs are counted and not carried out: the
// campaign kills processes, not machines.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL_BEFORE, KILL_AFTER, FAIL_ONCE, FAIL_FROM_THERE };

struct control {
  atomic_int armed;
  atomic_int at; // the number of the call, from 1
  atomic_int action;
  atomic_int error;
  atomic_int count;
  atomic_int hits;
  atomic_int syncs_only; // whether other calls count
  atomic_int unused;
  char last[256]; // the call at which something was done
};

static struct control *control;
static char root[PATH_MAX];
static size_t root_length;

__attribute__((constructor)) static void start(void) {
  const char *path = getenv("FAULTS_CONTROL"), *folder = getenv("FAULTS_ROOT");
  if (!path || !folder)
    return;
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0)
    return;
  void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED)
    return;
  root_length = (size_t)snprintf(root, sizeof root, "%s", folder);
  control = mapped;
}

static int is_armed(void) { return control && atomic_load(&control->armed); }

static int is_below(const char *path) {
  return strncmp(path, root, root_length) == 0 &&
         (path[root_length] == '/' || path[root_length] == '\0');
}

static int name_of(int fd, char *into) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, into, PATH_MAX - 1);
  into[length < 0 ? 0 : length] = '\0';
  return length >= 0;
}

static void full_name(int folder, const char *path, char *into) {
  char base[PATH_MAX] = "";
  if (path[0] == '/' || folder == AT_FDCWD || !name_of(folder, base))
    snprintf(into, PATH_MAX, "%s", path);
  else
    snprintf(into, PATH_MAX, "%.2000s/%.2000s", base, path);
}

// -1: fail with the errno that is set; 1: kill after the call; 0: continue.
static int gate(const char *call, const char *path, const char *other) {
  if (!is_below(path) && !(other && is_below(other)))
    return 0;
  if (atomic_load(&control->syncs_only) && strcmp(call, "fsync") != 0)
    return 0;
  int number = atomic_fetch_add(&control->count, 1) + 1;
  int at = atomic_load(&control->at), action = atomic_load(&control->action);
  if (action == COUNT ||
      (action == FAIL_FROM_THERE ? number < at : number != at))
    return 0;
  snprintf(control->last, sizeof control->last, "%s %.200s", call,
           is_below(path) ? path + root_length : path);
  atomic_fetch_add(&control->hits, 1);
  if (action == KILL_BEFORE) {
    kill(getpid(), SIGKILL);
    pause();
  }
  if (action == KILL_AFTER)
    return 1;
  errno = atomic_load(&control->error);
  return -1;
}

static void done(int gated) {
  if (gated == 1) {
    kill(getpid(), SIGKILL);
    pause();
  }
}

#define REAL(type, name, ...)                                                  \
  static type (*real)(__VA_ARGS__);                                            \
  if (!real)                                                                   \
  *(void **)&real = dlsym(RTLD_NEXT, name)

// Runs the call between `gate` and `done`, keeping its errno.
#define CALL(type, expression)                                                 \
  type result = (expression);                                                  \
  int saved = errno;                                                           \
  done(gated);                                                                 \
  errno = saved;                                                               \
  return result

static int gate_at(const char *call, int folder, const char *path) {
  if (!is_armed())
    return 0;
  char name[PATH_MAX];
  full_name(folder, path, name);
  return gate(call, name, NULL);
}

static int gate_fd(const char *call, int fd) {
  if (!is_armed())
    return 0;
  char name[PATH_MAX];
  return name_of(fd, name) ? gate(call, name, NULL) : 0;
}

static int gate_two(const char *call, int folder, const char *path,
                    int other_folder, const char *other) {
  if (!is_armed())
    return 0;
  char name[PATH_MAX], other_name[PATH_MAX];
  full_name(folder, path, name);
  full_name(other_folder, other, other_name);
  return gate(call, name, other_name);
}

#define TWO_PATHS(function, name, kind)                                        \
  int function(const char *from, const char *to) {                             \
    REAL(int, name, const char *, const char *);                               \
    int gated = gate_two(kind, AT_FDCWD, from, AT_FDCWD, to);                  \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(from, to));                                                 \
  }
TWO_PATHS(rename, "rename", "rename")
TWO_PATHS(link, "link", "link")

int renameat(int a, const char *from, int b, const char *to) {
  REAL(int, "renameat", int, const char *, int, const char *);
  int gated = gate_two("rename", a, from, b, to);
  if (gated < 0)
    return -1;
  CALL(int, real(a, from, b, to));
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  int gated = gate_two(flags ? "exchange" : "rename", a, from, b, to);
  if (gated < 0)
    return -1;
  CALL(int, (int)syscall(SYS_renameat2, a, from, b, to, flags));
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
  REAL(int, "linkat", int, const char *, int, const char *, int);
  int gated = gate_two("link", a, from, b, to);
  if (gated < 0)
    return -1;
  CALL(int, real(a, from, b, to, flags));
}

int symlink(const char *target, const char *path) {
  REAL(int, "symlink", const char *, const char *);
  int gated = gate_at("symlink", AT_FDCWD, path);
  if (gated < 0)
    return -1;
  CALL(int, real(target, path));
}

#define ONE_PATH(function, name)                                               \
  int function(const char *path) {                                             \
    REAL(int, name, const char *);                                             \
    int gated = gate_at(name, AT_FDCWD, path);                                 \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(path));                                                     \
  }
ONE_PATH(unlink, "unlink")
ONE_PATH(rmdir, "rmdir")

int unlinkat(int folder, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  int gated = gate_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path);
  if (gated < 0)
    return -1;
  CALL(int, real(folder, path, flags));
}

#define PATH_AND_MODE(function, name)                                          \
  int function(const char *path, mode_t mode) {                                \
    REAL(int, name, const char *, mode_t);                                     \
    int gated = gate_at(name, AT_FDCWD, path);                                 \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(path, mode));                                               \
  }
PATH_AND_MODE(mkdir, "mkdir")
PATH_AND_MODE(chmod, "chmod")

int truncate(const char *path, off_t length) {
  REAL(int, "truncate", const char *, off_t);
  int gated = gate_at("truncate", AT_FDCWD, path);
  if (gated < 0)
    return -1;
  CALL(int, real(path, length));
}

int utimensat(int folder, const char *path, const struct timespec times[2],
              int flags) {
  REAL(int, "utimensat", int, const char *, const struct timespec *, int);
  int gated = gate_at("utime", folder, path);
  if (gated < 0)
    return -1;
  CALL(int, real(folder, path, times, flags));
}

#define MUTATES(flags)                                                         \
  ((flags) & (O_CREAT | O_TRUNC) || ((flags) & O_ACCMODE) != O_RDONLY)
#define MODE_OF(flags)                                                         \
  mode_t mode = 0;                                                             \
  if ((flags) & (O_CREAT | O_TMPFILE)) {                                       \
    va_list rest;                                                              \
    va_start(rest, flags);                                                     \
    mode = va_arg(rest, mode_t);                                               \
    va_end(rest);                                                              \
  }

#define OPEN(function, name)                                                   \
  int function(const char *path, int flags, ...) {                             \
    MODE_OF(flags)                                                             \
    REAL(int, name, const char *, int, ...);                                   \
    int gated = MUTATES(flags) ? gate_at("open", AT_FDCWD, path) : 0;          \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(path, flags, mode));                                        \
  }
OPEN(open, "open")
OPEN(open64, "open64")

#define OPENAT(function, name)                                                 \
  int function(int folder, const char *path, int flags, ...) {                 \
    MODE_OF(flags)                                                             \
    REAL(int, name, int, const char *, int, ...);                              \
    int gated = MUTATES(flags) ? gate_at("open", folder, path) : 0;            \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(folder, path, flags, mode));                                \
  }
OPENAT(openat, "openat")
OPENAT(openat64, "openat64")

// A process killed during a write has written half of the data.
#define SHORTENED(length) (gated == 1 && (length) > 1 ? (length) / 2 : (length))

ssize_t write(int fd, const void *from, size_t length) {
  REAL(ssize_t, "write", int, const void *, size_t);
  int gated = fd > 2 ? gate_fd("write", fd) : 0;
  if (gated < 0)
    return -1;
  CALL(ssize_t, real(fd, from, SHORTENED(length)));
}

#define PWRITE(function, name)                                                 \
  ssize_t function(int fd, const void *from, size_t length, off_t offset) {    \
    REAL(ssize_t, name, int, const void *, size_t, off_t);                     \
    int gated = gate_fd("write", fd);                                          \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(ssize_t, real(fd, from, SHORTENED(length), offset));                  \
  }
PWRITE(pwrite, "pwrite")
PWRITE(pwrite64, "pwrite64")

#define TRUNCATE(function, name)                                               \
  int function(int fd, off_t length) {                                         \
    REAL(int, name, int, off_t);                                               \
    int gated = gate_fd("truncate", fd);                                       \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(fd, length));                                               \
  }
TRUNCATE(ftruncate, "ftruncate")
TRUNCATE(ftruncate64, "ftruncate64")

#define FALLOCATE(function, name)                                              \
  int function(int fd, int mode, off_t offset, off_t length) {                 \
    REAL(int, name, int, int, off_t, off_t);                                   \
    int gated = gate_fd("fallocate", fd);                                      \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, real(fd, mode, offset, length));                                 \
  }
FALLOCATE(fallocate, "fallocate")
FALLOCATE(fallocate64, "fallocate64")

int fchmod(int fd, mode_t mode) {
  REAL(int, "fchmod", int, mode_t);
  int gated = gate_fd("chmod", fd);
  if (gated < 0)
    return -1;
  CALL(int, real(fd, mode));
}

#define SYNC(function)                                                         \
  int function(int fd) {                                                       \
    int gated = gate_fd("fsync", fd);                                          \
    if (gated < 0)                                                             \
      return -1;                                                               \
    CALL(int, 0);                                                              \
  }
SYNC(fsync)
SYNC(fdatasync)
