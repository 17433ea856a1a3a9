/* A program that ends while its server runs and clients are connected: what they were told is
 * written is written, and the program ends at once, however it ends. */
#include "nbd.h"

enum { BLOCK = 5000, BLOCKS = 200 };

static void *exit_from_a_thread(void *arg)
{
    (void)arg;
    exit(0);
}

/* The server's program: begins to serve, says so, and ends when it is told to. */
static int child(const char *how, const char *file)
{
    pthread_t t;
    char c;
    qblk *dev = must_open(file, QBLK_OPEN_RDWR);
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    OK(qblk_server_listen(srv, "nbd://127.0.0.1:0"));
    if (strcmp(how, "closed") == 0)
        OK(qblk_close(dev));
    CHECK_INT(write(STDOUT_FILENO, "+", 1), 1);
    CHECK_INT(read(STDIN_FILENO, &c, 1), 1);
    if (strcmp(how, "exit") == 0)
        exit(0);
    if (strcmp(how, "thread") == 0) {
        CHECK_INT(pthread_create(&t, NULL, exit_from_a_thread, NULL), 0);
        pause();
    }
    if (strcmp(how, "free") == 0)
        qblk_server_free(srv);
    return 0;
}

typedef struct process {
    pid_t pid;
    int in, out;
} process;

static process start(const char *how, const char *file)
{
    int in[2], out[2];
    char c;
    process p;
    CHECK_INT(pipe2(in, O_CLOEXEC), 0);
    CHECK_INT(pipe2(out, O_CLOEXEC), 0);
    p.pid = fork();
    CHECK(p.pid >= 0);
    if (p.pid == 0) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execl(test_self_, test_self_, how, file, (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    p.in = in[1];
    p.out = out[0];
    CHECK_INT(read(p.out, &c, 1), 1);
    return p;
}

static volatile int stop;
static int reading;

static void *read_for_ever(void *arg)
{
    char buf[4096];
    qblk *nbd = NULL;
    (void)arg;
    OK(open_opt(unix_uri("sock", "x"), 0, &nbd, options("nbd.reconnect", "0", NULL)));
    for (uint64_t i = 0; !stop; i++) {
        if (qblk_pread(nbd, buf, sizeof buf, i % 1000 * 4096) < 0)
            break;
        if (i == 0)
            __atomic_fetch_add(&reading, 1, __ATOMIC_SEQ_CST);
    }
    qblk_close(nbd);
    return NULL;
}

static void parent(const char *how, const char *kind)
{
    unsigned char want[BLOCK], found[BLOCK];
    int status;
    pthread_t t[2];
    qblk *dev = new_device(kind, 16 << 20), *nbd = NULL;
    OK(qblk_close(dev));
    process p = start(how, kind);
    int silent = unix_connect("sock"), idle = raw_client("sock", "x");
    OK(open_opt(unix_uri("sock", "x"), QBLK_OPEN_RDWR, &nbd, options("nbd.reconnect", "0", NULL)));
    stop = reading = 0;
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&t[i], NULL, read_for_ever, NULL), 0);
    /* Acknowledged, and not flushed. */
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        OK(qblk_pwrite(nbd, want, BLOCK, (uint64_t)i * 70000));
    }
    while (__atomic_load_n(&reading, __ATOMIC_SEQ_CST) < 2)
        usleep(1000);
    double begun = now();
    CHECK_INT(write(p.in, "x", 1), 1);
    CHECK_INT(waitpid(p.pid, &status, 0), p.pid);
    CHECK_INT(status, 0);
    if (!quick() && now() - begun > 8)
        FAIL_("%s: ended after %.1f s", how, now() - begun);
    CHECK(!exists("sock"));
    stop = 1;
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    /* The client is told; what it does then is its own. */
    CHECK(qblk_pread(nbd, found, 1, 0) < 0);
    qblk_close(nbd);
    unsigned char hello[18];
    get_all(silent, hello, 18);
    CHECK(hangs_up(silent) && hangs_up(idle));
    close(silent);
    close(idle);
    close(p.in);
    close(p.out);

    dev = must_open(kind, 0);
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        OK(qblk_pread(dev, found, BLOCK, (uint64_t)i * 70000));
        CHECK_MEM(found, want, BLOCK);
    }
    OK(qblk_close(dev));
    if (strcmp(kind, "qcow2") == 0)
        CHECK_SH("qemu-img check -q qcow2");
    remove(kind);
}

int main(int argc, char **argv)
{
    static const char *const ways[] = {"return", "exit", "thread", "closed", "free"};
    if (argc == 3)
        return child(argv[1], argv[2]);
    test_begin(argv);
    alarm(300);
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        parent(ways[i], "qcow2");
        parent(ways[i], "raw");
    }
    return 0;
}
