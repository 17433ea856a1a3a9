/* Calls that an open device refuses: through a read-only handle, one for its description, and with
 * flags that mean nothing to the call. */
#include "test.h"

static void read_only(const char *kind)
{
    char c;
    qblk *dev = new_device(kind, 100000);
    OK(qblk_pwrite(dev, "old", 3, 0));
    OK(qblk_close(dev));
    dev = must_open(kind, 0);
    FAILS(qblk_pwrite(dev, "new", 3, 0), -EROFS, "read-only");
    FAILS(qblk_pwrite2(dev, "new", 3, 0, QBLK_REQ_FUA), -EROFS, "QBLK_OPEN_RDWR");
    FAILS(qblk_zero(dev, 10, 0, 0), -EROFS, "read-only");
    FAILS(qblk_trim(dev, 10, 0, 0), -EROFS, "read-only");
    FAILS(qblk_resize(dev, 200000, 0), -EROFS, "read-only");
    /* Not even nothing may be written. */
    FAILS(qblk_pwrite(dev, NULL, 0, 0), -EROFS, "read-only");
    OK(qblk_flush(dev));
    OK(qblk_pread(dev, &c, 1, 0));
    CHECK_INT(c, 'o');
    qblk_info info;
    OK(qblk_get_info(dev, &info));
    CHECK(info.state & QBLK_STATE_READ_ONLY);
    CHECK(info.can_zero == QBLK_CAN_NOT && info.can_trim == QBLK_CAN_NOT && info.can_fua == QBLK_CAN_NOT);
    OK(qblk_close(dev));
}

static void description_only(const char *kind)
{
    char c;
    qblk_info info;
    qblk_extent e;
    qblk *dev = must_open(kind, QBLK_OPEN_INFO_ONLY);
    struct iovec iov = {&c, 1};
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 100000);
    CHECK_STR(info.format, kind);
    const char *text = "QBLK_OPEN_INFO_ONLY";
    FAILS(qblk_pread(dev, &c, 1, 0), -EBADF, text);
    FAILS(qblk_preadv(dev, &iov, 1, 0, 0), -EBADF, text);
    FAILS(qblk_pwrite(dev, &c, 1, 0), -EBADF, text);
    FAILS(qblk_flush(dev), -EBADF, text);
    FAILS(qblk_zero(dev, 1, 0, 0), -EBADF, text);
    FAILS(qblk_trim(dev, 1, 0, 0), -EBADF, text);
    FAILS(qblk_cache(dev, 1, 0, 0), -EBADF, text);
    FAILS(qblk_extents(dev, 1, 0, 0, &e, 1), -EBADF, text);
    FAILS(qblk_resize(dev, 1, QBLK_RESIZE_SHRINK), -EBADF, text);
    OK(qblk_close(dev));
    /* Also when more was asked for. */
    dev = must_open(kind, QBLK_OPEN_INFO_ONLY | QBLK_OPEN_RDWR);
    FAILS(qblk_pwrite(dev, &c, 1, 0), -EBADF, text);
    OK(qblk_close(dev));
}

static void flags(const char *kind)
{
    static unsigned char buf[512], want[512];
    qblk_extent e;
    struct iovec iov = {buf, 512};
    remove(kind);
    qblk *dev = new_device(kind, 100000);
    fill(want, 512, 4);
    OK(qblk_pwrite(dev, want, 512, 0));
    for (int bit = 0; bit < 32; bit++) {
        const uint32_t flag = 1u << bit;
        const char *text = "mean nothing to this call";
        FAILS(qblk_pread2(dev, buf, 512, 0, flag), -EINVAL, text);
        FAILS(qblk_preadv(dev, &iov, 1, 0, flag), -EINVAL, text);
        FAILS(qblk_cache(dev, 512, 0, flag), -EINVAL, text);
        FAILS(qblk_extents(dev, 512, 0, flag, &e, 1), -EINVAL, text);
        if (flag != QBLK_REQ_FUA) {
            FAILS(qblk_pwrite2(dev, buf, 512, 0, flag), -EINVAL, text);
            FAILS(qblk_pwritev(dev, &iov, 1, 0, flag | QBLK_REQ_FUA), -EINVAL, text);
            FAILS(qblk_trim(dev, 512, 0, flag), -EINVAL, text);
        }
        if (flag > QBLK_REQ_FAST_ZERO)
            FAILS(qblk_zero(dev, 512, 0, flag | QBLK_REQ_FUA), -EINVAL, text);
        if (flag != QBLK_RESIZE_SHRINK)
            FAILS(qblk_resize(dev, 1, flag | QBLK_RESIZE_SHRINK), -EINVAL, text);
    }
    FAILS(qblk_pread2(dev, buf, 512, 0, 0x80000010), -EINVAL, "0x80000010");
    OK(qblk_pread(dev, buf, 512, 0));
    CHECK_MEM(buf, want, 512);
    CHECK_INT(device_size(dev), 100000);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    for (int i = 0; i < 2; i++) {
        read_only(KINDS[i]);
        description_only(KINDS[i]);
        flags(KINDS[i]);
    }
    return 0;
}
