/* A disk that is full in the middle of a write: it is reported, what was there stays, the image
 * stays consistent, and when space returns work goes on. */
#include "test.h"
#include <signal.h>
#include <sys/resource.h>

static void limit(rlim_t bytes)
{
    static struct rlimit was;
    struct rlimit l;
    if (!was.rlim_max)
        CHECK_INT(getrlimit(RLIMIT_FSIZE, &was), 0);
    l = was;
    if (bytes)
        l.rlim_cur = bytes;
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &l), 0);
}

static void fills_up(const char *kind)
{
    enum { BLOCK = 200000, BLOCKS = 50 };
    static unsigned char want[BLOCK], found[BLOCK];
    int done[BLOCKS] = {0}, failed = 0;
    qblk *dev;
    /* The raw file must be able to grow, so it is the qcow2 image that is full, or a short raw one. */
    dev = new_device(kind, (uint64_t)BLOCK * BLOCKS);
    limit(4 << 20);
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        int rc = qblk_pwrite(dev, want, BLOCK, (uint64_t)i * BLOCK);
        CHECK(rc == 0 || rc == -EFBIG || rc == -ENOSPC);
        done[i] = rc == 0;
        if (rc) {
            failed++;
            CHECK(begins_with_a_function(qblk_get_error()));
            CHECK_HAS(qblk_get_error(), kind);
        }
    }
    CHECK(failed > 0 && failed < BLOCKS);
    limit(0);
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        if (!done[i])
            OK(qblk_pwrite(dev, want, BLOCK, (uint64_t)i * BLOCK));
        OK(qblk_pread(dev, found, BLOCK, (uint64_t)i * BLOCK));
        CHECK_MEM(found, want, BLOCK);
    }
    OK(qblk_flush(dev));
    OK(qblk_close(dev));
    dev = must_open(kind, 0);
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        OK(qblk_pread(dev, found, BLOCK, (uint64_t)i * BLOCK));
        CHECK_MEM(found, want, BLOCK);
    }
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    /* The limit on a file's size stands for the disk's; its signal would end the program. */
    signal(SIGXFSZ, SIG_IGN);
    fills_up("raw");
    fills_up("qcow2");
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
