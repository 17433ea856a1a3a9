/* Scattered memory: any split of a range into pieces gives the same bytes as one piece. */
#include "test.h"

enum { SIZE = 300000 };

static void splits(const char *kind)
{
    static unsigned char want[SIZE], pieces[SIZE], found[SIZE];
    static struct iovec iov[3000];
    qblk *dev = new_device(kind, SIZE + 100);
    uint64_t state = 3;
    for (int round = 0; round < 40; round++) {
        const size_t total = random_next(&state) % SIZE;
        const uint64_t at = random_next(&state) % (SIZE + 100 - total);
        /* Many small pieces (more than one system call takes), few large ones, empty ones between. */
        const size_t largest = round % 3 == 0 ? 200 : 100000;
        int n = 0;
        size_t done = 0;
        fill(want, total, (uint64_t)round + 1);
        while (done < total && n < 2998) {
            size_t len = random_next(&state) % largest;
            if (len > total - done || n == 2997)
                len = total - done;
            if (random_next(&state) % 5 == 0) {
                iov[n].iov_base = NULL, iov[n++].iov_len = 0;
                continue;
            }
            iov[n].iov_base = pieces + done, iov[n++].iov_len = len;
            done += len;
        }
        if (done < total)
            continue;
        memcpy(pieces, want, total);
        OK(qblk_pwritev(dev, iov, n, at, round % 4 ? 0 : QBLK_REQ_FUA));
        OK(qblk_pread(dev, found, total, at));
        CHECK_MEM(found, want, total);
        memset(pieces, 0, total);
        OK(qblk_preadv(dev, iov, n, at, 0));
        CHECK_MEM(pieces, want, total);
        /* The pieces are as the caller made them. */
        size_t sum = 0;
        for (int i = 0; i < n; i++)
            sum += iov[i].iov_len;
        CHECK_INT(sum, total);
    }
    OK(qblk_close(dev));
}

static void limits(void)
{
    static unsigned char buf[70000];
    static struct iovec many[65537];
    qblk *dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    for (int i = 0; i < 65537; i++)
        many[i].iov_base = buf + i, many[i].iov_len = 1;
    fill(buf, sizeof buf, 1);
    OK(qblk_pwritev(dev, many, 65536, 10, 0));
    memset(buf, 0, sizeof buf);
    OK(qblk_preadv(dev, many, 65536, 10, 0));
    static unsigned char want[70000];
    fill(want, sizeof want, 1);
    CHECK_MEM(buf, want, 65536);
    FAILS(qblk_preadv(dev, many, 65537, 0, 0), -EINVAL, "65537");
    FAILS(qblk_pwritev(dev, many, 65537, 0, 0), -EINVAL, "65537");
    FAILS(qblk_preadv(dev, many, -1, 0, 0), -EINVAL, "-1");
    FAILS(qblk_pwritev(dev, many, INT_MIN, 0, 0), -EINVAL, "iovcnt");
    /* Lengths whose sum wraps around to a small number. */
    struct iovec wraps[3] = {{buf, SIZE_MAX - 10}, {buf, 11}, {buf, 512}};
    FAILS(qblk_preadv(dev, wraps, 3, 0, 0), -EINVAL, "iov");
    FAILS(qblk_pwritev(dev, wraps, 3, 0, 0), -EINVAL, "iov");
    FAILS(qblk_preadv(dev, wraps, 1, 0, 0), -EINVAL, "leave the device");
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    splits(kind);
    CHECK_SH("qemu-img check -q qcow2");
    limits();
    return 0;
}
