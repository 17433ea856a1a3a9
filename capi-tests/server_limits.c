/* The limits of a server hold against clients that do not: too many, silent, too greedy. */
#include "nbd.h"

static qblk *dev;

static qblk_server *serve(const char *key, const char *value)
{
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_server_set(srv, key, value));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    return srv;
}

/* A client that is served still. */
static void is_served(int fd)
{
    char c;
    raw_request(fd, CMD_READ, 42, 0, 1);
    CHECK_INT(raw_reply(fd, 42), 0);
    CHECK(get_all(fd, &c, 1));
}

static void connections(const char *key)
{
    qblk_server *srv = serve(key, "3");
    int fd[3];
    for (int round = 0; round < 5; round++) {
        /* Those of the round before count until the server has seen that they are gone. */
        for (int i = 0; i < 3;) {
            fd[i] = unix_connect("sock");
            if (raw_negotiate(fd[i], "x"))
                i++;
            else
                close(fd[i]);
        }
        for (int i = 0; i < 5; i++) {
            int more = unix_connect("sock");
            CHECK(hangs_up(more));
            close(more);
        }
        for (int i = 0; i < 3; i++) {
            is_served(fd[i]);
            if (round % 2)
                raw_request(fd[i], CMD_DISC, 1, 0, 0);
            close(fd[i]);
        }
    }
    qblk_server_free(srv);
}

static void a_silent_client_while_negotiating(void)
{
    unsigned char hello[18];
    qblk_server *srv = serve("handshake-timeout", "0.3");
    int served = raw_client("sock", "x"), fd = unix_connect("sock");
    double begun = now();
    CHECK(get_all(fd, hello, 18));
    CHECK(hangs_up(fd));
    CHECK(now() - begun > 0.25);
    close(fd);
    /* One that says a byte now and then has no longer. */
    fd = unix_connect("sock");
    begun = now();
    CHECK(get_all(fd, hello, 18));
    CHECK(put_all(fd, "\0\0\0\3", 4));
    struct pollfd p = {fd, POLLIN, 0};
    while (poll(&p, 1, 20) == 0)
        if (!put_all(fd, "I", 1))
            break;
    CHECK(hangs_up(fd));
    CHECK(now() - begun > 0.25);
    close(fd);
    /* It is for the negotiation only. */
    is_served(served);
    close(served);
    qblk_server_free(srv);
}

static void an_idle_client(void)
{
    qblk_server *srv = serve("idle-timeout", "0.3");
    int fd = raw_client("sock", "x");
    double begun = now();
    is_served(fd);
    CHECK(hangs_up(fd));
    CHECK(now() - begun > 0.25);
    close(fd);
    /* One that asks for much and takes nothing. */
    fd = raw_client("sock", "x");
    begun = now();
    for (int i = 0; i < 100; i++) {
        unsigned char b[28];
        be(be(be(be(be(b, 0x25609513, 4), CMD_READ, 4), 1, 8), 0, 8), 1 << 20, 4);
        if (!put_all(fd, b, 28))
            break;
    }
    struct pollfd p = {fd, 0, 0};
    CHECK_INT(poll(&p, 1, -1), 1); /* POLLHUP: it hung up while we read nothing */
    CHECK(p.revents & (POLLHUP | POLLERR));
    CHECK(now() - begun > 0.25);
    close(fd);
    qblk_server_free(srv);
}

static void a_large_request(void)
{
    static unsigned char buf[1 << 20];
    char text[16];
    qblk_server *srv = serve("max-request", "64k");
    int fd = raw_client("sock", "x");
    raw_request(fd, CMD_READ, 1, 0, 65537);
    CHECK(raw_reply(fd, 1) != 0);
    raw_request(fd, CMD_WRITE, 2, 0, 65537);
    CHECK(put_all(fd, buf, 65537));
    CHECK(raw_reply(fd, 2) != 0);
    raw_request(fd, CMD_READ, 3, 0, 65536);
    CHECK_INT(raw_reply(fd, 3), 0);
    CHECK(get_all(fd, buf, 65536));
    /* Outside of the export, in all ways. */
    static const uint64_t outside[][2] = {{1 << 20, 1}, {(1 << 20) - 1, 2}, {UINT64_MAX, 1}, {UINT64_MAX - 1, 4096}};
    for (size_t i = 0; i < 4; i++) {
        raw_request(fd, CMD_READ, 4 + i, outside[i][0], (uint32_t)outside[i][1]);
        CHECK_INT(raw_reply(fd, 4 + i), EINVAL);
        raw_request(fd, CMD_WRITE, 14 + i, outside[i][0], (uint32_t)outside[i][1]);
        CHECK(put_all(fd, buf, (size_t)outside[i][1]));
        CHECK_INT(raw_reply(fd, 14 + i), ENOSPC);
    }
    raw_request(fd, 99, 30, 0, 0);
    CHECK_INT(raw_reply(fd, 30), EINVAL);
    is_served(fd);
    /* What is no request at all ends the connection. */
    memset(buf, 'x', 28);
    CHECK(put_all(fd, buf, 28));
    CHECK(hangs_up(fd));
    close(fd);
    /* The library's client is told the limit, and cuts its requests. */
    qblk *nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
    CHECK_INT(qblk_get_property(nbd, "nbd.maximum-payload", text, sizeof text), 5);
    CHECK_STR(text, "65536");
    fill(buf, sizeof buf, 5);
    OK(qblk_pwrite(nbd, buf, sizeof buf, 0));
    memset(buf, 0, sizeof buf);
    OK(qblk_pread(nbd, buf, sizeof buf, 0));
    unsigned char *want = (unsigned char *)malloc(sizeof buf);
    fill(want, sizeof buf, 5);
    CHECK_MEM(buf, want, sizeof buf);
    free(want);
    OK(qblk_close(nbd));
    qblk_server_free(srv);
}

/* The smallest numbers of everything still serve. */
static void as_little_as_can_be(void)
{
    static unsigned char want[1 << 20], found[1 << 20];
    qblk *file = new_device("qcow2", 1 << 20);
    qblk_server *srv = new_server("x", file, 0);
    static const char *const least[][2] = {{"max-connections", "16"}, {"max-in-flight", "1"},
        {"max-in-flight-in-all", "1"}, {"max-memory", "1M"}, {"max-memory-per-connection", "64k"},
        {"max-option", "8k"}, {"max-request", "64k"}, {"threads", "1"}};
    for (size_t i = 0; i < sizeof least / sizeof least[0]; i++)
        OK(qblk_server_set(srv, least[i][0], least[i][1]));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    qblk *nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
    fill(want, sizeof want, 9);
    OK(qblk_pwrite(nbd, want, sizeof want, 0));
    OK(qblk_flush(nbd));
    OK(qblk_pread(nbd, found, sizeof found, 0));
    CHECK_MEM(found, want, sizeof want);
    OK(qblk_close(nbd));
    qblk_server_free(srv);
    OK(qblk_close(file));
    remove("qcow2");
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    connections("max-connections");
    connections("max-connections-per-peer");
    a_silent_client_while_negotiating();
    an_idle_client();
    a_large_request();
    as_little_as_can_be();
    OK(qblk_close(dev));
    return 0;
}
