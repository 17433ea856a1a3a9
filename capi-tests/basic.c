/* An image over a backing image: made, written, read, as a first program would. RUN: static-exe */
#include "test.h"

int main(int argc, char **argv)
{
    static unsigned char a[100000], b[100000];
    qblk *dev;
    (void)argc;
    test_begin(argv);

    OK(qblk_create("base.raw", "raw", 10000000, NULL));
    dev = must_open("base.raw", QBLK_OPEN_RDWR);
    fill(a, sizeof a, 1);
    OK(qblk_pwrite(dev, a, sizeof a, 5000));
    OK(qblk_close(dev));

    OK(create_opt("disk.qcow2", "qcow2", 10000000,
                  options("backing-file", "base.raw", "backing-fmt", "raw", NULL)));
    dev = must_open("disk.qcow2", QBLK_OPEN_RDWR);
    CHECK_INT(device_size(dev), 10000000);
    OK(qblk_pread(dev, b, sizeof b, 5000));
    CHECK_MEM(b, a, sizeof b);
    OK(qblk_pwrite(dev, "over", 4, 70000));
    OK(qblk_flush(dev));
    OK(qblk_close(dev));

    dev = must_open("disk.qcow2", 0);
    memcpy(a + 65000, "over", 4);
    OK(qblk_pread(dev, b, sizeof b, 5000));
    CHECK_MEM(b, a, sizeof b);
    OK(qblk_close(dev));

    /* The backing image was not touched. */
    dev = must_open("base.raw", 0);
    fill(a, sizeof a, 1);
    OK(qblk_pread(dev, b, sizeof b, 5000));
    CHECK_MEM(b, a, sizeof b);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q disk.qcow2");
    return 0;
}
