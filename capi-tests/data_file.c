/* Images whose data lies in a file of its own, and images with subclusters: made, described, written,
 * and found to hold what they should by QEMU. */
#include "test.h"

static void holds(qblk *dev, uint64_t offset, char byte)
{
    char buf[100];
    size_t i;
    OK(qblk_pread(dev, buf, sizeof buf, offset));
    for (i = 0; i < sizeof buf; i++)
        CHECK_INT(buf[i], byte);
}

int main(int argc, char **argv)
{
    qblk *dev;
    qblk_info info;
    qblk_extent e[8];
    char text[64];
    (void)argc;
    test_begin(argv);

    /* A raw data file is good without the image. */
    OK(create_opt("disk.qcow2", "qcow2", 1 << 20,
                  options("data-file", "disk.raw", "data-file-raw", "on", NULL)));
    dev = must_open("disk.qcow2", QBLK_OPEN_RDWR);
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.state & QBLK_STATE_HAS_DATA_FILE, QBLK_STATE_HAS_DATA_FILE);
    CHECK_INT(qblk_get_property(dev, "data-file", text, sizeof text), 8);
    CHECK_STR(text, "disk.raw");
    qblk_get_property(dev, "qcow2.data-file-raw", text, sizeof text);
    CHECK_STR(text, "on");
    memset(text, 7, sizeof text);
    OK(qblk_pwrite(dev, text, sizeof text, 300000));
    OK(qblk_zero(dev, 32, 300000, 0));
    OK(qblk_close(dev));
    dev = must_open("disk.raw", 0);
    CHECK_INT(qblk_pread(dev, text, 33, 300000), 0);
    CHECK(text[0] == 0 && text[31] == 0 && text[32] == 7);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img compare -q -f qcow2 -F raw disk.qcow2 disk.raw");

    /* Who names the data file decides; a hostile image does not. */
    FAILS(open_opt("disk.qcow2", QBLK_OPEN_UNTRUSTED, &dev, options("format", "qcow2", NULL)),
          QBLK_EPOLICY, "data file");
    FAILS(open_opt("disk.qcow2", 0, &dev, options("implicit-open", "deny", NULL)), QBLK_EPOLICY,
          "'data-file'");
    CHECK_SH("mv disk.raw elsewhere.raw");
    FAILS(qblk_open("disk.qcow2", 0, &dev), -ENOENT, "data file of disk.qcow2");
    OK(open_opt("disk.qcow2", 0, &dev, options("data-file", "elsewhere.raw", NULL)));
    holds(dev, 300032 - 100, 0);
    OK(qblk_close(dev));
    dev = must_open("disk.qcow2", QBLK_OPEN_INFO_ONLY);
    OK(qblk_close(dev));

    /* A small write allocates a subcluster only; what is around it is still the backing file's. */
    make_file("base", "\5", 1, 0);
    CHECK_SH("dd if=/dev/zero bs=64k count=16 2>/dev/null | tr '\\0' '\\5' >base");
    OK(create_opt("top.qcow2", "qcow2", 1 << 20,
                  options("extended-l2", "on", "backing-file", "base", "backing-fmt", "raw", NULL)));
    dev = must_open("top.qcow2", QBLK_OPEN_RDWR);
    memset(text, 9, sizeof text);
    OK(qblk_pwrite(dev, text, sizeof text, 65536 + 4096));
    OK(qblk_trim(dev, 2048, 65536 + 8192, 0));
    OK(qblk_zero(dev, 2048, 65536 + 10240, 0));
    CHECK_INT(qblk_extents(dev, 65536, 65536, 0, e, 8), 5);
    CHECK(e[0].depth == 1 && e[0].length == 4096);
    CHECK(e[1].depth == 0 && e[1].length == 2048 && e[1].flags & QBLK_EXTENT_DATA);
    CHECK(e[2].depth == 1 && e[2].length == 4096);
    CHECK(e[3].depth == 0 && e[3].length == 2048 && e[3].flags & QBLK_EXTENT_ZERO);
    CHECK(e[4].depth == 1);
    holds(dev, 65536 + 10240, 0);
    holds(dev, 65536 + 12288, 5);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q -f qcow2 top.qcow2");

    FAILS(create_opt("new", "qcow2", 1 << 20, options("extended-l2", "on", "cluster-size", "8k", NULL)),
          -EINVAL, "'extended-l2'");
    FAILS(create_opt("new", "qcow2", 1 << 20, options("data-file-raw", "on", NULL)), -EINVAL,
          "'data-file-raw'");
    CHECK(!exists("new"));
    return 0;
}
