/*
 * What the test programs share: checks that say what was expected and what was found, a fresh
 * directory to work in, and short ways to open and create with options.
 *
 * Valid as C99 and as C++11, for each program is compiled as both.
 */
#ifndef QBLK_TEST_H
#define QBLK_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <qblk.h>

static inline void test_end_(void);

/* _exit: a failed check in a thread must not wait for the others, nor hide behind exit handlers. The
 * directory goes all the same, unless QBLK_TEST_KEEP is set. */
#define FAIL_(...) \
    do { \
        fflush(stdout); \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
        fprintf(stderr, __VA_ARGS__); \
        fputc('\n', stderr); \
        if (!getenv("QBLK_TEST_KEEP")) \
            test_end_(); \
        _exit(1); \
    } while (0)

#define CHECK(cond) \
    do { \
        if (!(cond)) \
            FAIL_("expected: %s", #cond); \
    } while (0)

#define CHECK_INT(expr, want) \
    do { \
        long long found_ = (long long)(expr), want_ = (long long)(want); \
        if (found_ != want_) \
            FAIL_("%s: expected %lld, found %lld", #expr, want_, found_); \
    } while (0)

#define CHECK_STR(expr, want) \
    do { \
        const char *found_ = (expr), *want_ = (want); \
        if (strcmp(found_, want_) != 0) \
            FAIL_("%s: expected \"%s\", found \"%s\"", #expr, want_, found_); \
    } while (0)

#define CHECK_HAS(expr, part) \
    do { \
        const char *found_ = (expr), *part_ = (part); \
        if (!strstr(found_, part_)) \
            FAIL_("%s: expected a text with \"%s\", found \"%s\"", #expr, part_, found_); \
    } while (0)

#define CHECK_MEM(found, want, n) \
    do { \
        size_t at_ = differs((found), (want), (n)); \
        if (at_ != SIZE_MAX) \
            FAIL_("%s: byte %zu of %zu: expected 0x%02x, found 0x%02x", #found, at_, (size_t)(n), \
                  ((const unsigned char *)(want))[at_], ((const unsigned char *)(found))[at_]); \
    } while (0)

/* A call that succeeds: it answers 0 and leaves no error text. */
#define OK(expr) \
    do { \
        long long rc_ = (long long)(expr); \
        if (rc_ != 0) \
            FAIL_("%s: expected 0, found %lld (%s)", #expr, rc_, qblk_get_error()); \
        CHECK_STR(qblk_get_error(), ""); \
    } while (0)

/* A call that fails with a code; the text begins with the function's name and has `part` in it. */
#define FAILS(expr, want, part) \
    do { \
        long long rc_ = (long long)(expr), want_ = (long long)(want); \
        if (rc_ != want_) \
            FAIL_("%s: expected %lld, found %lld (%s)", #expr, want_, rc_, qblk_get_error()); \
        CHECK(begins_with_a_function(qblk_get_error())); \
        CHECK_HAS(qblk_get_error(), part); \
    } while (0)

static inline size_t differs(const void *a, const void *b, size_t n)
{
    const unsigned char *x = (const unsigned char *)a, *y = (const unsigned char *)b;
    if (memcmp(a, b, n) == 0)
        return SIZE_MAX;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i])
            return i;
    return SIZE_MAX;
}

static inline int begins_with_a_function(const char *text)
{
    size_t n = strspn(text, "abcdefghijklmnopqrstuvwxyz_0123456789");
    return strncmp(text, "qblk_", 5) == 0 && n > 5 && text[n] == ':' && text[n + 1] == ' ';
}

/* Whether to do less, because a tool makes all slow. */
static inline int quick(void)
{
    return getenv("QBLK_TEST_QUICK") != NULL;
}

/* --- a place to work in ------------------------------------------------------------------- */

static char test_dir_[PATH_MAX];
static char test_self_[PATH_MAX];
static pid_t test_pid_;

static inline int test_remove_(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st, (void)kind, (void)ftw;
    remove(path);
    return 0;
}

static inline void test_end_(void)
{
    if (getpid() == test_pid_ && chdir("/") == 0)
        nftw(test_dir_, test_remove_, 16, FTW_DEPTH | FTW_PHYS);
}

/* Make a directory of our own the current one; it goes when the program ends. */
static inline void test_begin(char **argv)
{
    const char *tmp = getenv("TMPDIR");
    CHECK(realpath(argv[0], test_self_) != NULL);
    snprintf(test_dir_, sizeof test_dir_, "%s/qblk-test-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    CHECK(mkdtemp(test_dir_) != NULL);
    CHECK_INT(chdir(test_dir_), 0);
    CHECK_INT(chmod(test_dir_, 0755), 0);
    test_pid_ = getpid();
    CHECK_INT(atexit(test_end_), 0);
}

/* Run this program again with two arguments: its wait status. */
static inline int run_self(const char *what, const char *arg)
{
    int status;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        execl(test_self_, test_self_, what, arg, (char *)NULL);
        _exit(127);
    }
    CHECK_INT(waitpid(pid, &status, 0), pid);
    return status;
}

/* Run a command: its exit status. */
static inline int sh(const char *format, ...)
{
    char command[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    int status = system(command);
    CHECK(status != -1 && WIFEXITED(status));
    return WEXITSTATUS(status);
}

#define CHECK_SH(...) \
    do { \
        int status_ = sh(__VA_ARGS__); \
        if (status_ != 0) { \
            FAIL_("exit status %d of: %s", status_, #__VA_ARGS__); \
        } \
    } while (0)

static inline int exists(const char *name)
{
    struct stat st;
    return lstat(name, &st) == 0;
}

static inline uint64_t file_size(const char *name)
{
    struct stat st;
    CHECK_INT(stat(name, &st), 0);
    return (uint64_t)st.st_size;
}

static inline uint64_t file_blocks(const char *name)
{
    struct stat st;
    CHECK_INT(stat(name, &st), 0);
    return (uint64_t)st.st_blocks;
}

/* Make a file of `size` bytes that begins with `len` bytes of `head`. */
static inline void make_file(const char *name, const void *head, size_t len, off_t size)
{
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    CHECK_INT(ftruncate(fd, size), 0);
    CHECK_INT(pwrite(fd, head, len, 0), len);
    close(fd);
}

/* Change bytes of a file behind everyone's back. */
static inline void patch(const char *name, off_t at, const void *bytes, size_t len)
{
    int fd = open(name, O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_INT(pwrite(fd, bytes, len, at), len);
    close(fd);
}

/* --- bytes -------------------------------------------------------------------------------- */

/* Bytes that tell where they should be: never zero, different for each seed. */
static inline void fill(void *buf, size_t n, uint64_t seed)
{
    unsigned char *p = (unsigned char *)buf;
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        p[i] = (unsigned char)(x | 1);
    }
}

static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state ? *state : 88172645463325252u;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return *state = x;
}

static inline int all_zero(const void *buf, size_t n)
{
    const unsigned char *p = (const unsigned char *)buf;
    for (size_t i = 0; i < n; i++)
        if (p[i])
            return 0;
    return 1;
}

/* --- the library -------------------------------------------------------------------------- */

/* Options from pairs of key and value, ended by NULL. */
static inline qblk_options *options_list_(va_list args)
{
    qblk_options *o = NULL;
    OK(qblk_options_new(&o));
    for (const char *key; (key = va_arg(args, const char *)) != NULL;) {
        const char *value = va_arg(args, const char *);
        OK(qblk_options_set(o, key, value));
    }
    return o;
}

static inline qblk_options *options(const char *first, ...)
{
    va_list args;
    va_start(args, first);
    const char *value = first ? va_arg(args, const char *) : NULL;
    qblk_options *o = first ? options_list_(args) : NULL;
    va_end(args);
    if (first)
        OK(qblk_options_set(o, first, value));
    return o;
}

/* The calls with options that are freed right after; the last error stays what the call left. */
static inline int free_after_(int rc, qblk_options *o)
{
    qblk_options_free(o);
    return rc;
}
static inline int open_opt(const char *name, uint32_t flags, qblk **out, qblk_options *o)
{
    return free_after_(qblk_open2(name, o, flags, out), o);
}
static inline int create_opt(const char *name, const char *format, uint64_t size, qblk_options *o)
{
    return free_after_(qblk_create(name, format, size, o), o);
}

static inline qblk *must_open(const char *name, uint32_t flags)
{
    qblk *dev = NULL;
    OK(qblk_open(name, flags, &dev));
    CHECK(dev != NULL);
    return dev;
}

/* A new device to write to: "raw" and "qcow2" in a file of that name, or "mem". */
static inline qblk *new_device(const char *kind, uint64_t size)
{
    qblk *dev = NULL;
    if (strcmp(kind, "mem") == 0) {
        char name[64];
        snprintf(name, sizeof name, "mem:%llu", (unsigned long long)size);
        return must_open(name, QBLK_OPEN_RDWR);
    }
    OK(qblk_create(kind, kind, size, NULL));
    OK(open_opt(kind, QBLK_OPEN_RDWR, &dev, options("format", kind, NULL)));
    return dev;
}

static inline uint64_t device_size(qblk *dev)
{
    qblk_info info;
    OK(qblk_get_info(dev, &info));
    return info.size;
}

static const char *const KINDS[] = {"raw", "qcow2", "mem"};
#define EACH_KIND(kind) \
    for (size_t kind##_ = 0; kind##_ < 3; kind##_++) \
        for (const char *kind = KINDS[kind##_]; kind; kind = NULL)

#endif
