/* Faults at writes: preloaded before libc, it counts every operation that changes files below one folder, in whatever
   library it is done, and at a chosen one kills the process (before it, or when half of the bytes are written) or lets
   it and all that follow fail. It does nothing until faults_arm is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_WITHIN, FULL, READ_ONLY };
enum { NORMAL, HALF_AND_KILL, HALF, REFUSE };

/* Shared with the process that watches: how many operations there were, and what they were, a line each. */
struct seen { long count; long used; char log[]; };

static struct seen *seen;
static char below[PATH_MAX];
static size_t below_length, log_size;
static long chosen;
static int mode;
static __thread int inside;

void faults_arm(const char *folder, int how, long at, struct seen *shared, size_t size) {
    below_length = strlen(strcpy(below, folder));
    mode = how, chosen = at, log_size = size - sizeof(struct seen);
    seen = shared;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* What becomes of an operation. grows: it needs room on the disk. A full disk lets the others pass. */
static int fate(const char *operation, const char *path, int grows) {
    long index = __atomic_add_fetch(&seen->count, 1, __ATOMIC_SEQ_CST);
    if (mode == COUNT) {
        long left = (long)log_size - seen->used;
        int n = snprintf(seen->log + seen->used, left > 0 ? left : 0, "%s%s %s\n", operation, grows ? "+" : "", path + below_length);
        if (n > 0 && n < left) seen->used += n;
        return NORMAL;
    }
    if (index == chosen && mode == KILL_BEFORE) die();
    if (index == chosen && mode == KILL_WITHIN) return HALF_AND_KILL;
    if (index < chosen || mode == KILL_BEFORE || mode == KILL_WITHIN) return NORMAL;
    if (mode == FULL && !grows) return NORMAL;
    errno = mode == FULL ? ENOSPC : EROFS;
    return mode == FULL && index == chosen ? HALF : REFUSE;
}

/* Whether a path lies below the folder; `full` then has it whole. */
static int ours_at(int folder, const char *path, char *full) {
    if (!seen || inside || !path) return 0;
    int saved = errno;
    char link[64];
    ssize_t n = 0;
    if (path[0] == '/') { n = 0; full[0] = 0; }
    else if (folder == AT_FDCWD) { if (!getcwd(full, PATH_MAX)) return 0; n = strlen(full); }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        n = readlink(link, full, PATH_MAX - 1);
        if (n < 0) { errno = saved; return 0; }
        full[n] = 0;
    }
    if (path[0] && n) full[n++] = '/';
    snprintf(full + n, PATH_MAX - n, "%s", path);
    errno = saved;
    return strncmp(full, below, below_length) == 0 && full[below_length] == '/';
}

static int ours(int file, char *full) { return ours_at(file, "", full); }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* An operation that is done or not, and changes a path. */
#define WHOLE(operation, folder, path, grows, call) do { \
    char full[PATH_MAX]; \
    if (!ours_at(folder, path, full)) return call; \
    int what = fate(operation, full, grows); \
    if (what == HALF || what == REFUSE) return -1; \
    int done = call; \
    if (what == HALF_AND_KILL) die(); \
    return done; } while (0)

#define OPENED(folder, path, flags, call) do { \
    char full[PATH_MAX]; struct stat about; \
    if (!ours_at(folder, path, full)) return call; \
    int there = lstat(full, &about) == 0; \
    int changes = (flags & O_TRUNC) || ((flags & O_CREAT) && !there); \
    if (!changes && !(mode == READ_ONLY && (flags & O_ACCMODE) != O_RDONLY)) return call; \
    if (!changes) { if (seen->count < chosen) return call; errno = EROFS; return -1; } \
    int what = fate("open", full, !there); \
    if (what == HALF || what == REFUSE) return -1; \
    int done = call; \
    if (what == HALF_AND_KILL) die(); \
    return done; } while (0)

#define MODE(flags) mode_t bits = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); \
    bits = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) { REAL(open); MODE(flags); OPENED(AT_FDCWD, path, flags, real(path, flags, bits)); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE(flags); OPENED(AT_FDCWD, path, flags, real(path, flags, bits)); }
int openat(int at, const char *path, int flags, ...) { REAL(openat); MODE(flags); OPENED(at, path, flags, real(at, path, flags, bits)); }
int openat64(int at, const char *path, int flags, ...) { REAL(openat64); MODE(flags); OPENED(at, path, flags, real(at, path, flags, bits)); }

static int flags_of(const char *how) {
    int flags = strchr(how, '+') ? O_RDWR : how[0] == 'r' ? O_RDONLY : O_WRONLY;
    return flags | (how[0] == 'w' ? O_CREAT | O_TRUNC : how[0] == 'a' ? O_CREAT : 0);
}
#define FOPENED(path, how, call) do { \
    char full[PATH_MAX]; struct stat about; int flags = flags_of(how); \
    if (!ours_at(AT_FDCWD, path, full) || !(flags & O_CREAT)) return call; \
    int there = lstat(full, &about) == 0; \
    int what = fate("open", full, !there); \
    if (what == HALF || what == REFUSE) return NULL; \
    FILE *done = call; \
    if (what == HALF_AND_KILL) die(); \
    return done; } while (0)
