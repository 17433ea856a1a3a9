/* Signals: no call fails with -EINTR in a storm of them, and the library changes neither what the
 * program does about signals nor what it blocks. */
#include "test.h"
#include <signal.h>
#include <sys/time.h>
#include <time.h>

static volatile sig_atomic_t storms;

static void handler(int signal)
{
    (void)signal;
    storms = storms + 1;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void storm(const char *kind, uint32_t flags)
{
    static unsigned char buf[1 << 20], want[1 << 20];
    const uint64_t size = 16 << 20;
    qblk *dev;
    uint64_t state = 1;
    /* Under a tool that makes all slow, a faster storm than it can take would let nothing happen. */
    const int pause_us = quick() ? 10000 : 200;
    struct itimerval fast = {{0, pause_us}, {0, pause_us}}, off = {{0, 0}, {0, 0}};
    remove(kind);
    OK(qblk_create(kind, kind, size, NULL));
    OK(qblk_open(kind, QBLK_OPEN_RDWR | flags, &dev));
    storms = 0;
    const double end = now() + (quick() ? 1.5 : 0.7);
    CHECK_INT(setitimer(ITIMER_REAL, &fast, NULL), 0);
    do {
        const size_t n = random_next(&state) % 2 ? 4096 : sizeof buf;
        const uint64_t at = random_next(&state) % (size - n);
        fill(want, 64, random_next(&state));
        memcpy(want + n - 64, want, 64);
        OK(qblk_pwrite(dev, want, n, at));
        OK(qblk_pread(dev, buf, n, at));
        CHECK_MEM(buf, want, n);
        if (random_next(&state) % 16 == 0) {
            OK(qblk_flush(dev));
            OK(qblk_zero(dev, n, at, QBLK_REQ_MAY_TRIM));
        }
        if (random_next(&state) % 16 == 0)
            OK(qblk_reopen(dev, QBLK_OPEN_RDWR | flags));
    } while (now() < end);
    CHECK_INT(setitimer(ITIMER_REAL, &off, NULL), 0);
    CHECK(storms > (quick() ? 10 : 100));
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    struct sigaction action, before[65], after;
    sigset_t blocked, then;
    (void)argc;
    test_begin(argv);
    memset(&action, 0, sizeof action);
    action.sa_handler = handler; /* without SA_RESTART */
    CHECK_INT(sigaction(SIGALRM, &action, NULL), 0);
    sigprocmask(SIG_SETMASK, NULL, &blocked);
    for (int s = 1; s <= 64; s++)
        if (sigaction(s, NULL, &before[s]) != 0)
            before[s].sa_handler = SIG_ERR;

    storm("raw", 0);
    storm("raw", QBLK_OPEN_DIRECT);
    storm("qcow2", 0);

    for (int s = 1; s <= 64; s++)
        if (before[s].sa_handler != SIG_ERR) {
            CHECK_INT(sigaction(s, NULL, &after), 0);
            if (after.sa_handler != before[s].sa_handler)
                FAIL_("the handler of signal %d was changed", s);
        }
    sigprocmask(SIG_SETMASK, NULL, &then);
    for (int s = 1; s <= 64; s++)
        CHECK_INT(sigismember(&then, s), sigismember(&blocked, s));
    return 0;
}
