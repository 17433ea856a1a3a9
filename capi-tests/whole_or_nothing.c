/* A call moves all bytes or fails; one that is refused touches neither memory nor device. */
#include "test.h"

static void refused_calls_touch_nothing(const char *kind)
{
    static unsigned char buf[8192], want[8192], disk[8192];
    const uint64_t size = 1000000;
    qblk *dev = new_device(kind, size);
    fill(disk, sizeof disk, 7);
    OK(qblk_pwrite(dev, disk, sizeof disk, size - sizeof disk));

    fill(buf, sizeof buf, 8);
    memcpy(want, buf, sizeof buf);
    FAILS(qblk_pread(dev, buf, sizeof buf, size - 4096), -EINVAL, "8192 bytes at offset 995904");
    CHECK_MEM(buf, want, sizeof buf);
    struct iovec iov[2] = {{buf, 4096}, {buf + 4096, 4096}};
    FAILS(qblk_preadv(dev, iov, 2, size - 4096, 0), -EINVAL, "leave the device");
    CHECK_MEM(buf, want, sizeof buf);

    FAILS(qblk_pwrite(dev, buf, sizeof buf, size - 4096), -EINVAL, "leave the device");
    FAILS(qblk_pwritev(dev, iov, 2, size - 4096, 0), -EINVAL, "leave the device");
    FAILS(qblk_zero(dev, 8192, size - 4096, 0), -EINVAL, "leave the device");
    FAILS(qblk_zero(dev, 8192, size - 4096, QBLK_REQ_MAY_TRIM), -EINVAL, "leave the device");
    FAILS(qblk_trim(dev, 8192, size - 4096, 0), -EINVAL, "leave the device");
    OK(qblk_pread(dev, buf, sizeof buf, size - sizeof buf));
    CHECK_MEM(buf, disk, sizeof buf);
    OK(qblk_close(dev));
}

/* There are no short counts: what was cut off under an open device is an error, not zeroes. */
static void a_file_that_shrank(const char *io)
{
    static unsigned char buf[65536], want[65536];
    qblk *dev;
    fill(want, sizeof want, 3);
    make_file("shrinks", want, sizeof want, sizeof want);
    OK(open_opt("shrinks", 0, &dev, options("format", "raw", "io", io, NULL)));
    OK(qblk_pread(dev, buf, sizeof buf, 0));
    CHECK_MEM(buf, want, sizeof buf);
    CHECK_INT(truncate("shrinks", 20000), 0);
    FAILS(qblk_pread(dev, buf, sizeof buf, 0), -EIO, "'shrinks'");
    FAILS(qblk_pread(dev, buf, 1, 65535), -EIO, "'shrinks'");
    /* What is left can be read, and the program lives. */
    memset(buf, 0, sizeof buf);
    OK(qblk_pread(dev, buf, 20000, 0));
    CHECK_MEM(buf, want, 20000);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    refused_calls_touch_nothing(kind);
    a_file_that_shrank("auto");
    a_file_that_shrank("mmap");
    return 0;
}
