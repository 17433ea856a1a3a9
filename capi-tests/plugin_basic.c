/* Plugins as devices: in both versions, as functions, in the program; settings, exports, formats on them,
 * what the library tells of them. RUN: plugin */
#include "test.h"

#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

static char name_[PATH_MAX + 256];

/* A plugin that was built for the tests. */
static const char *plugin(const char *rest)
{
    const char *dir = getenv("QBLK_TEST_PLUGINS");
    CHECK(dir != NULL);
    snprintf(name_, sizeof name_, "plugin:%s/%s", dir, rest);
    return name_;
}

static void has_property(qblk *dev, const char *key, const char *want)
{
    char buf[256];
    CHECK(qblk_get_property(dev, key, buf, sizeof buf) >= 0);
    CHECK_STR(buf, want);
}

/* What any disk does. */
static void use(qblk *dev)
{
    unsigned char a[10000], b[10000];
    uint64_t size = device_size(dev);
    uint64_t at = size / 2 + 77;
    fill(a, sizeof a, 1);
    OK(qblk_pwrite(dev, a, sizeof a, at));
    OK(qblk_pread(dev, b, sizeof b, at));
    CHECK_MEM(b, a, sizeof a);
    OK(qblk_zero(dev, 5000, at + 100, QBLK_REQ_MAY_TRIM));
    memset(a + 100, 0, 5000);
    OK(qblk_zero(dev, 50, at + 6000, 0));
    memset(a + 6000, 0, 50);
    OK(qblk_pwrite2(dev, "xy", 2, at + 7000, QBLK_REQ_FUA));
    memcpy(a + 7000, "xy", 2);
    OK(qblk_flush(dev));
    OK(qblk_cache(dev, size, 0, 0));
    OK(qblk_pread(dev, b, sizeof b, at));
    CHECK_MEM(b, a, sizeof a);
    struct iovec iov[3] = {{b, 33}, {b + 33, 1}, {b + 34, 8000}};
    OK(qblk_preadv(dev, iov, 3, at, 0));
    CHECK_MEM(b, a, 8034);
    FAILS(qblk_pread(dev, b, 2, size - 1), -EINVAL, "leave");
    OK(qblk_trim(dev, 9000, at, QBLK_REQ_FUA));
}

static void version_1(void)
{
    qblk *dev, *other;
    qblk_info info;
    unsigned char buf[16];
    OK(qblk_open(plugin("memory1.so?size=1M&fill=0x41"), QBLK_OPEN_RDWR, &dev));
    OK(open_opt(plugin("memory1.so?size=64k&fill=1"), QBLK_OPEN_RDWR, &other, options("plugin.fill", "66", NULL)));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 1 << 20);
    CHECK_STR(info.driver, "plugin");
    CHECK_STR(info.format, "raw");
    CHECK_INT(info.can_fua, QBLK_CAN_EMULATE);
    CHECK_INT(info.can_flush, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_zero, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_trim, QBLK_CAN_NOT);
    CHECK_INT(info.can_extents, QBLK_CAN_EMULATE);
    OK(qblk_pread(dev, buf, 16, 0));
    CHECK_MEM(buf, "AAAAAAAAAAAAAAAA", 16);
    OK(qblk_pread(other, buf, 16, 0));
    CHECK_MEM(buf, "BBBBBBBBBBBBBBBB", 16);
    has_property(dev, "plugin.name", "memory1");
    has_property(dev, "plugin.version", "1.2.3");
    has_property(dev, "plugin.api-version", "1");
    has_property(dev, "plugin.thread-model", "instance");
    has_property(dev, "plugin.dump", "fill=65\nrdwr=1");
    use(dev);
    OK(qblk_pread(other, buf, 16, 60000));
    CHECK_MEM(buf, "BBBBBBBBBBBBBBBB", 16);
    use(other);
    OK(qblk_close(other));
    /* Opened anew with other settings. */
    qblk_options *o = options("plugin.fill", "67", NULL);
    OK(qblk_reopen2(dev, o, 0));
    qblk_options_free(o);
    OK(qblk_pread(dev, buf, 16, 0));
    CHECK_MEM(buf, "CCCCCCCCCCCCCCCC", 16);
    has_property(dev, "plugin.dump", "fill=67\nrdwr=0");
    FAILS(qblk_pwrite(dev, "x", 1, 0), -EROFS, "read-only");
    OK(qblk_close(dev));

    /* What it says is told; codes of either kind come through. */
    FAILS(qblk_open(plugin("memory1.so"), 0, &dev), -EDOM, "'the setting size is missing'");
    FAILS(qblk_open(plugin("memory1.so?size=1Q"), 0, &dev), -EINVAL, "'1Q'");
    FAILS(qblk_open(plugin("memory1.so?colour=red"), 0, &dev), -EINVAL, "unknown setting \\'colour\\'");
    FAILS(qblk_open(plugin("memory1.so?size"), 0, &dev), -EINVAL, "expected plugin:PATH");
    FAILS(open_opt("mem:1M", 0, &dev, options("plugin.size", "1", NULL)), -EINVAL, "plugin.size");
    FAILS(qblk_create(plugin("memory1.so?size=1M"), "raw", 512, NULL), -ENOTSUP, "plugin");
}

