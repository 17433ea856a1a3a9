/* Compressed writes: they read back, take less room, are of whole clusters, and are refused by name. */
#include "test.h"

int main(int argc, char **argv)
{
    static unsigned char want[300000], found[300000];
    qblk_extent e[8];
    qblk_info info;
    qblk *dev, *context;
    int64_t n;
    (void)argc;
    test_begin(argv);

    memset(want, 'a', 200000);
    fill(want + 200000, 100000, 1);
    OK(qblk_create("a.qcow2", "qcow2", sizeof want, NULL));
    OK(qblk_open("a.qcow2", QBLK_OPEN_RDWR, &dev));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.cluster_size, 65536);
    OK(qblk_write_compressed(dev, want, sizeof want, 0));
    OK(qblk_pread(dev, found, sizeof found, 0));
    CHECK_MEM(found, want, sizeof want);
    n = qblk_extents(dev, sizeof want, 0, 0, e, 8);
    CHECK(n > 0);
    CHECK(e[0].flags & QBLK_EXTENT_COMPRESSED);

    /* Whole clusters only, but at the end. */
    FAILS(qblk_write_compressed(dev, want, 65535, 0), -EINVAL, "whole clusters");
    FAILS(qblk_write_compressed(dev, want, 65536, 1), -EINVAL, "whole clusters");
    FAILS(qblk_write_compressed(dev, want, 65536, 262144), -EINVAL, "leave the device");
    OK(qblk_write_compressed(dev, want + 262144, sizeof want - 262144, 262144));
    OK(qblk_write_compressed(dev, NULL, 0, 65536));
    OK(qblk_context_open(dev, NULL, 0, &context));
    FAILS(qblk_write_compressed(context, want, 65536, 0), -EROFS, "read-only");
    OK(qblk_close(context));

    /* Written over in place, plainly and in compressed form. */
    memset(want + 1000, 'b', 5000);
    OK(qblk_pwrite(dev, want + 1000, 5000, 1000));
    memset(want + 65536, 'c', 65536);
    OK(qblk_write_compressed(dev, want + 65536, 65536, 65536));
    OK(qblk_close(dev));
    OK(qblk_open("a.qcow2", 0, &dev));
    OK(qblk_pread(dev, found, sizeof found, 0));
    CHECK_MEM(found, want, sizeof want);
    OK(qblk_close(dev));

    /* What has no compression says so. */
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    FAILS(qblk_write_compressed(dev, want, 65536, 0), -ENOTSUP, "compressed writes");
    OK(qblk_close(dev));
    OK(create_opt("b.qcow2", "qcow2", 1 << 20,
                  options("encrypt.format", "luks", "encrypt.iter-time", "10", "key", "k", NULL)));
    OK(open_opt("b.qcow2", QBLK_OPEN_RDWR, &dev, options("key", "k", NULL)));
    FAILS(qblk_write_compressed(dev, want, 65536, 0), -ENOTSUP, "encryption");
    OK(qblk_close(dev));
    return 0;
}
