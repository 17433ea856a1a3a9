/* Copying: all of it arrives, compressed if so asked, from the device or one image of a chain; it tells
   how far it is, stops when it is told to, and refuses what makes no sense. */
#include "test.h"

#define SIZE 5000000

struct told {
    uint64_t last, calls, stop_after;
};

static int tell(void *opaque, uint64_t done, uint64_t total)
{
    struct told *told = (struct told *)opaque;
    CHECK_INT(total, SIZE);
    CHECK(done >= told->last && done <= total);
    told->last = done;
    return ++told->calls > told->stop_after;
}

int main(int argc, char **argv)
{
    static unsigned char want[SIZE], found[SIZE];
    struct told told = {0, 0, UINT64_MAX};
    qblk_options *o;
    qblk *from, *to;
    qblk_extent e[4];
    (void)argc;
    test_begin(argv);

    memset(want + 1000000, 'x', 3000000);
    fill(want + 2000000, 1000000, 7);
    from = new_device("qcow2", SIZE);
    OK(qblk_pwrite(from, want + 1000000, 3000000, 1000000));
    OK(qblk_create("to.qcow2", "qcow2", SIZE, NULL));
    to = must_open("to.qcow2", QBLK_OPEN_RDWR);
    OK(qblk_copy(from, to, NULL, 0, tell, &told));
    CHECK_INT(told.last, SIZE);
    OK(qblk_pread(to, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);

    o = options("compress", "on", "threads", "3", NULL);
    OK(qblk_copy(from, to, o, 0, NULL, NULL));
    OK(qblk_pread(to, found, SIZE, 0));
    CHECK_MEM(found, want, SIZE);
    CHECK(qblk_extents(to, 65536, 1048576, 0, e, 4) > 0);
    CHECK(e[0].flags & QBLK_EXTENT_COMPRESSED);
    OK(qblk_options_set(o, "threads", "100"));
    FAILS(qblk_copy(from, to, o, 0, NULL, NULL), -EINVAL, "'threads'");
    OK(qblk_options_set(o, "threads", NULL));
    OK(qblk_options_set(o, "cluster-size", "64k"));
    FAILS(qblk_copy(from, to, o, 0, NULL, NULL), -EINVAL, "copying");
    qblk_options_free(o);

    memset(&told, 0, sizeof told);
    FAILS(qblk_copy(from, to, NULL, 0, tell, &told), -ECANCELED, "stopped");
    FAILS(qblk_copy(NULL, to, NULL, 0, NULL, NULL), -EINVAL, "NULL");
    FAILS(qblk_copy(from, NULL, NULL, 0, NULL, NULL), -EINVAL, "NULL");
    FAILS(qblk_copy(from, from, NULL, 0, NULL, NULL), -EINVAL, "the target is the source");
    FAILS(qblk_copy(from, to, NULL, 2, NULL, NULL), -EINVAL, "mean nothing");
    OK(qblk_resize(to, SIZE - 1, QBLK_RESIZE_SHRINK));
    FAILS(qblk_copy(from, to, NULL, 0, NULL, NULL), -EINVAL, "too few");
    OK(qblk_resize(to, SIZE, 0));
    OK(qblk_close(to));
    to = must_open("to.qcow2", 0);
    FAILS(qblk_copy(from, to, NULL, 0, NULL, NULL), -EROFS, "read-only");
    OK(qblk_close(to));
    OK(qblk_close(from));

    /* One image of a chain: what is below is not copied. */
    OK(create_opt("top.qcow2", "qcow2", SIZE, options("backing-file", "to.qcow2", NULL)));
    from = must_open("top.qcow2", QBLK_OPEN_RDWR);
    OK(qblk_pwrite(from, want + 2000000, 65536, 131072));
    to = new_device("qcow2", SIZE);
    OK(qblk_copy(from, to, NULL, QBLK_COPY_SHALLOW, NULL, NULL));
    OK(qblk_pread(to, found, SIZE, 0));
    CHECK(all_zero(found, 131072) && all_zero(found + 196608, SIZE - 196608));
    CHECK_MEM(found + 131072, want + 2000000, 65536);
    OK(qblk_close(to));
    OK(qblk_close(from));
    return 0;
}
