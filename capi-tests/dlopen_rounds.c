/* A thousand rounds of dlopen and dlclose: nothing grows, the library is begun once, and what one
 * round left open works in the last. RUN: dlopen */
#include "test.h"
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>

static int count(const char *dir)
{
    int n = 0;
    DIR *d = opendir(dir);
    CHECK(d != NULL);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Where the library is mapped, and how many mappings there are in all. */
static unsigned long mapped(int *lines)
{
    static char line[8192];
    unsigned long at = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    CHECK(f != NULL);
    *lines = 0;
    while (fgets(line, sizeof line, f)) {
        ++*lines;
        if (!at && strstr(line, "/libqblk.so.1"))
            at = strtoul(line, NULL, 16);
    }
    fclose(f);
    return at;
}

static void *symbol(void *lib, const char *name)
{
    void *p = dlsym(lib, name);
    CHECK(p != NULL);
    return p;
}
#define FIND(var, name) \
    do { \
        void *p_ = symbol(lib, name); \
        memcpy(&var, &p_, sizeof p_); \
    } while (0)

static int (*open_)(const char *, uint32_t, qblk **);
static int (*pwrite_)(qblk *, const void *, size_t, uint64_t);
static int (*pread_)(qblk *, void *, size_t, uint64_t);
static int (*close_)(qblk *);

static void *round_(void *arg)
{
    qblk *dev;
    char buf[4];
    void *lib = dlopen("libqblk.so.1", RTLD_NOW | RTLD_LOCAL);
    CHECK(lib != NULL);
    FIND(open_, "qblk_open");
    FIND(pwrite_, "qblk_pwrite");
    FIND(pread_, "qblk_pread");
    FIND(close_, "qblk_close");
    CHECK_INT(open_("mem:1M", QBLK_OPEN_RDWR, &dev), 0);
    CHECK_INT(pwrite_(dev, "abcd", 4, 5), 0);
    CHECK_INT(pread_(dev, buf, 4, 5), 0);
    CHECK_MEM(buf, "abcd", 4);
    CHECK_INT(open_("missing", 0, (qblk **)&arg), -ENOENT);
    CHECK_INT(close_(dev), 0);
    CHECK_INT(dlclose(lib), 0);
    return NULL;
}

int main(int argc, char **argv)
{
    int lines, more, rounds = quick() ? 100 : 1000;
    qblk *kept;
    char buf[4];
    (void)argc;
    test_begin(argv);

    round_(NULL);
    unsigned long at = mapped(&lines);
    CHECK(at != 0);
    CHECK_INT(open_("mem:1M", QBLK_OPEN_RDWR, &kept), 0);
    CHECK_INT(pwrite_(kept, "kept", 4, 99), 0);
    for (int i = 0; i < 10; i++)
        round_(NULL);
    mapped(&lines);
    const int fds = count("/proc/self/fd"), threads = count("/proc/self/task");

    for (int i = 0; i < rounds; i++) {
        if (i % 10 == 0) {
            pthread_t t;
            CHECK_INT(pthread_create(&t, NULL, round_, NULL), 0);
            CHECK_INT(pthread_join(t, NULL), 0);
        } else {
            round_(NULL);
        }
        /* It stays where it is, so it was begun once. */
        if (i % 100 == 0)
            CHECK(mapped(&more) == at);
    }
    CHECK(mapped(&more) == at);
    CHECK_INT(count("/proc/self/fd"), fds);
    CHECK_INT(count("/proc/self/task"), threads);
    /* The C library may map some for threads; the library must not for each round. */
    CHECK(more < lines + 20);
    CHECK_INT(pread_(kept, buf, 4, 99), 0);
    CHECK_MEM(buf, "kept", 4);
    CHECK_INT(close_(kept), 0);
    return 0;
}
