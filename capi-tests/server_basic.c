/* An NBD server inside the process, and the library's own client beside it: what one writes the
 * other has, over a Unix socket and over TCP; exports come and go; stopping ends all of it. */
#include "nbd.h"

enum { SIZE = 8 << 20 };

static void through_the_export(qblk *dev, const char *uri)
{
    static unsigned char want[3 << 20], found[3 << 20];
    struct iovec iov[3] = {{want, 100}, {want + 100, 0}, {want + 100, 900}};
    qblk *nbd = must_open(uri, QBLK_OPEN_RDWR), *other;
    qblk_info info;
    qblk_extent e[16];
    char text[64];
    OK(qblk_get_info(nbd, &info));
    CHECK_INT(info.size, SIZE);
    CHECK_STR(info.driver, "nbd");
    CHECK_STR(info.format, "raw");
    CHECK_INT(info.state & QBLK_STATE_READ_ONLY, 0);
    CHECK_INT(info.can_flush, QBLK_CAN_NATIVE);
    CHECK(info.can_fua && info.can_trim && info.can_zero && info.can_extents && info.can_multi_conn);
    CHECK(qblk_get_property(nbd, "filename", text, sizeof text) > 0);

    /* Small and large, at any offset, both ways. */
    static const size_t counts[] = {1, 511, 4096, 65537, sizeof want};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        const size_t n = counts[i];
        const uint64_t at = 1000 * i + 77;
        fill(want, n, i + 1);
        OK(qblk_pwrite(nbd, want, n, at));
        OK(qblk_pread(dev, found, n, at));
        CHECK_MEM(found, want, n);
        fill(want, n, i + 100);
        OK(qblk_pwrite2(dev, want, n, at, QBLK_REQ_FUA));
        memset(found, 0, n);
        OK(qblk_pread(nbd, found, n, at));
        CHECK_MEM(found, want, n);
    }
    fill(want, 1000, 7);
    OK(qblk_pwritev(nbd, iov, 3, SIZE - 1000, QBLK_REQ_FUA));
    OK(qblk_pread(dev, found, 1000, SIZE - 1000));
    CHECK_MEM(found, want, 1000);
    OK(qblk_pwrite2(nbd, want, 5, 0, QBLK_REQ_FUA));
    OK(qblk_flush(nbd));

    /* Zeroes are zeroes, and known as such. */
    OK(qblk_zero(nbd, 4 << 20, 1 << 20, QBLK_REQ_MAY_TRIM));
    OK(qblk_pread(dev, found, 1 << 20, 2 << 20));
    CHECK(all_zero(found, 1 << 20));
    int64_t n = qblk_extents(nbd, 4 << 20, 1 << 20, 0, e, 16);
    CHECK(n > 0);
    CHECK(e[0].offset == 1 << 20 && e[0].flags & QBLK_EXTENT_ZERO);
    OK(qblk_trim(nbd, 1 << 20, 1 << 20, 0));
    OK(qblk_cache(nbd, 4096, 0, 0));

    /* A context, and the same rules as for any device. */
    OK(qblk_context_open(nbd, NULL, 0, &other));
    OK(qblk_pread(other, found, 5, 0));
    CHECK_MEM(found, want, 5);
    FAILS(qblk_pwrite(other, want, 1, 0), -EROFS, "read-only");
    FAILS(qblk_pread(nbd, found, 2, SIZE - 1), -EINVAL, "leave the device");
    OK(qblk_pread(nbd, NULL, 0, SIZE));
    FAILS(qblk_resize(nbd, 2 * SIZE, 0), -ENOTSUP, "");
    OK(qblk_close(other));
    OK(qblk_close(nbd));
}

static void uris(qblk_server *srv)
{
    char buf[128], cut[8] = "xxxxxxx";
    const char *want = server_uri(srv);
    const int64_t n = (int64_t)strlen(want);
    CHECK_INT(qblk_server_get_uri(srv, NULL, 0), n);
    CHECK_INT(qblk_server_get_uri(srv, buf, sizeof buf), n);
    CHECK_STR(buf, want);
    CHECK_INT(qblk_server_get_uri(srv, buf, (size_t)n + 1), n);
    CHECK_STR(buf, want);
    CHECK_INT(qblk_server_get_uri(srv, buf, (size_t)n), n);
    CHECK_INT(strlen(buf), n - 1);
    CHECK_INT(qblk_server_get_uri(srv, cut, 4), n);
    CHECK_STR(cut, "nbd");
    CHECK_STR(cut + 4, "xxx");
    CHECK_INT(qblk_server_get_uri(srv, cut, 1), n);
    CHECK_STR(cut, "");
    CHECK_STR(qblk_get_error(), "");
}

