/* The open policy: what an image may bring with it, and what a guest may not turn a disk into. */
#include "test.h"

#define OPEN_FAILS(name, flags, opts, code, part) \
    do { \
        qblk *dev_ = NULL; \
        FAILS(open_opt((name), (flags), &dev_, (opts)), (code), (part)); \
        CHECK(dev_ == NULL); \
    } while (0)
#define OPENS(name, flags, opts) \
    do { \
        qblk *dev_ = NULL; \
        OK(open_opt((name), (flags), &dev_, (opts))); \
        OK(qblk_close(dev_)); \
    } while (0)

static void untrusted(void)
{
    OK(qblk_create("base", "raw", 1 << 20, NULL));
    OK(create_opt("top", "qcow2", 1 << 20, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    OPEN_FAILS("top", QBLK_OPEN_UNTRUSTED, options("format", "qcow2", NULL), QBLK_EPOLICY, "'base'");
    CHECK_HAS(qblk_get_error(), "QBLK_OPEN_NO_BACKING");
    OPENS("top", QBLK_OPEN_UNTRUSTED | QBLK_OPEN_NO_BACKING, options("format", "qcow2", NULL));
    OPENS("top", QBLK_OPEN_UNTRUSTED,
          options("format", "qcow2", "backing-file", "base", "backing.format", "raw", NULL));
    OPEN_FAILS("top", 0, options("implicit-open", "deny", NULL), QBLK_EPOLICY, "'base'");
    OPENS("top", 0, options("implicit-open", "local", NULL));
    OPENS("top", QBLK_OPEN_NO_BACKING, options("implicit-open", "deny", NULL));
}

static void what_may_be_a_backing_file(void)
{
    static const char *const bad[] = {"nbd://localhost/x", "nbd:localhost:10809", "json:{}", "http://h/x"};
    for (size_t i = 0; i < 4; i++) {
        CHECK_SH("qemu-img create -q -u -f qcow2 -b '%s' -F raw names 1M", bad[i]);
        OPEN_FAILS("names", 0, NULL, QBLK_EPOLICY, bad[i]);
        OPENS("names", QBLK_OPEN_NO_BACKING, NULL);
    }
    /* Opening a FIFO would wait for ever for somebody to write to it. */
    CHECK_INT(mkfifo("fifo", 0644), 0);
    CHECK_SH("qemu-img create -q -u -f qcow2 -b fifo -F raw names 1M");
    alarm(30);
    OPEN_FAILS("names", 0, NULL, QBLK_EPOLICY, "'fifo'");
    alarm(0);
    CHECK_SH("qemu-img create -q -u -f qcow2 -b /dev/zero -F raw names 1M");
    OPEN_FAILS("names", 0, NULL, QBLK_EPOLICY, "'/dev/zero'");
    /* A path with a colon is one if it says so. */
    OK(qblk_create("co:lon", "raw", 1 << 20, NULL));
    CHECK_SH("qemu-img create -q -u -f qcow2 -b file:co:lon -F raw names 1M");
    OPENS("names", 0, NULL);
    /* One that is not there is named, and so is the image that wants it. */
    CHECK_SH("qemu-img create -q -u -f qcow2 -b gone -F raw names 1M");
    OPEN_FAILS("names", 0, NULL, -ENOENT, "gone");
    CHECK_HAS(qblk_get_error(), "names");
    OPENS("names", QBLK_OPEN_INFO_ONLY, NULL);
}

static void loops(void)
{
    CHECK_SH("qemu-img create -q -u -f qcow2 -b ./a -F qcow2 a 1M");
    OPEN_FAILS("a", 0, NULL, QBLK_EPOLICY, "loop");
    CHECK_SH("qemu-img create -q -u -f qcow2 -b ./c -F qcow2 b 1M");
    CHECK_SH("qemu-img create -q -u -f qcow2 -b b -F qcow2 c 1M");
    OPEN_FAILS("b", 0, NULL, QBLK_EPOLICY, "loop");
    OPENS("b", QBLK_OPEN_NO_BACKING, NULL);
}

static void too_deep(void)
{
    char below[32], name[32];
    OK(qblk_create("deep-0", "raw", 1 << 16, NULL));
    for (int i = 1; i <= 201; i++) {
        snprintf(below, sizeof below, "deep-%d", i - 1);
        snprintf(name, sizeof name, "deep-%d", i);
        OK(create_opt(name, "qcow2", 1 << 16,
                      options("backing-file", below, "backing-fmt", i == 1 ? "raw" : "qcow2", NULL)));
    }
    OPENS("deep-150", 0, NULL);
    OPEN_FAILS("deep-201", 0, NULL, QBLK_EPOLICY, "deeper than 200");
}

/* Without a recorded format the backing image is probed: a guest that wrote a qcow2 header into a
 * raw disk must not get the host to open what that header names. */
static void an_unrecorded_format(void)
{
    OK(qblk_create("secret", "raw", 1 << 20, NULL));
    CHECK_SH("qemu-img create -q -u -f qcow2 -b secret -F raw guest 1M");
    CHECK_SH("qemu-img create -q -u -f qcow2 -b guest -F qcow2 over 1M");
    OPENS("over", 0, NULL);
    /* Make the record of the format one that nobody knows: 0xE2792ACA is its type. */
    CHECK_SH("perl -0777 -pi -e 's/\\xe2\\x79\\x2a\\xca/\\x12\\x34\\x56\\x78/' over");
    OPEN_FAILS("over", 0, NULL, QBLK_EPOLICY, "'secret'");
    OPENS("over", 0, options("backing-fmt", "qcow2", NULL));
    OPENS("over", 0, options("backing-fmt", "raw", NULL));
    OPENS("over", 0, options("backing.format", "qcow2", NULL));
}

static void a_raw_disk_stays_raw(void)
{
    static const unsigned char qcow2[8] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3};
    unsigned char buf[8];
    qblk *dev;
    qblk_info info;
    OK(qblk_create("disk", "raw", 1 << 20, NULL));
    dev = must_open("disk", QBLK_OPEN_RDWR);
    OK(qblk_get_info(dev, &info));
    CHECK(info.state & QBLK_STATE_PROBED);
    FAILS(qblk_pwrite(dev, qcow2, 8, 0), QBLK_EPOLICY, "format=raw");
    struct iovec iov[2] = {{(void *)(uintptr_t)qcow2, 3}, {(void *)(uintptr_t)(qcow2 + 3), 5}};
    FAILS(qblk_pwritev(dev, iov, 2, 0, 0), QBLK_EPOLICY, "qcow2");
    FAILS(qblk_pwrite(dev, "KDMV", 4, 0), QBLK_EPOLICY, "vmdk");
    /* In two steps the second is the one. */
    OK(qblk_pwrite(dev, qcow2, 3, 0));
    FAILS(qblk_pwrite(dev, qcow2 + 3, 5, 3), QBLK_EPOLICY, "qcow2");
    OK(qblk_pread(dev, buf, 8, 0));
    CHECK(memcmp(buf, qcow2, 3) == 0 && all_zero(buf + 3, 5));
    /* Elsewhere it is data like any other. */
    OK(qblk_pwrite(dev, qcow2, 8, 512));
    OK(qblk_close(dev));
    /* Who says that it is raw may write what he likes. */
    OK(open_opt("disk", QBLK_OPEN_RDWR, &dev, options("format", "raw", NULL)));
    OK(qblk_get_info(dev, &info));
    CHECK(!(info.state & QBLK_STATE_PROBED));
    OK(qblk_pwrite(dev, qcow2, 8, 0));
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    untrusted();
    what_may_be_a_backing_file();
    loops();
    too_deep();
    an_unrecorded_format();
    a_raw_disk_stays_raw();
    return 0;
}
