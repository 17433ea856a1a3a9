/* 64-bit offsets and counts on every path: nothing wraps at 2 or 4 GiB. */
#include "test.h"

static const uint64_t GIB = UINT64_C(1) << 30;
static const uint64_t TIB = UINT64_C(1) << 40;

/* Bytes around each power of two from 2 GiB on are distinct places. */
static void powers(qblk *dev, uint64_t size)
{
    unsigned char want[16], found[16];
    uint64_t at;
    for (at = 2 * GIB; at < size; at *= 2) {
        fill(want, 16, at);
        OK(qblk_pwrite(dev, want, 16, at - 8));
    }
    fill(want, 16, 1);
    OK(qblk_pwrite(dev, want, 16, 0));
    fill(want, 16, 2);
    OK(qblk_pwrite(dev, want, 16, size - 16));
    for (at = 2 * GIB; at < size; at *= 2) {
        fill(want, 16, at);
        OK(qblk_pread(dev, found, 16, at - 8));
        CHECK_MEM(found, want, 16);
    }
    fill(want, 16, 1);
    OK(qblk_pread(dev, found, 16, 0));
    CHECK_MEM(found, want, 16);
    fill(want, 16, 2);
    OK(qblk_pread(dev, found, 16, size - 16));
    CHECK_MEM(found, want, 16);
}

static void describe(qblk *dev, uint64_t size)
{
    qblk_extent e[64];
    const int64_t n = qblk_extents(dev, size, 0, 0, e, 64);
    uint64_t at = 0, data = 0;
    CHECK(n > 0);
    for (int64_t i = 0; i < n; i++) {
        CHECK(e[i].offset == at && e[i].length > 0);
        at += e[i].length;
        if (!(e[i].flags & QBLK_EXTENT_ZERO))
            data += e[i].length;
    }
    CHECK(at == size);
    CHECK(data < 64 << 20);
}

/* Zero, trim and cache take counts of 64 bits. */
static void counts(qblk *dev)
{
    unsigned char found[16];
    OK(qblk_cache(dev, 4096, 4 * GIB - 100, 0));
    OK(qblk_zero(dev, 5 * GIB, 2 * GIB - 8, QBLK_REQ_MAY_TRIM));
    OK(qblk_pread(dev, found, 16, 4 * GIB - 8));
    CHECK(all_zero(found, 16));
    OK(qblk_pread(dev, found, 16, 0));
    CHECK(!all_zero(found, 16));
    OK(qblk_trim(dev, 5 * GIB, GIB, 0));
}

/* One request above 2 GiB, which no system call takes, in more pieces than one takes. */
static void a_large_request(qblk *dev)
{
    enum { PIECES = 2200 };
    static unsigned char buf[1 << 20];
    static struct iovec iov[PIECES];
    for (int i = 0; i < PIECES; i++)
        iov[i].iov_base = buf, iov[i].iov_len = sizeof buf;
    memset(buf, 1, sizeof buf);
    OK(qblk_preadv(dev, iov, PIECES, 100 * GIB, 0));
    CHECK(all_zero(buf, sizeof buf));
}

int main(int argc, char **argv)
{
    qblk *dev;
    (void)argc;
    test_begin(argv);

    dev = must_open("mem:1T", QBLK_OPEN_RDWR);
    CHECK_INT(device_size(dev), TIB);
    powers(dev, TIB);
    describe(dev, TIB);
    counts(dev);
    if (!quick())
        a_large_request(dev);
    OK(qblk_close(dev));

    dev = new_device("raw", 9 * GIB + 1);
    powers(dev, 9 * GIB + 1);
    describe(dev, 9 * GIB + 1);
    counts(dev);
    OK(qblk_close(dev));
    CHECK_INT(file_size("raw"), 9 * GIB + 1);
    CHECK(file_blocks("raw") < 10000);

    dev = new_device("qcow2", TIB);
    powers(dev, TIB);
    describe(dev, TIB);
    counts(dev);
    if (!quick())
        a_large_request(dev);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
    CHECK(file_blocks("qcow2") < 20000);

    /* The largest that a file can be. */
    OK(qblk_create("huge", "raw", 8 * TIB, NULL));
    FAILS(qblk_create("huger", "raw", UINT64_C(1) << 63, NULL), -EFBIG, "huger");
    FAILS(qblk_create("huger", "qcow2", UINT64_MAX, NULL), -EFBIG, "huger");
    CHECK(!exists("huger"));
    return 0;
}