static void a_device(const char *kind)
{
    char buf[16], uri[512];
    qblk *dev = new_device(kind, SIZE), *nbd = NULL;
    qblk_server *srv = new_server("disk", dev, 0);
    FAILS(qblk_server_get_uri(srv, buf, sizeof buf), -ENOENT, "listens nowhere");
    FAILS(qblk_server_wait(srv, 0), -ETIMEDOUT, "still serves");
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    CHECK(exists("sock"));
    CHECK_STR(server_uri(srv), "nbd+unix:///disk?socket=sock");
    uris(srv);
    through_the_export(dev, server_uri(srv));
    /* A second address of the same server, with a port that is free. */
    OK(qblk_server_listen(srv, "nbd://127.0.0.1:0"));
    CHECK_STR(server_uri(srv), "nbd+unix:///disk?socket=sock");
    through_the_export(dev, server_uri(srv));

    /* Its handle may go while it is exported, and the name is free when it is not exported any more. */
    strcpy(uri, server_uri(srv));
    OK(qblk_pwrite(dev, "kept", 4, 0));
    OK(qblk_close(dev));
    OK(open_opt(uri, QBLK_OPEN_RDWR, &nbd, options("nbd.reconnect", "0", NULL)));
    OK(qblk_pread(nbd, buf, 4, 0));
    CHECK_MEM(buf, "kept", 4);
    OK(qblk_pwrite(nbd, "last", 4, 0));
    OK(qblk_server_remove_export(srv, "disk"));
    FAILS(qblk_server_remove_export(srv, "disk"), -ENOENT, "'disk'");
    /* Its clients were hung up on; there is no such export to come back to. */
    CHECK(qblk_pread(nbd, buf, 4, 0) < 0);
    CHECK(qblk_close(nbd) <= 0);
    nbd = NULL;
    FAILS(qblk_open(uri, 0, &nbd), -ENOENT, "disk");

    OK(qblk_server_stop(srv, 1000));
    OK(qblk_server_stop(srv, 0));
    CHECK(!exists("sock"));
    OK(qblk_server_wait(srv, -1));
    OK(qblk_server_wait(srv, 0));
    FAILS(qblk_server_get_uri(srv, buf, sizeof buf), -ENOENT, "listens nowhere");
    FAILS(qblk_open(uri, 0, &nbd), -ENOENT, "sock");
    dev = must_open("mem:1M", 0);
    FAILS(qblk_server_add_export(srv, "late", dev, 0), -EBADF, "stopped");
    FAILS(qblk_server_listen(srv, "nbd://127.0.0.1:0"), -EBADF, "stopped");
    OK(qblk_close(dev));
    qblk_server_free(srv);

    if (strcmp(kind, "mem") != 0) {
        dev = must_open(kind, 0);
        OK(qblk_pread(dev, buf, 4, 0));
        CHECK_MEM(buf, "last", 4);
        OK(qblk_close(dev));
        if (strcmp(kind, "qcow2") == 0)
            CHECK_SH("qemu-img check -q qcow2");
        remove(kind);
    }
}

static void tcp(void)
{
    char buf[4];
    qblk *dev = new_device("mem", SIZE), *nbd;
    qblk_server *srv = new_server("", dev, QBLK_EXPORT_RDONLY);
    OK(qblk_pwrite(dev, "data", 4, 99));
    OK(qblk_server_listen(srv, "nbd://127.0.0.1:0"));
    CHECK_HAS(server_uri(srv), "nbd://127.0.0.1:");
    CHECK(strcmp(server_uri(srv), "nbd://127.0.0.1:0") != 0);
    uris(srv);
    nbd = must_open(server_uri(srv), 0);
    OK(qblk_pread(nbd, buf, 4, 99));
    CHECK_MEM(buf, "data", 4);
    OK(qblk_close(nbd));
    /* Freed while it runs, and the device's handle after it. */
    qblk_server_free(srv);
    OK(qblk_close(dev));
}

