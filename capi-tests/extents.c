/* Where bytes live: holes, data, zeroes, compressed, and from which image of a chain. */
#include "test.h"

enum { C = 65536 };

/* The extents of a range, checked to follow one another and to cover it. */
static int describe(qblk *dev, uint64_t count, uint64_t offset, qblk_extent *e, int max)
{
    const int64_t n = qblk_extents(dev, count, offset, 0, e, (size_t)max);
    uint64_t at = offset;
    CHECK(n >= 0 && n < max);
    for (int64_t i = 0; i < n; i++) {
        CHECK(e[i].offset == at && e[i].length > 0);
        CHECK(all_zero(e[i].reserved, sizeof e[i].reserved));
        at += e[i].length;
    }
    CHECK_INT(at, offset + count);
    return (int)n;
}

/* An extent's flags without the address. */
static uint32_t flags(const qblk_extent *e)
{
    return e->flags & ~(uint32_t)QBLK_EXTENT_HOST;
}

static void raw(void)
{
    qblk_extent e[16];
    static unsigned char data[C];
    qblk *dev = new_device("raw", 100 * C);
    fill(data, sizeof data, 1);
    OK(qblk_pwrite(dev, data, sizeof data, 10 * C));
    OK(qblk_flush(dev));
    CHECK_INT(describe(dev, 100 * C, 0, e, 16), 3);
    CHECK_INT(e[0].flags, QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_ZERO);
    CHECK_INT(e[1].flags, QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_DATA | QBLK_EXTENT_HOST);
    CHECK(e[1].offset == 10 * C && e[1].length == C && e[1].host_offset == 10 * C);
    CHECK_INT(e[2].flags, QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_ZERO);
    OK(qblk_close(dev));
}

static void qcow2(void)
{
    static unsigned char data[2 * C];
    unsigned char byte, there[16];
    qblk_extent e[16], some[2];
    qblk *dev = new_device("qcow2", 100 * C + 7);
    fill(data, sizeof data, 2);
    CHECK_INT(describe(dev, 100 * C + 7, 0, e, 16), 1);
    CHECK_INT(e[0].flags, QBLK_EXTENT_ZERO);
    OK(qblk_pwrite(dev, data, 2 * C, 10 * C));
    OK(qblk_pwrite(dev, data, 100, 20 * C));
    OK(qblk_pwrite(dev, data, C, 30 * C));
    OK(qblk_zero(dev, C, 30 * C, 0));
    CHECK_INT(describe(dev, 100 * C + 7, 0, e, 16), 7);
    CHECK_INT(e[0].flags, QBLK_EXTENT_ZERO);
    /* Neighbours that lie side by side in the file are one. */
    CHECK(e[1].offset == 10 * C && e[1].length == 2 * C && e[1].depth == 0);
    CHECK_INT(e[1].flags, QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_DATA | QBLK_EXTENT_HOST);
    CHECK(e[3].offset == 20 * C && e[3].length == C);
    CHECK(e[5].offset == 30 * C && e[5].length == C);
    CHECK_INT(flags(&e[5]), QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_ZERO);

    /* host_offset is where the bytes are in the file. */
    OK(qblk_flush(dev));
    int fd = open("qcow2", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_INT(pread(fd, there, 16, (off_t)e[1].host_offset), 16);
    CHECK_MEM(there, data, 16);
    close(fd);

    /* A part of an extent, and going on where the last one ended. */
    CHECK_INT(describe(dev, 5, 10 * C + 3, e, 16), 1);
    CHECK(e[0].length == 5);
    uint64_t at = 0;
    int total = 0;
    while (at < 100 * C + 7) {
        const int64_t n = qblk_extents(dev, 100 * C + 7 - at, at, 0, some, 2);
        CHECK(n >= 1 && n <= 2 && some[0].offset == at);
        at = some[n - 1].offset + some[n - 1].length;
        total += (int)n;
    }
    CHECK_INT(total, 7);
    CHECK_INT(qblk_extents(dev, 100, 0, 0, some, 0), 0);
    CHECK_INT(qblk_extents(dev, 0, 0, 0, some, 2), 0);
    OK(qblk_pread(dev, &byte, 1, 100 * C + 6));
    OK(qblk_close(dev));
}

static void chain(void)
{
    static unsigned char data[C];
    qblk_extent e[32];
    qblk *dev;
    fill(data, sizeof data, 3);
    /* Three images: the lowest raw and short, the middle one with a cluster, the top with one. */
    OK(qblk_create("low", "raw", 4 * C, NULL));
    dev = must_open("low", QBLK_OPEN_RDWR);
    OK(qblk_pwrite(dev, data, C, 0));
    OK(qblk_pwrite(dev, data, C, C));
    OK(qblk_close(dev));
    OK(create_opt("mid", "qcow2", 8 * C, options("backing-file", "low", "backing-fmt", "raw", NULL)));
    dev = must_open("mid", QBLK_OPEN_RDWR);
    OK(qblk_pwrite(dev, data, C, C));
    OK(qblk_close(dev));
    OK(create_opt("top", "qcow2", 8 * C, options("backing-file", "mid", "backing-fmt", "qcow2", NULL)));
    dev = must_open("top", QBLK_OPEN_RDWR);
    OK(qblk_pwrite(dev, data, C, 6 * C));
    OK(qblk_zero(dev, C, 7 * C, 0));

    const int n = describe(dev, 8 * C, 0, e, 32);
    CHECK(n >= 5);
    CHECK(e[0].length == C && e[0].depth == 2 && flags(&e[0]) == QBLK_EXTENT_DATA);
    CHECK(e[1].length == C && e[1].depth == 1 && flags(&e[1]) == QBLK_EXTENT_DATA);
    /* From there to the top's own cluster: a hole of the lowest, then nobody's. */
    for (int i = 2; i < n - 2; i++)
        CHECK(flags(&e[i]) == QBLK_EXTENT_ZERO && e[i].depth > 0);
    CHECK(e[n - 2].offset == 6 * C && e[n - 2].depth == 0);
    CHECK_INT(flags(&e[n - 2]), QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_DATA);
    CHECK_INT(flags(&e[n - 1]), QBLK_EXTENT_ALLOCATED | QBLK_EXTENT_ZERO);
    OK(qblk_close(dev));
}

static void compressed(void)
{
    static unsigned char want[4 * C], found[4 * C];
    static const char *const types[] = {"zlib", "zstd"};
    qblk_extent e[16];
    for (size_t i = 0; i < sizeof want; i++)
        want[i] = (unsigned char)(i / 1000 + 1);
    make_file("plain", want, sizeof want, sizeof want);
    for (int i = 0; i < 2; i++) {
        CHECK_SH("qemu-img convert -q -c -f raw -O qcow2 -o compression_type=%s plain small", types[i]);
        qblk *dev = must_open("small", 0);
        const int n = describe(dev, 4 * C, 0, e, 16);
        for (int j = 0; j < n; j++) {
            CHECK(e[j].flags & QBLK_EXTENT_COMPRESSED);
            CHECK(e[j].flags & QBLK_EXTENT_ALLOCATED);
        }
        OK(qblk_pread(dev, found, sizeof found, 0));
        CHECK_MEM(found, want, sizeof found);
        OK(qblk_close(dev));
    }
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    raw();
    qcow2();
    chain();
    compressed();
    return 0;
}
