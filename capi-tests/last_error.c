/* This thread's last error: never NULL, "" after a success, the thread's own, harmless to print. */
#include "test.h"
#include <pthread.h>

static pthread_barrier_t together;

static void *other_thread(void *arg)
{
    qblk *dev;
    (void)arg;
    CHECK_STR(qblk_get_error(), "");
    FAILS(qblk_open("theirs", 0, &dev), -ENOENT, "'theirs'");
    pthread_barrier_wait(&together);
    pthread_barrier_wait(&together);
    CHECK_HAS(qblk_get_error(), "'theirs'");
    return NULL;
}

int main(int argc, char **argv)
{
    static char name[5000];
    qblk *dev, *out;
    pthread_t t;
    char c;
    (void)argc;
    test_begin(argv);

    CHECK(qblk_get_error() != NULL);
    CHECK_STR(qblk_get_error(), "");
    FAILS(qblk_open("mine", 0, &out), -ENOENT, "qblk_open: 'mine': open: No such file or directory");
    CHECK_HAS(qblk_get_error(), "'mine'");
    /* What cannot fail leaves it alone; a success clears it. */
    qblk_version(), qblk_version_string(), qblk_supports("x"), qblk_strerror(-1);
    qblk_options_free(NULL);
    CHECK_HAS(qblk_get_error(), "'mine'");
    OK(qblk_open("mem:1M", 0, &dev));
    FAILS(qblk_pread(dev, &c, 1, 1 << 20), -EINVAL, "qblk_pread: 'mem:1M': 1 bytes at offset 1048576");
    OK(qblk_pread(dev, &c, 1, 0));
    FAILS(qblk_pwritev(dev, NULL, -5, 0, 0), -EINVAL, "qblk_pwritev: ");
    OK(qblk_close(NULL));
    /* It outlives the handle. */
    FAILS(qblk_pwrite(dev, &c, 1, 0), -EROFS, "qblk_pwrite: 'mem:1M'");
    int64_t n = qblk_get_property(dev, "filename", NULL, 0);
    CHECK_INT(n, 6);
    CHECK_STR(qblk_get_error(), "");
    OK(qblk_close(dev));

    /* Each thread has its own. */
    CHECK_INT(pthread_barrier_init(&together, NULL, 2), 0);
    CHECK_INT(pthread_create(&t, NULL, other_thread, NULL), 0);
    pthread_barrier_wait(&together);
    FAILS(qblk_open("mine", 0, &out), -ENOENT, "'mine'");
    pthread_barrier_wait(&together);
    CHECK_INT(pthread_join(t, NULL), 0);
    CHECK_HAS(qblk_get_error(), "'mine'");

    /* Names are quoted, what could steer a terminal is escaped, and their length is bounded. */
    FAILS(qblk_open("a\nb\x1b[31m\x7f\xff'", 0, &out), -ENOENT, "'a\\nb\\u{1b}[31m\\u{7f}\\xff\\''");
    for (const char *p = qblk_get_error(); *p; p++)
        CHECK((unsigned char)*p >= ' ' && (unsigned char)*p < 0x7f);
    memset(name, 'x', sizeof name - 1);
    FAILS(qblk_open(name, 0, &out), -ENAMETOOLONG, "'xxx");
    CHECK(strlen(qblk_get_error()) < 400);
    /* Many such in one text: it is cut, between characters, and ends with a NUL. */
    for (size_t i = 0; i + 2 < sizeof name; i += 3)
        memcpy(name + i, "\xe2\x82\xac", 3);
    name[255] = 0;
    qblk_options *o = options(name, "x", NULL);
    FAILS(qblk_open2("mem:1M", o, 0, &out), -EINVAL, "option");
    CHECK(strlen(qblk_get_error()) < 1024);
    qblk_options_free(o);
    return 0;
}
