/* Four threads on one handle, each in regions of its own that share clusters with its neighbours':
 * every byte is what its thread wrote last. */
#include "test.h"
#include <pthread.h>

enum { THREADS = 4, PIECE = 3000, PIECES = 400 };

static qblk *dev;

/* Piece i of thread t lies between those of the other threads. */
static uint64_t place(int t, int i)
{
    return ((uint64_t)i * THREADS + (uint64_t)t) * PIECE;
}

static void *work(void *arg)
{
    const int t = (int)(intptr_t)arg, rounds = quick() ? 300 : 4000;
    static unsigned char last[THREADS][PIECES];
    unsigned char want[PIECE], found[PIECE];
    uint64_t state = (uint64_t)t + 1;
    for (int n = 0; n < rounds; n++) {
        const int i = (int)(random_next(&state) % PIECES);
        const unsigned char seed = (unsigned char)(random_next(&state) % 200 + 1);
        switch (random_next(&state) % 8) {
        case 0:
            OK(qblk_zero(dev, PIECE, place(t, i), random_next(&state) % 2 ? QBLK_REQ_MAY_TRIM : 0));
            last[t][i] = 0;
            break;
        case 1: {
            fill(want, PIECE, seed);
            struct iovec iov[2] = {{want, 1000}, {want + 1000, PIECE - 1000}};
            OK(qblk_pwritev(dev, iov, 2, place(t, i), 0));
            last[t][i] = seed;
            break;
        }
        case 2:
        case 3:
        case 4:
            fill(want, PIECE, seed);
            OK(qblk_pwrite(dev, want, PIECE, place(t, i)));
            last[t][i] = seed;
            break;
        default:
            if (last[t][i])
                fill(want, PIECE, last[t][i]);
            else
                memset(want, 0, PIECE);
            OK(qblk_pread(dev, found, PIECE, place(t, i)));
            CHECK_MEM(found, want, PIECE);
        }
        if (n % 500 == 499)
            OK(qblk_flush(dev));
    }
    for (int i = 0; i < PIECES; i++) {
        if (last[t][i])
            fill(want, PIECE, last[t][i]);
        else
            memset(want, 0, PIECE);
        OK(qblk_pread(dev, found, PIECE, place(t, i)));
        CHECK_MEM(found, want, PIECE);
        last[t][i] = 0;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t t[THREADS];
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    {
        dev = new_device(kind, place(0, PIECES) + 1);
        for (int i = 0; i < THREADS; i++)
            CHECK_INT(pthread_create(&t[i], NULL, work, (void *)(intptr_t)i), 0);
        for (int i = 0; i < THREADS; i++)
            CHECK_INT(pthread_join(t[i], NULL), 0);
        OK(qblk_close(dev));
    }
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
