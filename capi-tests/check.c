/* Checking: a sound image is said to be; a damaged one is repaired, in place too; who is told may stop it. */
#include "test.h"

static int calls, stop_at;

static int told(void *opaque, uint64_t done, uint64_t total)
{
    CHECK(opaque == &calls);
    CHECK(done <= total);
    return ++calls == stop_at;
}

static void poke(const char *name, long at, const void *bytes, size_t count)
{
    FILE *f = fopen(name, "r+b");
    CHECK(f != NULL);
    CHECK(fseek(f, at, SEEK_SET) == 0 && fwrite(bytes, 1, count, f) == count);
    CHECK(fclose(f) == 0);
}

static const unsigned char zeroes[8] = {0}, corrupt_mark[8] = {0, 0, 0, 0, 0, 0, 0, 2};

int main(int argc, char **argv)
{
    static unsigned char want[200000], found[200000];
    qblk_check_result r;
    qblk *dev, *context;
    char c = 1;

    (void)argc;
    test_begin(argv);
    dev = new_device("qcow2", 1 << 20);
    fill(want, sizeof want, 1);
    OK(qblk_pwrite(dev, want, sizeof want, 0));
    /* On a device that is written to: what is in memory counts. */
    memset(&r, 0xff, sizeof r);
    OK(qblk_check(dev, 0, &r));
    CHECK_INT(r.corruptions, 0);
    CHECK_INT(r.leaks, 0);
    CHECK_INT(r.check_errors, 0);
    CHECK_INT(r.total_clusters, 16);
    CHECK_INT(r.allocated_clusters, 4);
    CHECK_INT(r.compressed_clusters, 0);
    CHECK(r.image_end > 4 * 65536);
    CHECK(all_zero(r.reserved, sizeof r.reserved));

    FAILS(qblk_check(dev, 2, &r), -EINVAL, "flags");
    FAILS(qblk_check(dev, 4, &r), -EINVAL, "flags");
    FAILS(qblk_check(dev, 0, NULL), -EINVAL, "result");
    FAILS(qblk_check(NULL, 0, &r), -EINVAL, "NULL");
    stop_at = 0;
    OK(qblk_check2(dev, 0, told, &calls, &r));
    CHECK(calls > 1);
    calls = 0;
    stop_at = 1;
    FAILS(qblk_check2(dev, QBLK_CHECK_REPAIR_ALL, told, &calls, &r), -ECANCELED, "stopped");
    OK(qblk_pwrite(dev, want, 100, 500000));

    OK(qblk_context_open(dev, NULL, 0, &context));
    OK(qblk_check(context, 0, &r));
    FAILS(qblk_check(context, QBLK_CHECK_REPAIR_LEAKS, &r), -EROFS, "read-only");
    OK(qblk_flush(dev));

    /* A leak, repaired beneath the open handle and its context. */
    poke("qcow2", 2 * 65536 + 2 * 1000, "\0\1", 2);
    OK(qblk_close(context));
    OK(qblk_close(dev));
    dev = must_open("qcow2", QBLK_OPEN_RDWR);
    OK(qblk_check(dev, 0, &r));
    CHECK_INT(r.leaks, 0); /* past the end of the file */
    OK(qblk_check(dev, QBLK_CHECK_REPAIR_ALL, &r));
    OK(qblk_pread(dev, found, sizeof found, 0));
    CHECK_MEM(found, want, sizeof want);
    OK(qblk_close(dev));

    /* No refcounts at all, and a mark: opened to be checked only. */
    poke("qcow2", 65536, zeroes, 8);
    poke("qcow2", 72, corrupt_mark, 8);
    FAILS(qblk_open("qcow2", QBLK_OPEN_RDWR, &dev), QBLK_ECORRUPT, "marked as corrupt");
    FAILS(qblk_open("qcow2", QBLK_OPEN_CHECK | QBLK_OPEN_INFO_ONLY, &dev), -EINVAL, "contradicts");
    dev = must_open("qcow2", QBLK_OPEN_CHECK);
    FAILS(qblk_pread(dev, &c, 1, 0), -EBADF, "QBLK_OPEN_CHECK");
    FAILS(qblk_check(dev, QBLK_CHECK_REPAIR_ALL, &r), -EROFS, "read-only");
    OK(qblk_check(dev, 0, &r));
    CHECK(r.corruptions > 5);
    CHECK_INT(r.corruptions_fixed, 0);
    OK(qblk_close(dev));

    dev = must_open("qcow2", QBLK_OPEN_CHECK | QBLK_OPEN_RDWR);
    FAILS(qblk_pwrite(dev, &c, 1, 0), -EBADF, "QBLK_OPEN_CHECK");
    FAILS(qblk_resize(dev, 1 << 21, 0), -EBADF, "QBLK_OPEN_CHECK");
    OK(qblk_check(dev, QBLK_CHECK_REPAIR_ALL, &r));
    CHECK(r.corruptions > 5);
    CHECK_INT(r.corruptions, r.corruptions_fixed);
    CHECK_INT(r.leaks, r.leaks_fixed);
    CHECK_INT(r.check_errors, 0);
    OK(qblk_check(dev, 0, &r));
    CHECK_INT(r.corruptions + r.leaks, 0);
    /* Now it can be used. */
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pread(dev, found, sizeof found, 0));
    CHECK_MEM(found, want, sizeof want);
    OK(qblk_pwrite(dev, &c, 1, 0));
    OK(qblk_close(dev));

    dev = new_device("raw", 1 << 20);
    FAILS(qblk_check(dev, 0, &r), -ENOTSUP, "check");
    OK(qblk_close(dev));
    dev = must_open("raw", QBLK_OPEN_INFO_ONLY);
    FAILS(qblk_check(dev, 0, &r), -EBADF, "description");
    OK(qblk_close(dev));
    return 0;
}
