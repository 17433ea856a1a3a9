/* Which ranges a device has: to the byte, without overflow, and nothing happens outside. */
#include "test.h"

static void rules(const char *kind)
{
    static unsigned char buf[4096];
    const uint64_t size = (1 << 20) + 513;
    qblk *dev = new_device(kind, size);
    struct iovec iov = {buf, 2};
    qblk_extent e[4];
    CHECK_INT(device_size(dev), size);

    /* Nothing to do, up to and including the end. */
    const uint64_t inside[] = {0, 1, 513, size - 1, size};
    for (size_t i = 0; i < 5; i++) {
        OK(qblk_pread(dev, NULL, 0, inside[i]));
        OK(qblk_pread2(dev, NULL, 0, inside[i], 0));
        OK(qblk_pwrite(dev, NULL, 0, inside[i]));
        OK(qblk_pwrite2(dev, NULL, 0, inside[i], QBLK_REQ_FUA));
        OK(qblk_preadv(dev, NULL, 0, inside[i], 0));
        OK(qblk_pwritev(dev, NULL, 0, inside[i], 0));
        OK(qblk_zero(dev, 0, inside[i], 0));
        OK(qblk_trim(dev, 0, inside[i], 0));
        OK(qblk_cache(dev, 0, inside[i], 0));
        OK(qblk_extents(dev, 0, inside[i], 0, NULL, 0));
    }
    /* The last byte. */
    OK(qblk_pwrite(dev, "x", 1, size - 1));
    OK(qblk_pread(dev, buf, 1, size - 1));
    CHECK_INT(buf[0], 'x');
    OK(qblk_zero(dev, 1, size - 1, 0));
    OK(qblk_trim(dev, 1, size - 1, 0));
    OK(qblk_cache(dev, 1, size - 1, 0));
    CHECK_INT(qblk_extents(dev, 1, size - 1, 0, e, 4), 1);
    CHECK(e[0].offset == size - 1 && e[0].length == 1);

    /* One byte too far, far too far, and so far that the sum is small again. */
    const struct {
        uint64_t offset, count;
    } outside[] = {
        {size - 1, 2}, {size, 1}, {size + 1, 0}, {size + 1, 1}, {0, size + 1},
        {UINT64_MAX, 1}, {UINT64_MAX, 0}, {UINT64_MAX - 4, 10}, {1, UINT64_MAX}, {0, UINT64_MAX},
        {UINT64_C(1) << 63, UINT64_C(1) << 63}, {INT64_MAX, 1}, {UINT64_C(1) << 32, 1},
    };
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++) {
        const uint64_t at = outside[i].offset, n = outside[i].count;
        const char *text = "leave the device";
        FAILS(qblk_pread(dev, buf, (size_t)n, at), -EINVAL, text);
        FAILS(qblk_pread2(dev, buf, (size_t)n, at, 0), -EINVAL, text);
        FAILS(qblk_pwrite(dev, buf, (size_t)n, at), -EINVAL, text);
        FAILS(qblk_pwrite2(dev, buf, (size_t)n, at, QBLK_REQ_FUA), -EINVAL, text);
        FAILS(qblk_zero(dev, n, at, 0), -EINVAL, text);
        FAILS(qblk_zero(dev, n, at, QBLK_REQ_FAST_ZERO | QBLK_REQ_MAY_TRIM), -EINVAL, text);
        FAILS(qblk_trim(dev, n, at, 0), -EINVAL, text);
        FAILS(qblk_cache(dev, n, at, 0), -EINVAL, text);
        FAILS(qblk_extents(dev, n, at, 0, e, 4), -EINVAL, text);
    }
    FAILS(qblk_preadv(dev, &iov, 1, size - 1, 0), -EINVAL, "2 bytes at offset 1049088");
    FAILS(qblk_pwritev(dev, &iov, 1, size - 1, 0), -EINVAL, "which has 1049089 bytes");
    CHECK_INT(device_size(dev), size);
    OK(qblk_close(dev));
    if (strcmp(kind, "raw") == 0)
        CHECK_INT(file_size("raw"), size);
    if (strcmp(kind, "qcow2") == 0)
        CHECK_SH("qemu-img check -q qcow2");
}

/* A device without a byte. */
static void empty(const char *kind)
{
    char c;
    if (strcmp(kind, "mem") == 0)
        return;
    remove(kind);
    qblk *dev = new_device(kind, 0);
    CHECK_INT(device_size(dev), 0);
    OK(qblk_pread(dev, &c, 0, 0));
    OK(qblk_flush(dev));
    FAILS(qblk_pread(dev, &c, 1, 0), -EINVAL, "leave the device");
    FAILS(qblk_pwrite(dev, "x", 1, 0), -EINVAL, "leave the device");
    CHECK_INT(qblk_extents(dev, 0, 0, 0, NULL, 0), 0);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    {
        rules(kind);
        empty(kind);
    }
    return 0;
}