static void version_2(void)
{
    qblk *dev;
    qblk_info info;
    qblk_extent e[8];
    OK(qblk_open(plugin("memory2.so"), QBLK_OPEN_RDWR, &dev));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 65536);
    CHECK_INT(info.can_fua, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_trim, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_fast_zero, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_cache, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_extents, QBLK_CAN_NATIVE);
    CHECK_INT(info.request_alignment, 512);
    CHECK_INT(info.max_transfer, 32768);
    CHECK_INT(info.optimal_io_size, 4096);
    has_property(dev, "plugin.multi-conn", "on");
    has_property(dev, "plugin.api-version", "2");
    OK(qblk_pwrite(dev, "x", 1, 1000));
    CHECK_INT(qblk_extents(dev, 65536 - 700, 700, 0, e, 8), 2);
    CHECK_INT(e[0].offset, 700);
    CHECK_INT(e[0].length, 324);
    CHECK_INT(e[0].flags, QBLK_EXTENT_DATA | QBLK_EXTENT_ALLOCATED);
    CHECK_INT(e[1].length, 65536 - 1024);
    CHECK_INT(e[1].flags, QBLK_EXTENT_ZERO | QBLK_EXTENT_ALLOCATED);
    use(dev);
    OK(qblk_close(dev));

    OK(qblk_open(plugin("memory2.so?export=b"), 0, &dev));
    CHECK_INT(device_size(dev), 131072);
    OK(qblk_close(dev));
    FAILS(qblk_open(plugin("memory2.so?export=c"), 0, &dev), -ENOENT, "config_complete");

    /* Beyond 4 GiB. */
    OK(open_opt(plugin("memory2.so?export=big"), QBLK_OPEN_RDWR, &dev, options("format", "raw", NULL)));
    OK(qblk_zero(dev, (UINT64_C(8) << 30) - 3, 1, QBLK_REQ_MAY_TRIM | QBLK_REQ_FUA));
    OK(qblk_trim(dev, UINT64_C(8) << 30, 0, 0));
    CHECK_INT(qblk_extents(dev, UINT64_C(8) << 30, 0, 0, e, 8), 1);
    CHECK_INT(e[0].length, UINT64_C(8) << 30);
    OK(qblk_close(dev));
}

static void functions(void)
{
    qblk *dev;
    qblk_info info;
    OK(qblk_open(plugin("flat.so"), QBLK_OPEN_RDWR, &dev));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 1 << 20);
    /* By the flags that pwrite2 takes; nothing can be flushed. */
    CHECK_INT(info.can_fua, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_flush, QBLK_CAN_NOT);
    has_property(dev, "plugin.name", "flat");
    has_property(dev, "plugin.api-version", "functions");
    use(dev);
    OK(qblk_close(dev));
    FAILS(qblk_open(plugin("flat.so?size=1"), 0, &dev), -EINVAL, "takes no settings");
}

