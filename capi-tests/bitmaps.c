/* Dirty bitmaps: added, listed, changed, asked where the disk is dirty, and kept in the image. */
#include "test.h"

enum { C = 65536 };

/* The bitmap of that name. */
static qblk_bitmap one(qblk *dev, const char *name)
{
    qblk_bitmap all[8];
    const int64_t n = qblk_bitmap_list(dev, all, 8);
    CHECK(n >= 0 && n <= 8);
    for (int64_t i = 0; i < n; i++) {
        CHECK(all_zero(all[i].reserved, sizeof all[i].reserved));
        CHECK(all[i].flags & QBLK_BITMAP_PERSISTENT);
        if (strcmp(all[i].name, name) == 0)
            return all[i];
    }
    FAIL_("no bitmap %s", name);
}

static void changes(const char *path)
{
    static unsigned char data[2 * C];
    qblk_extent e[8];
    qblk_bitmap b, two[2];
    qblk *dev = must_open(path, QBLK_OPEN_RDWR);
    CHECK_INT(qblk_bitmap_list(dev, NULL, 0), 0);
    OK(qblk_bitmap_add(dev, "one", 0, 0));
    OK(qblk_bitmap_add(dev, "two", 512, QBLK_BITMAP_DISABLED));
    CHECK_INT(qblk_bitmap_list(dev, NULL, 0), 2);
    CHECK_INT(qblk_bitmap_list(dev, two, 1), 2);
    OK(qblk_pwrite(dev, data, 2 * C, 10 * C));
    OK(qblk_bitmap_enable(dev, "two"));
    OK(qblk_pwrite(dev, data, 1, 20 * C));
    b = one(dev, "one");
    CHECK(b.granularity == C && b.dirty == 3 * C);
    CHECK_INT(b.flags, QBLK_BITMAP_ENABLED | QBLK_BITMAP_PERSISTENT);
    CHECK(one(dev, "two").dirty == 512);

    /* Where it is dirty, alone and with where bytes are. */
    CHECK_INT(qblk_extents2(dev, 100 * C, 0, "one", QBLK_EXTENTS_BITMAP, e, 8), 5);
    CHECK(e[0].flags == 0 && e[0].length == 10 * C);
    CHECK(e[1].flags == QBLK_EXTENT_DIRTY && e[1].length == 2 * C && e[1].host_offset == 0);
    CHECK(e[3].flags == QBLK_EXTENT_DIRTY && e[3].offset == 20 * C && e[3].length == C);
    CHECK_INT(qblk_extents2(dev, C, 20 * C, "two", 0, e, 8), 2);
    CHECK(e[0].length == 512 && (e[0].flags & QBLK_EXTENT_DIRTY) && (e[0].flags & QBLK_EXTENT_DATA));
    CHECK(e[1].length == C - 512 && e[1].flags == (e[0].flags & ~(uint32_t)QBLK_EXTENT_DIRTY));
    CHECK_INT(qblk_extents2(dev, 100 * C, 0, NULL, 0, e, 8), qblk_extents(dev, 100 * C, 0, 0, e, 8));
    CHECK_INT(qblk_extents2(dev, 100 * C, 0, "one", QBLK_EXTENTS_BITMAP, NULL, 0), 0);

    OK(qblk_bitmap_clear(dev, "one"));
    CHECK(one(dev, "one").dirty == 0);
    OK(qblk_bitmap_merge(dev, "one", "two"));
    CHECK(one(dev, "one").dirty == C);
    OK(qblk_bitmap_disable(dev, "one"));
    OK(qblk_bitmap_disable(dev, "one"));
    CHECK_INT(one(dev, "one").flags, QBLK_BITMAP_PERSISTENT);
    OK(qblk_close(dev));

    /* It is there again, and tells of itself to who only describes the image. */
    dev = must_open(path, QBLK_OPEN_INFO_ONLY);
    CHECK(one(dev, "one").dirty == UINT64_MAX);
    CHECK_INT(qblk_bitmap_clear(dev, "one"), -EBADF);
    OK(qblk_close(dev));
    dev = must_open(path, 0);
    CHECK(one(dev, "two").dirty == 512);
    CHECK_INT(qblk_bitmap_clear(dev, "one"), -EROFS);
    OK(qblk_close(dev));
}