static void names(void)
{
    static char longest[4097], text[4098];
    char buf[4];
    qblk *a = new_device("mem", 1 << 20), *b = new_device("mem", 1 << 20), *nbd = NULL;
    qblk *info = NULL;
    qblk_options *o = options("description", "text for people", NULL);
    qblk_server *srv = new_server("a", a, 0);
    OK(qblk_pwrite(a, "a", 1, 0));
    OK(qblk_pwrite(b, "b", 1, 0));
    FAILS(qblk_server_add_export(srv, "a", b, 0), -EEXIST, "'a'");
    FAILS(qblk_server_add_export(srv, "b", b, 2), -EINVAL, "flags");
    OK(qblk_server_add_export2(srv, "b c/?#%", b, o, 0));
    qblk_options_free(o);
    memset(longest, 'n', 4096);
    OK(qblk_server_add_export(srv, longest, b, 0));
    memset(text, 'n', 4097);
    FAILS(qblk_server_add_export(srv, text, b, 0), -EINVAL, "4096");
    o = options("description", text, NULL);
    FAILS(qblk_server_add_export2(srv, "long", b, o, 0), -EINVAL, "4096");
    qblk_options_free(o);
    o = options("format", "raw", NULL);
    FAILS(qblk_server_add_export2(srv, "odd", b, o, 0), -EINVAL, "'format'");
    qblk_options_free(o);
    make_file("disk", "", 0, 1 << 20);
    info = must_open("disk", QBLK_OPEN_INFO_ONLY);
    FAILS(qblk_server_add_export(srv, "info", info, 0), -EBADF, "QBLK_OPEN_INFO_ONLY");
    OK(qblk_close(info));

    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    /* With several exports the URI names none. */
    CHECK_STR(server_uri(srv), "nbd+unix:///?socket=sock");
    FAILS(qblk_open(unix_uri("sock", ""), 0, &nbd), -ENOENT, "");
    FAILS(qblk_open(unix_uri("sock", "A"), 0, &nbd), -ENOENT, "'A'");
    nbd = must_open(unix_uri("sock", "b%20c/%3F%23%25"), 0);
    OK(qblk_pread(nbd, buf, 1, 0));
    CHECK_MEM(buf, "b", 1);
    OK(qblk_close(nbd));
    /* One for all names that no other has. */
    OK(qblk_server_add_export(srv, "*", b, 0));
    nbd = must_open(unix_uri("sock", "anything"), 0);
    OK(qblk_pread(nbd, buf, 1, 0));
    CHECK_MEM(buf, "b", 1);
    OK(qblk_close(nbd));
    nbd = must_open(unix_uri("sock", "a"), 0);
    OK(qblk_pread(nbd, buf, 1, 0));
    CHECK_MEM(buf, "a", 1);
    OK(qblk_close(nbd));
    OK(qblk_server_remove_export(srv, "*"));
    FAILS(qblk_open(unix_uri("sock", "anything"), 0, &nbd), -ENOENT, "'anything'");
    OK(qblk_close(a));
    OK(qblk_close(b));
    qblk_server_free(srv);
    CHECK(!exists("sock"));
}

static void addresses(void)
{
    static const char *const bad[] = {
        "", "sock", "file:sock", "nbd", "nbd:x:1", "http://localhost/", "nbd://127.0.0.1:99999",
        "nbd://127.0.0.1:-1", "nbd+unix://", "nbd+unix:///?socket=", "nbd+unix:///?socket=a&sucket=b",
        "nbd://a:b@127.0.0.1/", "nbd+exec:",
    };
    qblk *dev = new_device("mem", 1 << 20);
    qblk_server *srv = new_server("", dev, 0), *other = new_server("", dev, 0);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        FAILS(qblk_server_listen(srv, bad[i]), -EINVAL, "");
    FAILS(qblk_server_listen(srv, "nbds://127.0.0.1:0"), -EINVAL, "'tls'");
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=missing/sock"), -ENOENT, "missing/sock");
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -EADDRINUSE, "sock");
    FAILS(qblk_server_listen(other, server_uri(srv)), -EADDRINUSE, "sock");
    OK(qblk_server_listen(other, "nbd://127.0.0.1:0"));
    FAILS(qblk_server_listen(srv, server_uri(other)), -EADDRINUSE, "127.0.0.1");
    qblk_server_free(srv);
    qblk_server_free(other);
    /* A path that a server left behind when it died is taken over. */
    close(unix_listen("dead"));
    CHECK(exists("dead"));
    srv = new_server("", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=dead"));
    qblk_server_free(srv);
    CHECK(!exists("dead"));
    /* A file that is no socket is nobody's to remove. */
    make_file("plain", "x", 1, 1);
    srv = new_server("", dev, 0);
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=plain"), -EADDRINUSE, "plain");
    qblk_server_free(srv);
    CHECK(exists("plain"));
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    EACH_KIND(kind)
        a_device(kind);
    tcp();
    names();
    addresses();
    return 0;
}
