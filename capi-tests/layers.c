/* Layers: stacked by option and name, pushed on an open device, seen by all its contexts. */
#include "test.h"

static void by_name(void)
{
    qblk *dev;
    qblk_options *o;
    char text[64];
    OK(qblk_open("layers:offset;offset=1M;range=64k,offset;offset=512:mem:2M", QBLK_OPEN_RDWR, &dev));
    CHECK_INT(device_size(dev), 65536 - 512);
    CHECK_INT(qblk_get_property(dev, "layers", text, sizeof text), 13);
    CHECK(strcmp(text, "offset,offset") == 0);
    OK(qblk_close(dev));

    OK(qblk_options_new(&o));
    OK(qblk_options_set(o, "layers", "offset,readonly"));
    OK(qblk_options_set(o, "offset.range", "1M"));
    OK(qblk_open2("mem:2M", o, QBLK_OPEN_RDWR, &dev));
    CHECK_INT(device_size(dev), 1 << 20);
    FAILS(qblk_pwrite(dev, "x", 1, 0), -EROFS, "read-only");
    FAILS(qblk_resize(dev, 2 << 20, 0), -EROFS, "read-only");
    OK(qblk_close(dev));
    OK(qblk_options_set(o, "layers", "offset,nonesuch"));
    FAILS(qblk_open2("mem:2M", o, 0, &dev), -EINVAL, "nonesuch");
    CHECK(dev == NULL);
    OK(qblk_options_set(o, "layers", "offset"));
    FAILS(qblk_open2("mem:2M", o, QBLK_OPEN_INFO_ONLY, &dev), -EINVAL, "INFO_ONLY");
    qblk_options_free(o);
}

static void pushed(const char *kind)
{
    qblk *dev = new_device(kind, 1 << 20), *context;
    qblk_options *o;
    char found[4] = "";
    OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
    OK(qblk_pwrite(dev, "abc", 4, 4096));
    OK(qblk_options_new(&o));
    OK(qblk_options_set(o, "offset", "4k"));
    OK(qblk_layer_push(dev, "offset", o, 0));
    OK(qblk_pread(context, found, 4, 0));
    CHECK(memcmp(found, "abc", 4) == 0);
    CHECK_INT(device_size(context), (1 << 20) - 4096);
    OK(qblk_pwrite2(context, "def", 4, 0, QBLK_REQ_FUA));

    FAILS(qblk_layer_push(dev, NULL, NULL, 0), -EINVAL, "NULL");
    FAILS(qblk_layer_push(dev, "offset", NULL, 1), -EINVAL, "mean nothing");
    FAILS(qblk_layer_push(dev, "offset,offset", NULL, 0), -EINVAL, "one layer");
    OK(qblk_options_set(o, "offset", "1T"));
    FAILS(qblk_layer_push(dev, "offset", o, 0), -EINVAL, "1T");
    OK(qblk_options_set(o, "colour", "red"));
    FAILS(qblk_layer_push(dev, "offset", o, 0), -EINVAL, "colour");
    qblk_options_free(o);

    /* What failed has left everything as it was. */
    OK(qblk_pread(dev, found, 4, 0));
    CHECK(memcmp(found, "def", 4) == 0);
    FAILS(qblk_resize(dev, 2 << 20, 0), -ENOTSUP, "resize");
    OK(qblk_close(dev));
    OK(qblk_flush(context));
    OK(qblk_close(context));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    by_name();
    EACH_KIND(kind)
    pushed(kind);
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
