/* A defect inside the library, here a panic on purpose, is an error code: the program lives, stderr
 * stays silent, and only that device is lost. RUN: panic */
#include "test.h"
#include <pthread.h>

#ifdef __cplusplus
extern "C"
#endif
int qblk__test_panic(qblk *dev);

static void *in_a_thread(void *arg)
{
    qblk *dev;
    (void)arg;
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    for (int i = 0; i < 20; i++) {
        FAILS(qblk__test_panic(dev), QBLK_EINTERNAL, "internal error");
        FAILS(qblk_close(dev), QBLK_EINTERNAL, "internal error");
        OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    }
    OK(qblk_close(dev));
    return NULL;
}

int main(int argc, char **argv)
{
    char buf[512];
    qblk *dev, *context, *other, *out = NULL;
    qblk_info info;
    qblk_extent e;
    struct iovec iov = {buf, 1};
    pthread_t t[2];
    (void)argc;
    test_begin(argv);
    dev = new_device("qcow2", 1 << 20);
    OK(qblk_pwrite(dev, "safe", 4, 0));
    OK(qblk_flush(dev));
    OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &other));

    int silent = open("stderr", O_RDWR | O_CREAT | O_CLOEXEC, 0644), loud = dup(2);
    CHECK(silent >= 0 && loud >= 0);
    CHECK_INT(dup2(silent, 2), 2);
    int rc = qblk__test_panic(dev);
    CHECK_INT(dup2(loud, 2), 2);
    FAILS(rc, QBLK_EINTERNAL, "qblk__test_panic: internal error: on purpose");
    CHECK_HAS(qblk_get_error(), "data.rs:");
    CHECK_INT(file_size("stderr"), 0);

    /* The device answers so from then on, through each of its contexts. */
    qblk *handles[2] = {dev, context};
    for (int i = 0; i < 2; i++) {
        qblk *d = handles[i];
        const char *text = "earlier call";
        FAILS(qblk_pread(d, buf, 1, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_pwrite(d, buf, 1, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_preadv(d, &iov, 1, 0, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_flush(d), QBLK_EINTERNAL, text);
        FAILS(qblk_zero(d, 1, 0, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_trim(d, 1, 0, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_cache(d, 1, 0, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_get_info(d, &info), QBLK_EINTERNAL, text);
        FAILS(qblk_get_property(d, "filename", buf, 512), QBLK_EINTERNAL, text);
        FAILS(qblk_extents(d, 1, 0, 0, &e, 1), QBLK_EINTERNAL, text);
        FAILS(qblk_resize(d, 1 << 21, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_reopen(d, 0), QBLK_EINTERNAL, text);
        FAILS(qblk_context_open(d, NULL, 0, &out), QBLK_EINTERNAL, text);
        /* An argument that means nothing is still told first. */
        FAILS(qblk_pread2(d, buf, 1, 0, 1), -EINVAL, "mean nothing");
    }

    /* Others go on. */
    OK(qblk_pwrite(other, "fine", 4, 0));
    OK(qblk_pread(other, buf, 4, 0));
    CHECK_MEM(buf, "fine", 4);
    OK(qblk_close(other));
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&t[i], NULL, in_a_thread, NULL), 0);
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);

    /* Closing frees it and says why nothing was flushed; opening the image anew helps. */
    FAILS(qblk_close(context), QBLK_EINTERNAL, "earlier call");
    FAILS(qblk_close(dev), QBLK_EINTERNAL, "earlier call");
    dev = must_open("qcow2", QBLK_OPEN_RDWR);
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "safe", 4);
    OK(qblk_pwrite(dev, "more", 4, 4));
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");

    /* One that nobody closes does not stop the program's end. */
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    FAILS(qblk__test_panic(dev), QBLK_EINTERNAL, "on purpose");
    return 0;
}
