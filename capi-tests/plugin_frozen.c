/* Plugins that were compiled when their version was new run under this library, as they are, and so do
 * their sources. RUN: plugin */
#include "test.h"

static char name_[2 * PATH_MAX];

static const char *named(const char *prefix, const char *dir, const char *rest)
{
    const char *path = getenv(dir);
    CHECK(path != NULL);
    snprintf(name_, sizeof name_, "%s%s/%s", prefix, path, rest);
    return name_;
}

static void use(qblk *dev, uint64_t size)
{
    unsigned char a[5000], b[5000];
    qblk_extent e[8];
    CHECK_INT(device_size(dev), size);
    fill(a, sizeof a, size);
    OK(qblk_pwrite2(dev, a, sizeof a, 1234, QBLK_REQ_FUA));
    OK(qblk_zero(dev, 1000, 2000, QBLK_REQ_MAY_TRIM));
    memset(a + 2000 - 1234, 0, 1000);
    OK(qblk_zero(dev, 600, 4000, 0));
    memset(a + 4000 - 1234, 0, 600);
    OK(qblk_trim(dev, 4096, 20000, 0));
    OK(qblk_cache(dev, size, 0, 0));
    OK(qblk_flush(dev));
    OK(qblk_pread(dev, b, sizeof b, 1234));
    CHECK_MEM(b, a, sizeof a);
    CHECK(qblk_extents(dev, size, 0, 0, e, 8) >= 1);
    FAILS(qblk_pread(dev, b, 2, size - 1), -EINVAL, "leave");
}

static void both(const char *dir)
{
    qblk *dev;
    char buf[64];
    OK(qblk_open(named("plugin:", dir, "memory-v1.so?size=1M&fill=7"), QBLK_OPEN_RDWR, &dev));
    CHECK(qblk_get_property(dev, "plugin.api-version", buf, sizeof buf) == 1 && buf[0] == '1');
    OK(qblk_pread(dev, buf, 4, 500));
    CHECK_MEM(buf, "\7\7\7\7", 4);
    use(dev, 1 << 20);
    OK(qblk_close(dev));
    FAILS(qblk_open(named("plugin:", dir, "memory-v1.so"), 0, &dev), -EDOM, "the setting size is missing");
    OK(qblk_open(named("plugin:", dir, "memory-v2.so?export=b"), QBLK_OPEN_RDWR, &dev));
    CHECK(qblk_get_property(dev, "plugin.api-version", buf, sizeof buf) == 1 && buf[0] == '2');
    use(dev, 131072);
    OK(qblk_close(dev));
    OK(open_opt("mem:1M", QBLK_OPEN_RDWR, &dev, options("layers", named("", dir, "layer-v2.so;key=99"), NULL)));
    use(dev, 1 << 20);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    both("QBLK_TEST_PLUGINS");
#if defined(__x86_64__) && defined(__linux__)
    both("QBLK_TEST_FROZEN");
#endif
    return 0;
}
