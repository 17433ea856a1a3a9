/* A server that goes away and comes back: calls wait and succeed; writes that were acknowledged and
 * not flushed make the next flush fail, and writes are refused from then on, until it is opened anew. */
#include "nbd.h"

enum { SIZE = 1 << 20 };
static qblk *dev;

static qblk_server *serve(void)
{
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    return srv;
}

static qblk *client(const char *reconnect)
{
    qblk *nbd = NULL;
    OK(open_opt(unix_uri("sock", "x"), QBLK_OPEN_RDWR, &nbd, options("nbd.reconnect", reconnect, NULL)));
    return nbd;
}

static void *come_back(void *arg)
{
    usleep(300000);
    *(qblk_server **)arg = serve();
    return NULL;
}

static void flushed_and_gone(void)
{
    char buf[8];
    pthread_t t;
    qblk_server *srv = serve();
    qblk *nbd = client("60");
    for (int i = 0; i < 3; i++) {
        OK(qblk_pwrite(nbd, "constant", 8, 5000));
        OK(qblk_flush(nbd));
        OK(qblk_server_stop(srv, 0));
        qblk_server_free(srv);
        CHECK_INT(pthread_create(&t, NULL, come_back, &srv), 0);
        OK(qblk_pread(nbd, buf, 8, 5000));
        CHECK_MEM(buf, "constant", 8);
        CHECK_INT(pthread_join(t, NULL), 0);
        OK(qblk_pwrite2(nbd, "more", 4, 6000, QBLK_REQ_FUA));
        OK(qblk_flush(nbd));
    }
    OK(qblk_close(nbd));
    qblk_server_free(srv);
}

static void not_flushed(void)
{
    char buf[8];
    qblk_server *srv = serve();
    qblk *nbd = client("60"), *other = NULL;
    OK(qblk_context_open(nbd, NULL, QBLK_OPEN_RDWR, &other));
    OK(qblk_pwrite(nbd, "unsaid", 6, 7000));
    qblk_server_free(srv);
    srv = serve();
    /* Reads go on. */
    OK(qblk_pread(nbd, buf, 6, 7000));
    FAILS(qblk_flush(other), -EIO, "may be lost");
    FAILS(qblk_flush(nbd), -EIO, "lost");
    FAILS(qblk_pwrite(nbd, "x", 1, 0), -EIO, "flush failed");
    FAILS(qblk_pwrite(other, "x", 1, 0), -EIO, "flush failed");
    OK(qblk_pread(other, buf, 6, 7000));
    /* Opened anew it takes writes again. */
    OK(qblk_reopen(nbd, QBLK_OPEN_RDWR));
    OK(qblk_pwrite(nbd, "x", 1, 0));
    OK(qblk_flush(nbd));
    OK(qblk_close(other));
    OK(qblk_close(nbd));

    /* Told at the close, if nobody flushed. */
    nbd = client("60");
    OK(qblk_pwrite(nbd, "unsaid", 6, 7000));
    qblk_server_free(srv);
    srv = serve();
    OK(qblk_pread(nbd, buf, 6, 7000));
    FAILS(qblk_close(nbd), -EIO, "lost");
    qblk_server_free(srv);
}

static void gone_for_good(void)
{
    char buf[8];
    qblk_server *srv = serve();
    qblk *never = client("0"), *little = client("0.5"), *hasty = NULL;
    OK(open_opt(unix_uri("sock", "x"), 0, &hasty, options("nbd.timeout", "0.5", "nbd.reconnect", "60", NULL)));
    OK(qblk_pread(never, buf, 8, 0));
    qblk_server_free(srv);
    double begun = now();
    CHECK(qblk_pread(never, buf, 8, 0) < 0);
    CHECK_HAS(qblk_get_error(), "lost");
    CHECK(now() - begun < (quick() ? 30 : 5));
    CHECK(qblk_pread(little, buf, 8, 0) < 0);
    CHECK_HAS(qblk_get_error(), "lost");
    FAILS(qblk_pread(hasty, buf, 8, 0), -ETIMEDOUT, "lost");
    /* Another server under that name is not the one that is known, if its size differs. */
    qblk *larger = must_open("mem:2M", QBLK_OPEN_RDWR);
    srv = new_server("x", larger, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    FAILS(qblk_pread(hasty, buf, 8, 0), -ESTALE, "size");
    qblk_close(hasty);
    qblk_close(little);
    qblk_close(never);
    qblk_server_free(srv);
    OK(qblk_close(larger));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    flushed_and_gone();
    not_flushed();
    gone_for_good();
    OK(qblk_close(dev));
    return 0;
}
