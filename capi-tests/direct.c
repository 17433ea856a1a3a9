/* QBLK_OPEN_DIRECT: any offset, count and memory, compared with a plain array; and neighbours in one
 * block, written by two threads, do not lose each other's bytes. */
#include "test.h"
#include <pthread.h>

enum { SIZE = 1000007 };
static qblk *dev;

static void model(const char *kind)
{
    static unsigned char want[SIZE], buf[SIZE + 64];
    uint64_t state = 9;
    OK(qblk_create(kind, kind, SIZE, NULL));
    OK(open_opt(kind, QBLK_OPEN_RDWR | QBLK_OPEN_DIRECT, &dev, options("format", kind, NULL)));
    memset(want, 0, SIZE);
    for (int i = 0; i < 400; i++) {
        const uint64_t r = random_next(&state);
        size_t n = r % 3 ? r / 3 % 5000 : r / 3 % 300000;
        uint64_t at = random_next(&state) % SIZE;
        if (i % 4 == 0)
            at &= ~UINT64_C(4095), n &= ~(size_t)4095;
        if (n > SIZE - at)
            n = SIZE - (size_t)at;
        unsigned char *mem = buf + random_next(&state) % 64;
        switch (i % 5) {
        case 0:
        case 1:
            fill(mem, n, (uint64_t)i);
            memcpy(want + at, mem, n);
            OK(qblk_pwrite2(dev, mem, n, at, i % 3 ? 0 : QBLK_REQ_FUA));
            break;
        case 2:
            OK(qblk_zero(dev, n, at, QBLK_REQ_MAY_TRIM));
            memset(want + at, 0, n);
            break;
        default:
            OK(qblk_pread(dev, mem, n, at));
            CHECK_MEM(mem, want + at, n);
        }
    }
    OK(qblk_pread(dev, buf, SIZE, 0));
    CHECK_MEM(buf, want, SIZE);
    OK(qblk_close(dev));
    dev = must_open(kind, 0);
    CHECK_INT(device_size(dev), SIZE);
    OK(qblk_pread(dev, buf, SIZE, 0));
    CHECK_MEM(buf, want, SIZE);
    OK(qblk_close(dev));
}

static void *neighbour(void *arg)
{
    const uint64_t me = (uint64_t)(intptr_t)arg;
    unsigned char want[100], found[100];
    for (uint64_t i = 0; i < 300; i++) {
        fill(want, 100, i * 2 + me);
        OK(qblk_pwrite(dev, want, 100, i % 50 * 200 + me * 100));
        OK(qblk_pread(dev, found, 100, i % 50 * 200 + me * 100));
        CHECK_MEM(found, want, 100);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t t[2];
    (void)argc;
    test_begin(argv);
    model("raw");
    CHECK_INT(file_size("raw"), SIZE);
    model("qcow2");
    CHECK_SH("qemu-img check -q qcow2");
    dev = must_open("raw", QBLK_OPEN_RDWR | QBLK_OPEN_DIRECT);
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&t[i], NULL, neighbour, (void *)(intptr_t)i), 0);
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    OK(qblk_close(dev));
    return 0;
}
