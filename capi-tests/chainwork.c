/* Commit and rebase: what is read stays the same, names and flags are looked at, and it can be stopped. */
#include "test.h"

#define SIZE 3000000

static int stop(void *opaque, uint64_t done, uint64_t total)
{
    (void)opaque;
    (void)done;
    (void)total;
    return 1;
}

static int count(void *opaque, uint64_t done, uint64_t total)
{
    CHECK(done <= total);
    ++*(int *)opaque;
    return 0;
}

int main(int argc, char **argv)
{
    static unsigned char want[SIZE], found[SIZE], base[SIZE];
    qblk *dev, *below;
    qblk_extent e[4];
    char name[64];
    int calls = 0;
    (void)argc;
    test_begin(argv);

    fill(base, sizeof base, 1);
    memcpy(want, base, sizeof want);
    below = new_device("raw", SIZE - 1000000);
    OK(qblk_pwrite(below, base, SIZE - 1000000, 0));
    memset(want + SIZE - 1000000, 0, 1000000);
    OK(qblk_close(below));
    OK(create_opt("top", "qcow2", SIZE, options("backing-file", "raw", "backing-fmt", "raw", NULL)));
    dev = must_open("top", QBLK_OPEN_RDWR);
    fill(want + 500000, 300000, 2);
    fill(want + 2500000, 300000, 3);
    OK(qblk_pwrite(dev, want + 500000, 300000, 500000));
    OK(qblk_pwrite(dev, want + 2500000, 300000, 2500000));
    memset(want, 0, 200000);
    OK(qblk_zero(dev, 200000, 0, 0));

    FAILS(qblk_commit(dev, 2, NULL, NULL), -EINVAL, "mean nothing");
    FAILS(qblk_commit(dev, 0, stop, NULL), -ECANCELED, "stopped");
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);
    OK(qblk_commit(dev, QBLK_COMMIT_KEEP, count, &calls));
    CHECK(calls > 0);
    OK(qblk_commit(dev, 0, NULL, NULL));
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);
    CHECK_INT(qblk_extents(dev, 65536, 500000, 0, e, 1), 1);
    CHECK_INT(e[0].depth, 1);
    CHECK_INT(file_size("raw"), SIZE);

    /* To none: all is in the image itself then. */
    FAILS(qblk_rebase(dev, NULL, NULL, 2, NULL, NULL), -EINVAL, "mean nothing");
    FAILS(qblk_rebase(dev, "missing", NULL, 0, NULL, NULL), -ENOENT, "missing");
    FAILS(qblk_rebase(dev, "top", NULL, 0, NULL, NULL), QBLK_ELOCKED, "top");
    FAILS(qblk_rebase(dev, NULL, NULL, 0, stop, NULL), -ECANCELED, "stopped");
    OK(qblk_rebase(dev, NULL, NULL, 0, count, &calls));
    CHECK_INT(qblk_get_property(dev, "backing-filename", name, sizeof name), -ENOENT);
    FAILS(qblk_commit(dev, 0, NULL, NULL), -EINVAL, "no backing");
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);

    /* To another, whose bytes show nowhere. */
    below = new_device("qcow2", SIZE);
    OK(qblk_pwrite(below, base, SIZE, 0));
    OK(qblk_close(below));
    OK(qblk_rebase(dev, "qcow2", NULL, 0, NULL, NULL));
    CHECK_INT(qblk_get_property(dev, "backing-filename", name, sizeof name), 5);
    CHECK_STR(name, "qcow2");
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);
    OK(qblk_close(dev));

    /* Only the name: what is not in the image shows from the other one. */
    OK(qblk_create("new", "qcow2", SIZE, NULL));
    dev = must_open("new", QBLK_OPEN_RDWR);
    OK(qblk_rebase(dev, "qcow2", NULL, QBLK_REBASE_UNSAFE, NULL, NULL));
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, base, SIZE);
    OK(qblk_close(dev));
    dev = must_open("new", 0);
    FAILS(qblk_rebase(dev, NULL, NULL, 0, NULL, NULL), -EROFS, "read-only");
    FAILS(qblk_commit(dev, 0, NULL, NULL), -EROFS, "read-only");
    OK(qblk_close(dev));
    return 0;
}