static void refusals(const char *path)
{
    char name[1100];
    qblk_extent e[8];
    qblk *dev = must_open(path, QBLK_OPEN_RDWR);
    memset(name, 'n', sizeof name);
    name[1024] = 0;
    CHECK_INT(qblk_bitmap_add(dev, name, 0, 0), -EINVAL);
    name[1023] = 0;
    OK(qblk_bitmap_add(dev, name, 0, 0));
    CHECK(one(dev, name).dirty == 0);
    OK(qblk_bitmap_remove(dev, name));
    CHECK_INT(qblk_bitmap_remove(dev, name), -ENOENT);
    CHECK_INT(qblk_bitmap_add(dev, "one", 0, 0), -EEXIST);
    CHECK(strstr(qblk_get_error(), "'one'") != NULL);
    CHECK_INT(qblk_bitmap_add(dev, "", 0, 0), -EINVAL);
    CHECK_INT(qblk_bitmap_add(dev, "x", 1000, 0), -EINVAL);
    CHECK_INT(qblk_bitmap_add(dev, "x", 0, 2), -EINVAL);
    CHECK_INT(qblk_bitmap_merge(dev, "one", "none"), -ENOENT);
    CHECK_INT(qblk_extents2(dev, C, 0, "none", 0, e, 8), -ENOENT);
    CHECK_INT(qblk_extents2(dev, C, 0, NULL, QBLK_EXTENTS_BITMAP, e, 8), -EINVAL);
    CHECK_INT(qblk_extents2(dev, C, 0, "one", 2, e, 8), -EINVAL);
    CHECK_INT(qblk_extents2(dev, 1000 * C, 0, "one", 0, e, 8), -EINVAL);
    CHECK_INT(qblk_extents2(dev, C, 0, "one", 0, NULL, 8), -EINVAL);
    CHECK_INT(qblk_bitmap_list(dev, NULL, 1), -EINVAL);
    CHECK_INT(qblk_bitmap_add(dev, NULL, 0, 0), -EINVAL);
    CHECK_INT(qblk_bitmap_remove(dev, NULL), -EINVAL);
    CHECK_INT(qblk_bitmap_enable(dev, NULL), -EINVAL);
    CHECK_INT(qblk_bitmap_disable(dev, NULL), -EINVAL);
    CHECK_INT(qblk_bitmap_clear(dev, NULL), -EINVAL);
    CHECK_INT(qblk_bitmap_merge(dev, NULL, "one"), -EINVAL);
    CHECK_INT(qblk_bitmap_merge(dev, "one", NULL), -EINVAL);
    CHECK_INT(qblk_bitmap_list(NULL, NULL, 0), -EINVAL);
    CHECK_INT(qblk_bitmap_remove(NULL, "one"), -EINVAL);
    OK(qblk_close(dev));
    dev = new_device("raw", C);
    CHECK_INT(qblk_bitmap_list(dev, NULL, 0), 0);
    CHECK_INT(qblk_bitmap_add(dev, "x", 0, 0), -ENOTSUP);
    CHECK_INT(qblk_extents2(dev, C, 0, "x", 0, e, 8), -ENOTSUP);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    CHECK_INT(qblk_supports("bitmaps"), 1);
    OK(qblk_create("disk.qcow2", "qcow2", 100 * C, NULL));
    changes("disk.qcow2");
    refusals("disk.qcow2");
    CHECK_SH("qemu-img check -q disk.qcow2");
    puts("bitmaps: ok");
    return 0;
}