/* --- in the program ----------------------------------------------------------------------- */

static char disk[1 << 20];
static int opened, closed;

static void *own_open(void *opaque, uint32_t flags)
{
    (void)flags;
    opened++;
    return opaque;
}
static void own_close(void *handle)
{
    CHECK(handle == disk);
    closed++;
}
static int64_t own_size(void *handle)
{
    (void)handle;
    return sizeof disk;
}
static int own_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy(buf, (char *)handle + offset, count);
    return 0;
}
static int own_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy((char *)handle + offset, buf, count);
    return 0;
}

static void in_the_program(void)
{
    qblk *dev, *other;
    qblk_plugin own, bad;
    char buf[8];
    memset(&own, 0, sizeof own);
    FAILS(QBLK_REGISTER_PLUGIN(&own, disk), -EINVAL, "open");
    own.name = "own";
    own.thread_model = QBLK_THREAD_PARALLEL;
    own.open = own_open;
    own.close = own_close;
    own.get_size = own_size;
    FAILS(QBLK_REGISTER_PLUGIN(&own, disk), -EINVAL, "pread");
    own.pread = own_pread;
    own.pwrite = own_pwrite;
    bad = own;
    bad.name = NULL;
    FAILS(QBLK_REGISTER_PLUGIN(&bad, disk), -EINVAL, "name");
    bad.name = "a/b";
    FAILS(QBLK_REGISTER_PLUGIN(&bad, disk), -EINVAL, "'a/b'");
    bad.name = "bad";
    bad.thread_model = -1;
    FAILS(QBLK_REGISTER_PLUGIN(&bad, disk), -EINVAL, "thread_model is -1");
    FAILS(qblk_register_plugin(NULL, NULL), -EINVAL, "NULL");
    memset(&bad, 0, sizeof bad);
    FAILS(qblk_register_plugin(&bad, NULL), -EINVAL, "neither a size nor a version");
    bad._struct_size = sizeof bad;
    bad._api_version = 3;
    FAILS(qblk_register_plugin(&bad, NULL), -EINVAL, "version 3");
    OK(QBLK_REGISTER_PLUGIN(&own, disk));
    FAILS(QBLK_REGISTER_PLUGIN(&own, disk), -EEXIST, "'own'");
    memset(&own, 0xff, sizeof own); /* it was copied */

    OK(qblk_create("x", "raw", 1 << 20, NULL));
    OK(qblk_open("plugin:own", QBLK_OPEN_RDWR, &dev));
    use(dev);
    OK(qblk_pwrite(dev, "mine", 4, 100));
    CHECK_MEM(disk + 100, "mine", 4);
    FAILS(qblk_unregister_plugin("own"), -EBUSY, "open");
    OK(qblk_context_open(dev, NULL, 0, &other));
    CHECK_INT(opened, 1);
    OK(qblk_close(dev));
    CHECK_INT(closed, 0);
    OK(qblk_pread(other, buf, 4, 100));
    CHECK_MEM(buf, "mine", 4);
    OK(qblk_reopen(other, QBLK_OPEN_RDWR));
    CHECK_INT(opened, 2);
    CHECK_INT(closed, 1);
    OK(qblk_close(other));
    CHECK_INT(closed, 2);
    /* A description reads, and closes what it opened. */
    OK(qblk_open("plugin:own", QBLK_OPEN_INFO_ONLY, &dev));
    OK(qblk_close(dev));
    CHECK_INT(opened, closed);

    /* An image in it, by another name: a format, or below one. */
    CHECK_SH("cp x y");
    OK(qblk_create("q", "qcow2", 1 << 20, NULL));
    int fd = open("q", O_RDONLY | O_CLOEXEC);
    CHECK(read(fd, disk, sizeof disk) > 65536);
    close(fd);
    OK(qblk_open("plugin:own", QBLK_OPEN_RDWR, &dev));
    qblk_info info;
    OK(qblk_get_info(dev, &info));
    CHECK_STR(info.format, "qcow2");
    CHECK_STR(info.driver, "plugin");
    OK(qblk_pwrite(dev, "inside", 6, 500000));
    OK(qblk_pread(dev, buf, 6, 500000));
    CHECK_MEM(buf, "inside", 6);
    OK(qblk_close(dev));
    OK(create_opt("top", "qcow2", 1 << 20, options("backing-file", "x", "backing-fmt", "raw", NULL)));
    OK(open_opt("top", QBLK_OPEN_RDWR, &dev, options("backing-file", "plugin:own", "backing.format", "qcow2", NULL)));
    OK(qblk_pread(dev, buf, 6, 500000));
    CHECK_MEM(buf, "inside", 6);
    OK(qblk_close(dev));

    /* No image has a plugin loaded, whatever the policy. */
    CHECK_SH("cp x bbbbbbbbbb");
    OK(create_opt("evil", "qcow2", 1 << 20, options("backing-file", "bbbbbbbbbb", "backing-fmt", "raw", NULL)));
    CHECK_SH("sed -i s/bbbbbbbbbb/plugin:own/ evil");
    int before = opened;
    FAILS(qblk_open("evil", 0, &dev), QBLK_EPOLICY, "no image has code loaded");
    FAILS(open_opt("evil", 0, &dev, options("implicit-open", "any", NULL)), QBLK_EPOLICY, "no image has code loaded");
    CHECK_INT(opened, before);

    OK(qblk_unregister_plugin("own"));
    FAILS(qblk_unregister_plugin("own"), -ENOENT, "'own'");
    FAILS(qblk_open("plugin:own", 0, &dev), -ENOENT, "/own'");
}

