/* Signals of a program with a server: its handlers run in its own threads only; a client that hangs
 * up raises no SIGPIPE; a storm of signals fails no call and loses no byte. */
#include "nbd.h"
#include <sys/time.h>

enum { SIZE = 4 << 20 };
static volatile sig_atomic_t storms;
static pthread_t main_thread;
static volatile sig_atomic_t elsewhere;

static void handler(int signal)
{
    (void)signal;
    storms = storms + 1;
    if (!pthread_equal(pthread_self(), main_thread))
        elsewhere = 1;
}

static void clients_that_hang_up(void)
{
    unsigned char b[28];
    char c;
    for (int i = 0; i < 20; i++) {
        int fd = raw_client("sock", "x");
        /* More than the socket takes, and then nobody who wants it. */
        for (int n = 0; n < 64; n++) {
            be(be(be(be(be(b, 0x25609513, 4), CMD_READ, 4), 1, 8), 0, 8), 1 << 20, 4);
            if (send(fd, b, 28, MSG_DONTWAIT | MSG_NOSIGNAL) != 28)
                break;
        }
        CHECK(get_all(fd, &c, 1));
        close(fd);
    }
    /* And servers that do: SIGPIPE is at its default, which would end us. */
    int fd[2];
    qblk *nbd = NULL;
    qblk_server *other = NULL;
    qblk *mem = must_open("mem:1M", QBLK_OPEN_RDWR);
    other = new_server("", mem, 0);
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    OK(qblk_server_serve_fd(other, fd[0]));
    close(fd[0]);
    OK(qblk_open_fd(fd[1], NULL, QBLK_OPEN_RDWR, &nbd));
    close(fd[1]);
    qblk_server_free(other);
    CHECK(qblk_pwrite(nbd, "x", 1, 0) < 0);
    CHECK(qblk_flush(nbd) <= 0);
    qblk_close(nbd);
    OK(qblk_close(mem));
}

static void storm(qblk *nbd)
{
    static unsigned char buf[1 << 20], want[1 << 20];
    uint64_t state = 1;
    const int pause_us = quick() ? 10000 : 200;
    struct itimerval fast = {{0, pause_us}, {0, pause_us}}, off = {{0, 0}, {0, 0}};
    storms = 0;
    const double end = now() + (quick() ? 3 : 1);
    CHECK_INT(setitimer(ITIMER_REAL, &fast, NULL), 0);
    do {
        const size_t n = random_next(&state) % 2 ? 4096 : sizeof buf;
        const uint64_t at = random_next(&state) % (SIZE - n);
        fill(want, 64, random_next(&state));
        memcpy(want + n - 64, want, 64);
        OK(qblk_pwrite(nbd, want, n, at));
        OK(qblk_pread(nbd, buf, n, at));
        CHECK_MEM(buf, want, n);
        if (random_next(&state) % 16 == 0) {
            qblk *other = NULL;
            qblk_server *srv = NULL;
            OK(qblk_flush(nbd));
            OK(qblk_open(unix_uri("sock", "x"), 0, &other));
            OK(qblk_pread(other, buf, 4096, 0));
            OK(qblk_close(other));
            OK(qblk_server_new(&srv));
            OK(qblk_server_listen(srv, "nbd://127.0.0.1:0"));
            FAILS(qblk_server_wait(srv, 2), -ETIMEDOUT, "");
            OK(qblk_server_stop(srv, 100));
            qblk_server_free(srv);
        }
    } while (now() < end);
    CHECK_INT(setitimer(ITIMER_REAL, &off, NULL), 0);
    CHECK(storms > (quick() ? 10 : 100));
}

int main(int argc, char **argv)
{
    struct sigaction action, before[65], after;
    sigset_t blocked, then;
    (void)argc;
    test_begin(argv);
    main_thread = pthread_self();
    memset(&action, 0, sizeof action);
    action.sa_handler = handler; /* without SA_RESTART */
    CHECK_INT(sigaction(SIGALRM, &action, NULL), 0);
    CHECK_INT(sigaction(SIGUSR1, &action, NULL), 0);
    sigprocmask(SIG_SETMASK, NULL, &blocked);
    for (int s = 1; s <= 64; s++)
        if (sigaction(s, NULL, &before[s]) != 0)
            before[s].sa_handler = SIG_ERR;

    qblk *dev = new_device("qcow2", SIZE), *nbd = NULL;
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
    OK(qblk_pwrite(nbd, "x", 1, 0));
    clients_that_hang_up();

    /* While the only thread that is ours has it blocked, none of the library's takes it. */
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    CHECK_INT(sigprocmask(SIG_BLOCK, &usr1, NULL), 0);
    CHECK_INT(kill(getpid(), SIGUSR1), 0);
    for (int i = 0; i < 100; i++) {
        char buf[4096];
        OK(qblk_pread(nbd, buf, sizeof buf, 0));
    }
    CHECK_INT(storms, 0);
    CHECK_INT(sigprocmask(SIG_UNBLOCK, &usr1, NULL), 0);
    CHECK_INT(storms, 1);
    storm(nbd);
    CHECK_INT(elsewhere, 0);

    OK(qblk_close(nbd));
    OK(qblk_server_stop(srv, 1000));
    qblk_server_free(srv);
    OK(qblk_close(dev));
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
