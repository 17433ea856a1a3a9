/* Two threads write to the same new cluster at the same moment: the outcome is that of one after
 * the other, so neither's bytes are lost and no cluster is lost either. */
#include "test.h"
#include <pthread.h>

enum { CLUSTER = 65536 };

static qblk *dev;
static pthread_barrier_t together;
static int rounds;

static void *work(void *arg)
{
    const uint64_t half = (uint64_t)(intptr_t)arg;
    unsigned char bytes[512];
    for (int i = 0; i < rounds; i++) {
        fill(bytes, sizeof bytes, (uint64_t)i * 2 + half);
        pthread_barrier_wait(&together);
        /* Neighbours in one cluster, in any order. */
        OK(qblk_pwrite(dev, bytes, sizeof bytes, (uint64_t)i * CLUSTER + 1000 + half * 512));
    }
    return NULL;
}

static void two_threads(void)
{
    unsigned char want[1024], found[1024];
    pthread_t t[2];
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&t[i], NULL, work, (void *)(intptr_t)i), 0);
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    for (int i = 0; i < rounds; i++) {
        fill(want, 512, (uint64_t)i * 2);
        fill(want + 512, 512, (uint64_t)i * 2 + 1);
        OK(qblk_pread(dev, found, sizeof found, (uint64_t)i * CLUSTER + 1000));
        CHECK_MEM(found, want, sizeof found);
    }
    /* Around them is what was there before. */
    OK(qblk_pread(dev, found, 1000, 0));
}

int main(int argc, char **argv)
{
    static unsigned char below[CLUSTER], found[CLUSTER];
    (void)argc;
    test_begin(argv);
    rounds = quick() ? 100 : 2000;
    CHECK_INT(pthread_barrier_init(&together, NULL, 2), 0);

    dev = new_device("qcow2", (uint64_t)rounds * CLUSTER);
    two_threads();
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");

    /* Over a backing image each must also copy what is around its bytes. */
    OK(qblk_create("base", "raw", (uint64_t)rounds * CLUSTER, NULL));
    dev = must_open("base", QBLK_OPEN_RDWR);
    fill(below, sizeof below, 77);
    for (int i = 0; i < rounds; i++)
        OK(qblk_pwrite(dev, below, sizeof below, (uint64_t)i * CLUSTER));
    OK(qblk_close(dev));
    OK(create_opt("over", "qcow2", (uint64_t)rounds * CLUSTER,
                  options("backing-file", "base", "backing-fmt", "raw", NULL)));
    dev = must_open("over", QBLK_OPEN_RDWR);
    two_threads();
    for (int i = 0; i < rounds; i++) {
        fill(below + 1000, 512, (uint64_t)i * 2);
        fill(below + 1512, 512, (uint64_t)i * 2 + 1);
        OK(qblk_pread(dev, found, sizeof found, (uint64_t)i * CLUSTER));
        CHECK_MEM(found, below, sizeof found);
    }
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q over");
    return 0;
}
