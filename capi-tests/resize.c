/* Changing the size: growing reads as zeroes, shrinking must be meant, lost bytes stay lost. */
#include "test.h"

static void rules(const char *kind)
{
    static unsigned char want[300000], found[300000];
    qblk *dev = new_device(kind, 200000), *context;
    OK(qblk_context_open(dev, NULL, 0, &context));
    fill(want, sizeof want, 1);
    OK(qblk_pwrite(dev, want, 200000, 0));

    OK(qblk_resize(dev, 300001, 0));
    CHECK_INT(device_size(context), 300001);
    OK(qblk_pread(context, found, 300000, 0));
    CHECK_MEM(found, want, 200000);
    CHECK(all_zero(found + 200000, 100000));
    FAILS(qblk_pread(dev, found, 1, 300001), -EINVAL, "leave the device");
    OK(qblk_pwrite(dev, want, 300000, 0));

    FAILS(qblk_resize(dev, 300000, 0), -EINVAL, "QBLK_RESIZE_SHRINK");
    FAILS(qblk_resize(dev, 0, 0), -EINVAL, "QBLK_RESIZE_SHRINK");
    FAILS(qblk_resize(dev, 400000, 2), -EINVAL, "mean nothing");
    FAILS(qblk_resize(dev, UINT64_MAX, 0), -EFBIG, kind);
    FAILS(qblk_resize(dev, UINT64_C(1) << 63, 0), -EFBIG, kind);
    FAILS(qblk_resize(context, 400000, 0), -EROFS, "read-only");
    CHECK_INT(device_size(dev), 300001);

    OK(qblk_resize(dev, 100001, QBLK_RESIZE_SHRINK));
    CHECK_INT(device_size(dev), 100001);
    FAILS(qblk_pread(context, found, 1, 100001), -EINVAL, "leave the device");
    /* What comes back is zero, not what was there. */
    OK(qblk_resize(dev, 300000, QBLK_RESIZE_SHRINK));
    OK(qblk_pread(dev, found, 300000, 0));
    CHECK_MEM(found, want, 100001);
    CHECK(all_zero(found + 100001, 199999));

    OK(qblk_resize(dev, 300000, 0));
    OK(qblk_resize(dev, 0, QBLK_RESIZE_SHRINK));
    CHECK_INT(device_size(dev), 0);
    OK(qblk_resize(dev, 4097, 0));
    OK(qblk_pread(dev, found, 4097, 0));
    CHECK(all_zero(found, 4097));
    OK(qblk_close(context));
    OK(qblk_close(dev));
    if (strcmp(kind, "raw") == 0)
        CHECK_INT(file_size(kind), 4097);
    dev = strcmp(kind, "mem") == 0 ? NULL : must_open(kind, 0);
    if (dev)
        CHECK_INT(device_size(dev), 4097);
    OK(qblk_close(dev));
}

static void preallocation(const char *kind)
{
    static const char *const room[] = {"off", "metadata", "falloc", "full"};
    const int is_raw = strcmp(kind, "raw") == 0;
    char c;
    for (int i = 0; i < 4; i++) {
        remove(kind);
        qblk *dev = new_device(kind, 100000);
        qblk_options *o = options("preallocation", room[i], NULL);
        if (is_raw && i == 1) {
            FAILS(qblk_resize2(dev, 2000000, o, 0), -EINVAL, "metadata");
        } else {
            OK(qblk_resize2(dev, 2000000, o, 0));
            CHECK_INT(device_size(dev), 2000000);
            OK(qblk_pread(dev, &c, 1, 1999999));
            CHECK_INT(c, 0);
        }
        OK(qblk_options_set(o, "preallocation", "some"));
        FAILS(qblk_resize2(dev, 3000000, o, 0), -EINVAL, "'preallocation'");
        OK(qblk_options_set(o, "preallocation", NULL));
        OK(qblk_options_set(o, "cluster-size", "64k"));
        FAILS(qblk_resize2(dev, 3000000, o, 0), -EINVAL, "'cluster-size'");
        qblk_options_free(o);
        OK(qblk_close(dev));
        if (i >= 2)
            CHECK(file_blocks(kind) >= 1900000 / 512);
    }
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    rules(kind);
    CHECK_SH("qemu-img check -q qcow2");
    preallocation("raw");
    preallocation("qcow2");
    CHECK_SH("qemu-img check -q qcow2");

    /* Over a backing image, growing past its end and back must not uncover its bytes. */
    static unsigned char bytes[100000];
    OK(qblk_create("base", "raw", 100000, NULL));
    qblk *dev = must_open("base", QBLK_OPEN_RDWR);
    fill(bytes, sizeof bytes, 2);
    OK(qblk_pwrite(dev, bytes, sizeof bytes, 0));
    OK(qblk_close(dev));
    OK(create_opt("over", "qcow2", 100000, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    dev = must_open("over", QBLK_OPEN_RDWR);
    OK(qblk_resize(dev, 50000, QBLK_RESIZE_SHRINK));
    OK(qblk_resize(dev, 100000, 0));
    OK(qblk_pread(dev, bytes, sizeof bytes, 0));
    CHECK(!all_zero(bytes, 50000));
    CHECK(all_zero(bytes + 50000, 50000));
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q over");
    return 0;
}
