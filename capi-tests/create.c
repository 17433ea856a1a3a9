/* Making images: with every option, never over a file in use, and no half file after a failure. */
#include "test.h"
#include <signal.h>
#include <sys/resource.h>

/* Fails, and leaves nothing at a name that was free. */
#define CREATE_FAILS(name, format, size, opts, code, part) \
    do { \
        CHECK(!exists(name)); \
        FAILS(create_opt((name), (format), (size), (opts)), (code), (part)); \
        CHECK(!exists(name)); \
    } while (0)

static void bad_arguments(void)
{
    CREATE_FAILS("new", "qcow9", 1 << 20, NULL, -EINVAL, "'qcow9'");
    CREATE_FAILS("new", "", 1 << 20, NULL, -EINVAL, "format");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("clustersize", "64k", NULL), -EINVAL, "'cluster-size'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("format", "raw", NULL), -EINVAL, "'format'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("cluster-size", "48k", NULL), -EINVAL, "'cluster-size'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("cluster-size", "256", NULL), -EINVAL, "'cluster-size'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("cluster-size", "4M", NULL), -EINVAL, "'cluster-size'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("refcount-bits", "3", NULL), -EINVAL, "'refcount-bits'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("compat", "2.0", NULL), -EINVAL, "'compat'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("lazy-refcounts", "maybe", NULL), -EINVAL, "'lazy-refcounts'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("compat", "0.10", "lazy-refcounts", "on", NULL), -EINVAL,
                 "compat=0.10");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("compression-type", "lzma", NULL), -EINVAL,
                 "'compression-type'");
    CREATE_FAILS("new", "raw", 1 << 20, options("cluster-size", "64k", NULL), -EINVAL, "'cluster-size'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("backing-fmt", "raw", NULL), -EINVAL, "'backing-fmt'");
    CREATE_FAILS("new", "qcow2", 1 << 20, options("backing-file", "gone", "backing-fmt", "raw", NULL),
                 -ENOENT, "gone");
    FAILS(qblk_create("mem:1M", "raw", 1 << 20, NULL), -EINVAL, "mem:");
    FAILS(qblk_create("", "raw", 1 << 20, NULL), -EINVAL, "name is empty");
    FAILS(qblk_create("no/dir/new", "raw", 1, NULL), -ENOENT, "'no/dir/new'");
    CHECK_INT(mkdir("dir", 0755), 0);
    FAILS(qblk_create("dir", "raw", 1, NULL), -EISDIR, "'dir'");
    FAILS(qblk_create("dir", "qcow2", 1 << 20, NULL), -EISDIR, "'dir'");
}

static void existing_files(void)
{
    /* Bad arguments change nothing. */
    make_file("precious", "data", 4, 4);
    FAILS(create_opt("precious", "qcow2", 1 << 20, options("cluster-size", "1", NULL)), -EINVAL, "cluster");
    CHECK_INT(file_size("precious"), 4);
    FAILS(create_opt("precious", "qcow2", 1 << 20, options("exclusive", "on", NULL)), -EEXIST, "'precious'");
    FAILS(create_opt("precious", "raw", 1 << 20, options("exclusive", "on", NULL)), -EEXIST, "'precious'");
    CHECK_INT(file_size("precious"), 4);
    OK(create_opt("fresh", "raw", 5, options("exclusive", "on", NULL)));
    CHECK_INT(file_size("fresh"), 5);
    /* Nothing of what was there before shows in the new image. */
    OK(qblk_create("precious", "raw", 100, NULL));
    char buf[100];
    qblk *dev = must_open("precious", 0);
    OK(qblk_pread(dev, buf, 100, 0));
    CHECK(all_zero(buf, 100));
    OK(qblk_close(dev));

    /* In use, as QEMU marks it: a lock on the byte of the permission to write. */
    make_file("in-use", "data", 4, 4);
    int fd = open("in-use", O_RDWR | O_CLOEXEC);
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_RDLCK, lock.l_whence = SEEK_SET, lock.l_start = 101, lock.l_len = 1;
    CHECK_INT(fcntl(fd, F_OFD_SETLK, &lock), 0);
    FAILS(qblk_create("in-use", "raw", 1 << 20, NULL), QBLK_ELOCKED, "'in-use'");
    FAILS(qblk_create("in-use", "qcow2", 1 << 20, NULL), QBLK_ELOCKED, "'in-use'");
    CHECK_INT(file_size("in-use"), 4);
    close(fd);
    OK(qblk_create("in-use", "qcow2", 1 << 20, NULL));
}

