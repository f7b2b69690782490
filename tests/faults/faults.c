/* Fails or kills the process at the n-th change of a file whose path holds a text: loaded with LD_PRELOAD, armed by
 * fault_arm(directory, n, kind). Kinds: 0 kills before the change; -1 makes half of a write and kills; -2 lets it take 8 seconds; others are the errno
 * that this change and all later ones report. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[4096];
static volatile long at, seen;
static int what;

void fault_arm(const char *directory, long n, int kind) {
    strncpy(under, directory, sizeof under - 1);
    seen = 0;
    what = kind;
    at = n;
}

long fault_seen(void) { return seen; }

/* A program that does not arm itself: FAULT="directory n kind"; every process of it counts for itself. */
__attribute__((constructor)) static void from_environment(void) {
    char directory[4096];
    long n;
    int kind;
    const char *told = getenv("FAULT");
    if (told && sscanf(told, "%4095s %ld %d", directory, &n, &kind) == 3) fault_arm(directory, n, kind);
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, size - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return 1;
}

/* 1 where the change has to fail with errno set; does not return where the process dies. */
static int hit(int fd, const char *path) {
    char full[8192] = "";
    if (!at) return 0;
    if (!path || path[0] != '/') {
        if (fd == AT_FDCWD || !path_of(fd, full, 4096)) return 0;
        if (path) strcat(strcat(full, "/"), path);
    } else
        strncpy(full, path, sizeof full - 1);
    if (!strstr(full, under)) return 0;
    const long now = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (now < at) return 0;
    if (what == -2) {
        if (now == at) sleep(8);
        return 0;
    }
    if (what <= 0) {
        if (now == at && what == 0) kill(getpid(), SIGKILL);
        return what;
    }
    errno = what;
    return 1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    const int how = hit(fd, NULL);
    if (how > 0) return -1;
    if (how < 0) {
        real(fd, data, n / 2);
        kill(getpid(), SIGKILL);
    }
    return real(fd, data, n);
}

#define SIMPLE(type, name, params, fd, path, ...) \
    type name params {                            \
        REAL(name);                               \
        const int how = hit(fd, path);            \
        if (how < 0) kill(getpid(), SIGKILL);     \
        return how ? -1 : real(__VA_ARGS__);      \
    }

SIMPLE(ssize_t, writev, (int fd, const struct iovec *v, int n), fd, NULL, fd, v, n)
SIMPLE(int, fsync, (int fd), fd, NULL, fd)
SIMPLE(int, ftruncate, (int fd, off_t n), fd, NULL, fd, n)
SIMPLE(int, rename, (const char *a, const char *b), AT_FDCWD, a, a, b)
SIMPLE(int, renameat, (int f, const char *a, int g, const char *b), f, a, f, a, g, b)
SIMPLE(int, unlink, (const char *a), AT_FDCWD, a, a)
SIMPLE(int, unlinkat, (int f, const char *a, int flags), f, a, f, a, flags)
SIMPLE(int, rmdir, (const char *a), AT_FDCWD, a, a)
SIMPLE(int, mkdir, (const char *a, mode_t m), AT_FDCWD, a, a, m)
