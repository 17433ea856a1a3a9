/* Images that need what this version lacks are refused by the feature's name, never served as if
 * they were plain; QBLK_OPEN_INFO_ONLY still describes them. */
#include "test.h"

static void refused(const char *name, const char *part)
{
    qblk *dev = NULL;
    qblk_info info;
    char c;
    FAILS(qblk_open(name, 0, &dev), QBLK_EUNSUPPORTED, part);
    CHECK_HAS(qblk_get_error(), name);
    FAILS(qblk_open(name, QBLK_OPEN_RDWR, &dev), QBLK_EUNSUPPORTED, part);
    dev = must_open(name, QBLK_OPEN_INFO_ONLY);
    OK(qblk_get_info(dev, &info));
    CHECK_STR(info.format, "qcow2");
    CHECK_INT(info.size, 1 << 20);
    FAILS(qblk_pread(dev, &c, 1, 0), -EBADF, "QBLK_OPEN_INFO_ONLY");
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    qblk *dev;
    char buf[8];
    (void)argc;
    test_begin(argv);

    /* An incompatible feature that nobody knows: bit 20 of the eight bytes at 72. */
    OK(qblk_create("future", "qcow2", 1 << 20, NULL));
    patch("future", 77, "\x10", 1);
    refused("future", "20");

    /* Formats that are known by name only. */
    make_file("disk.vmdk", "KDMV", 4, 1 << 20);
    FAILS(qblk_open("disk.vmdk", 0, &dev), QBLK_EUNSUPPORTED, "vmdk");
    CHECK_HAS(qblk_get_error(), "format=raw");
    OK(open_opt("disk.vmdk", 0, &dev, options("format", "raw", NULL)));
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "KDMV", 4);
    OK(qblk_close(dev));
    return 0;
}