static void names(void)
{
    qblk *dev;
    make_file("text.so", "no object", 9, 100);
    CHECK_INT(mkfifo("fifo.so", 0600), 0);
    FAILS(qblk_open("plugin:", 0, &dev), -EINVAL, "no plugin");
    FAILS(qblk_open("plugin:gone.so", 0, &dev), -ENOENT, "gone.so");
    FAILS(qblk_open("plugin:./gone.so", 0, &dev), -ENOENT, "gone.so");
    FAILS(qblk_open("plugin:/", 0, &dev), -EISDIR, "loading a plugin");
    FAILS(qblk_open("plugin:fifo.so", 0, &dev), -EACCES, "fifo.so");
    FAILS(qblk_open("plugin:text.so", 0, &dev), -ELIBACC, "text.so");
    /* Never along the path of libraries. */
    FAILS(qblk_open("plugin:libc.so.6", 0, &dev), -ENOENT, "libc.so.6");
    /* From here, and to be found again from elsewhere; % and ? in its name. */
    CHECK_SH("cp \"$QBLK_TEST_PLUGINS/memory1.so\" 'a?b%%.so'");
    OK(qblk_open("plugin:a%3fb%25.so?size=64k", 0, &dev));
    CHECK_INT(mkdir("sub", 0700), 0);
    CHECK_INT(chdir("sub"), 0);
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    CHECK_INT(chdir(".."), 0);
    OK(qblk_close(dev));
}

static int count_exports(void *opaque, const char *name, const char *description)
{
    (void)description;
    strcat((char *)opaque, name);
    return 0;
}

static void exports(void)
{
    char all[64] = "";
    CHECK_INT(qblk_nbd_list(plugin("memory2.so"), NULL, count_exports, all), 3);
    CHECK_STR(all, "abbig");
    FAILS(qblk_nbd_list(plugin("memory1.so?size=1M"), NULL, count_exports, all), -ENOTSUP, "exports");
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    version_1();
    version_2();
    functions();
    in_the_program();
    names();
    exports();
    return 0;
}