static void a_full_disk(void)
{
    struct rlimit limit, was;
    CHECK_INT(getrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, SIG_IGN);
    limit = was;
    limit.rlim_cur = 1 << 20;
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
    CREATE_FAILS("new", "raw", 1 << 30, NULL, -EFBIG, "'new'");
    CREATE_FAILS("new", "raw", 8 << 20, options("preallocation", "full", NULL), -EFBIG, "'new'");
    CREATE_FAILS("new", "qcow2", 8 << 20, options("preallocation", "full", NULL), -EFBIG, "'new'");
    CREATE_FAILS("new", "qcow2", 8 << 20, options("preallocation", "falloc", NULL), -EFBIG, "'new'");
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &was), 0);
}

static void every_option(void)
{
    static const char *const clusters[] = {"512", "4k", "64k", "2M"};
    static const char *const widths[] = {"1", "2", "4", "8", "16", "32", "64"};
    static const char *const room[] = {"off", "metadata", "falloc", "full"};
    char value[64];
    qblk *dev;
    for (int i = 0; i < 28; i++) {
        const char *width = widths[i % 7], *cluster = clusters[i % 4], *prealloc = room[i / 7];
        OK(create_opt("img", "qcow2", 3000007,
                      options("cluster_size", cluster, "refcount_bits", width, "preallocation", prealloc,
                              "lazy_refcounts", i % 2 ? "on" : "off",
                              "compression_type", i % 3 ? "zlib" : "zstd", "compat", "1.1", NULL)));
        CHECK_SH("qemu-img check -q img");
        dev = must_open("img", QBLK_OPEN_RDWR);
        CHECK_INT(device_size(dev), 3000007);
        CHECK(qblk_get_property(dev, "qcow2.refcount-bits", value, sizeof value) > 0);
        CHECK_STR(value, width);
        CHECK(qblk_get_property(dev, "qcow2.lazy-refcounts", value, sizeof value) > 0);
        CHECK(strcmp(value, i % 2 ? "on" : "off") == 0 || strcmp(value, i % 2 ? "true" : "false") == 0);
        CHECK(qblk_get_property(dev, "qcow2.compression-type", value, sizeof value) > 0);
        CHECK_STR(value, i % 3 ? "zlib" : "zstd");
        OK(qblk_pwrite(dev, "last", 4, 3000003));
        OK(qblk_close(dev));
        CHECK_SH("qemu-img check -q img");
        if (i >= 21)
            CHECK(file_blocks("img") >= 3000007 / 512);
    }
    OK(create_opt("img", "qcow2", 3000007, options("compat", "0.10", NULL)));
    CHECK_SH("qemu-img check -q img && qemu-img info img | grep -q 'compat: 0.10'");
    for (int i = 0; i < 4; i++) {
        if (i == 1)
            continue;
        OK(create_opt("img", "raw", 3000007, options("preallocation", room[i], NULL)));
        CHECK_INT(file_size("img"), 3000007);
        CHECK_INT(file_blocks("img") >= 3000007 / 512, i > 0);
    }
    FAILS(create_opt("img", "raw", 1, options("preallocation", "metadata", NULL)), -EINVAL, "metadata");
}

static void backing(void)
{
    char value[64];
    OK(qblk_create("base", "raw", 70000, NULL));
    /* The format of a backing file that the caller does not tell is found now, and recorded. */
    OK(create_opt("top", "qcow2", 100000, options("backing-file", "base", NULL)));
    qblk *dev = must_open("top", 0);
    qblk_info info;
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.backing_depth, 1);
    CHECK(info.state & QBLK_STATE_HAS_BACKING);
    CHECK(qblk_get_property(dev, "backing-format", value, sizeof value) == 3);
    CHECK_STR(value, "raw");
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q top");
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    bad_arguments();
    existing_files();
    a_full_disk();
    every_option();
    backing();
    return 0;
}