FILE *fopen(const char *path, const char *how) { REAL(fopen); FOPENED(path, how, real(path, how)); }
FILE *fopen64(const char *path, const char *how) { REAL(fopen64); FOPENED(path, how, real(path, how)); }

/* Bytes written. half: the call with half of them. */
#define BYTES(file, whole, half) do { \
    char full[PATH_MAX]; \
    if (!ours(file, full)) return whole; \
    int what = fate("write", full, 1); \
    if (what == NORMAL) return whole; \
    if (what == REFUSE) return -1; \
    int saved = errno; \
    inside = 1; ssize_t done = half; inside = 0; \
    if (what == HALF_AND_KILL) die(); \
    if (done <= 0) { errno = saved; return -1; } \
    return done; } while (0)

ssize_t write(int file, const void *data, size_t n) { REAL(write); BYTES(file, real(file, data, n), n / 2 ? real(file, data, n / 2) : 0); }
ssize_t pwrite(int file, const void *data, size_t n, off_t at) { REAL(pwrite); BYTES(file, real(file, data, n, at), n / 2 ? real(file, data, n / 2, at) : 0); }
ssize_t pwrite64(int file, const void *data, size_t n, off64_t at) { REAL(pwrite64); BYTES(file, real(file, data, n, at), n / 2 ? real(file, data, n / 2, at) : 0); }
ssize_t writev(int file, const struct iovec *parts, int n) { REAL(writev); BYTES(file, real(file, parts, n), write(file, parts[0].iov_base, parts[0].iov_len / 2)); }
ssize_t sendfile(int to, int from, off_t *at, size_t n) { REAL(sendfile); BYTES(to, real(to, from, at, n), n / 2 ? real(to, from, at, n > 1 << 20 ? 512 : n / 2) : 0); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) { REAL(sendfile64); BYTES(to, real(to, from, at, n), n / 2 ? real(to, from, at, n > 1 << 20 ? 512 : n / 2) : 0); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) { REAL(copy_file_range); BYTES(to, real(from, a, to, b, n, flags), n / 2 ? real(from, a, to, b, n > 1 << 20 ? 512 : n / 2, flags) : 0); }

/* C streams write inside libc, where nothing is seen of it: numpy writes arrays so. */
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    REAL(fwrite);
    char full[PATH_MAX];
    if (!seen || inside || !ours(fileno(file), full)) return real(data, size, n, file);
    int what = fate("write", full, 1);
    if (what == NORMAL) return real(data, size, n, file);
    if (what == REFUSE) return 0;
    int saved = errno;
    inside = 1; size_t done = real(data, size, n / 2, file); fflush(file); inside = 0;
    if (what == HALF_AND_KILL) die();
    errno = saved;
    return done;
}

int rename(const char *from, const char *to) { REAL(rename); WHOLE("rename", AT_FDCWD, to, 0, real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); WHOLE("rename", b, to, 0, real(a, from, b, to)); }
int link(const char *from, const char *to) { REAL(link); WHOLE("link", AT_FDCWD, to, 1, real(from, to)); }
int symlink(const char *from, const char *to) { REAL(symlink); WHOLE("link", AT_FDCWD, to, 1, real(from, to)); }
int unlink(const char *path) { REAL(unlink); WHOLE("remove", AT_FDCWD, path, 0, real(path)); }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); WHOLE("remove", at, path, 0, real(at, path, flags)); }
int rmdir(const char *path) { REAL(rmdir); WHOLE("remove", AT_FDCWD, path, 0, real(path)); }
int mkdir(const char *path, mode_t bits) { REAL(mkdir); WHOLE("mkdir", AT_FDCWD, path, 1, real(path, bits)); }
int mkdirat(int at, const char *path, mode_t bits) { REAL(mkdirat); WHOLE("mkdir", at, path, 1, real(at, path, bits)); }
int truncate(const char *path, off_t n) { REAL(truncate); WHOLE("truncate", AT_FDCWD, path, 0, real(path, n)); }
int truncate64(const char *path, off64_t n) { REAL(truncate64); WHOLE("truncate", AT_FDCWD, path, 0, real(path, n)); }
int ftruncate(int file, off_t n) { REAL(ftruncate); WHOLE("truncate", file, "", 1, real(file, n)); }
int ftruncate64(int file, off64_t n) { REAL(ftruncate64); WHOLE("truncate", file, "", 1, real(file, n)); }
int fsync(int file) { REAL(fsync); WHOLE("sync", file, "", 0, real(file)); }
int fdatasync(int file) { REAL(fdatasync); WHOLE("sync", file, "", 0, real(file)); }
