/* Any function of a server from any thread at any time: exports come and go, clients connect, others
 * read and write, somebody asks for the URI, and one stops it all. */
#include "nbd.h"

enum { SIZE = 4 << 20 };
static qblk *dev;
static qblk_server *srv;
static volatile int stop;

/* Exports of its own, in turn there and not. */
static void *comes_and_goes(void *arg)
{
    char name[16], buf[8];
    const int k = (int)(intptr_t)arg;
    snprintf(name, sizeof name, "own-%d", k);
    for (int i = 0; !stop; i++) {
        qblk *nbd = NULL;
        OK(qblk_server_add_export(srv, name, dev, i % 2 ? QBLK_EXPORT_RDONLY : 0));
        OK(open_opt(unix_uri("sock", name), 0, &nbd,
                    options("nbd.reconnect", "0", "nbd.connections", "1", NULL)));
        OK(qblk_pread(nbd, buf, 8, 0));
        CHECK_MEM(buf, "constant", 8);
        /* In turn hung up on, and gone before. */
        if (i % 3 == 0)
            OK(qblk_close(nbd));
        OK(qblk_server_remove_export(srv, name));
        FAILS(qblk_server_remove_export(srv, name), -ENOENT, name);
        if (i % 3 != 0) {
            CHECK(qblk_pread(nbd, buf, 8, 0) < 0);
            qblk_close(nbd);
        }
    }
    return NULL;
}

/* A client for as long as it goes, on a part of its own. */
static void *client(void *arg)
{
    static const size_t counts[] = {1, 4096, 70000};
    const uint64_t part = (uint64_t)(uintptr_t)arg * (1 << 19);
    uint64_t state = part + 1;
    unsigned char *want = (unsigned char *)malloc(70000), *found = (unsigned char *)malloc(70000);
    while (!stop) {
        qblk *nbd = NULL;
        OK(qblk_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR, &nbd));
        for (int i = 0; i < 20 && !stop; i++) {
            const size_t n = counts[random_next(&state) % 3];
            const uint64_t at = part + random_next(&state) % 400000;
            fill(want, n, state);
            OK(qblk_pwrite(nbd, want, n, at));
            OK(qblk_pread(nbd, found, n, at));
            CHECK_MEM(found, want, n);
            if (i % 10 == 0)
                OK(qblk_flush(nbd));
        }
        OK(qblk_close(nbd));
    }
    free(want);
    free(found);
    return NULL;
}

static void *asks(void *arg)
{
    char buf[256];
    (void)arg;
    while (!stop) {
        CHECK(qblk_server_get_uri(srv, buf, sizeof buf) > 0);
        FAILS(qblk_server_wait(srv, 1), -ETIMEDOUT, "still serves");
        FAILS(qblk_server_set(srv, "threads", "1"), -EINVAL, "before the first listen");
        FAILS(qblk_server_add_export(srv, "x", dev, 0), -EEXIST, "'x'");
    }
    return NULL;
}

static void *waits(void *arg)
{
    (void)arg;
    OK(qblk_server_wait(srv, -1));
    return NULL;
}

/* Until the server is gone. */
static void *hammers(void *arg)
{
    char buf[4096];
    (void)arg;
    for (;;) {
        qblk *nbd = NULL;
        int rc = open_opt(unix_uri("sock", "x"), QBLK_OPEN_RDWR, &nbd, options("nbd.reconnect", "0", NULL));
        if (rc < 0)
            return NULL;
        for (int i = 0; rc == 0 && i < 1000; i++)
            rc = i % 2 ? qblk_pread(nbd, buf, sizeof buf, 0) : qblk_pwrite(nbd, "constant", 8, 0);
        qblk_close(nbd);
    }
}

static void *stops(void *arg)
{
    OK(qblk_server_stop(srv, (int)(intptr_t)arg));
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t t[8];
    (void)argc;
    test_begin(argv);
    alarm(300);
    dev = new_device("qcow2", SIZE);
    OK(qblk_pwrite(dev, "constant", 8, 0));
    srv = new_server("x", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    for (int i = 0; i < 3; i++) {
        CHECK_INT(pthread_create(&t[i], NULL, comes_and_goes, (void *)(intptr_t)i), 0);
        CHECK_INT(pthread_create(&t[3 + i], NULL, client, (void *)(intptr_t)(1 + i)), 0);
    }
    CHECK_INT(pthread_create(&t[6], NULL, asks, NULL), 0);
    CHECK_INT(pthread_create(&t[7], NULL, waits, NULL), 0);
    sleep(quick() ? 3 : 2);
    stop = 1;
    for (int i = 0; i < 7; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    OK(qblk_server_stop(srv, 1000));
    CHECK_INT(pthread_join(t[7], NULL), 0);
    qblk_server_free(srv);

    /* Stopped in the middle, by several at once. */
    for (int round = 0; round < (quick() ? 2 : 10); round++) {
        srv = new_server("x", dev, 0);
        OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
        for (int i = 0; i < 4; i++)
            CHECK_INT(pthread_create(&t[i], NULL, hammers, NULL), 0);
        usleep(20000);
        CHECK_INT(pthread_create(&t[4], NULL, waits, NULL), 0);
        for (int i = 5; i < 8; i++)
            CHECK_INT(pthread_create(&t[i], NULL, stops, (void *)(intptr_t)(round % 2 * 100)), 0);
        for (int i = 0; i < 8; i++)
            CHECK_INT(pthread_join(t[i], NULL), 0);
        qblk_server_free(srv);
        CHECK(!exists("sock"));
    }
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
