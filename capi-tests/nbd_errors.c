/* What can go wrong with a server is a code and a text, never a hang or a crash: nobody there, no such
 * export, read-only, and servers that break the protocol in each step of it. */
#include "nbd.h"
#include <netinet/in.h>

#define REFUSED(uri, flags, opts, code, part) \
    do { \
        qblk *nbd_ = NULL; \
        FAILS(open_opt((uri), (flags), &nbd_, (opts)), (code), (part)); \
        CHECK(nbd_ == NULL); \
    } while (0)

static void nobody_there(void)
{
    char uri[64];
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    /* A port that is bound and does not listen. */
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK_INT(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
    CHECK_INT(getsockname(fd, (struct sockaddr *)&at, &len), 0);
    snprintf(uri, sizeof uri, "nbd://127.0.0.1:%d/x", ntohs(at.sin_port));
    REFUSED(uri, 0, NULL, -ECONNREFUSED, "127.0.0.1");
    double begun = now();
    REFUSED(uri, 0, options("nbd.connect-timeout", "0.3", NULL), -ECONNREFUSED, "127.0.0.1");
    CHECK(now() - begun > 0.25);
    close(fd);
    REFUSED("nbd+unix:///x?socket=gone", 0, NULL, -ENOENT, "gone");
    make_file("plain", "", 0, 1);
    REFUSED("nbd+unix:///x?socket=plain", 0, NULL, -ECONNREFUSED, "plain");
    close(unix_listen("dead"));
    REFUSED("nbd+unix:///x?socket=dead", 0, NULL, -ECONNREFUSED, "dead");
}

static void *listen_late(void *arg)
{
    usleep(300000);
    OK(qblk_server_listen((qblk_server *)arg, "nbd+unix:///?socket=late"));
    return NULL;
}

static void exports(void)
{
    char buf[4];
    pthread_t t;
    qblk *dev = must_open("mem:1M", QBLK_OPEN_RDWR), *nbd = NULL;
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_server_add_export(srv, "ro", dev, QBLK_EXPORT_RDONLY));
    /* One that comes to listen while the client is patient. */
    CHECK_INT(pthread_create(&t, NULL, listen_late, srv), 0);
    OK(open_opt("nbd+unix:///x?socket=late", 0, &nbd, options("nbd.connect-timeout", "60", NULL)));
    CHECK_INT(pthread_join(t, NULL), 0);
    OK(qblk_close(nbd));
    REFUSED(unix_uri("late", "gone"), 0, NULL, -ENOENT, "'gone'");
    REFUSED(unix_uri("late", ""), 0, NULL, -ENOENT, "late");
    REFUSED(unix_uri("late", "\x1b%1b"), 0, NULL, -ENOENT, "\\u{1b}");
    REFUSED(unix_uri("late", "ro"), QBLK_OPEN_RDWR, NULL, -EROFS, "read-only");
    nbd = must_open(unix_uri("late", "ro"), 0);
    FAILS(qblk_pwrite(nbd, "x", 1, 0), -EROFS, "read-only");
    FAILS(qblk_zero(nbd, 1, 0, 0), -EROFS, "read-only");
    OK(qblk_pread(nbd, buf, 4, 0));
    OK(qblk_close(nbd));
    /* Its device is read-only: so is the export, whatever it is exported as. */
    make_file("disk", "", 0, 1 << 20);
    qblk *file = must_open("disk", 0);
    OK(qblk_server_add_export(srv, "file", file, 0));
    REFUSED(unix_uri("late", "file"), QBLK_OPEN_RDWR, NULL, -EROFS, "read-only");
    OK(qblk_close(file));
    qblk_server_free(srv);
    OK(qblk_close(dev));
}

/* --- servers that break the protocol -------------------------------------------------------- */

enum { SIZE = 1 << 20 };

static void greets(int fd, const void *arg)
{
    const char *how = (const char *)arg;
    unsigned char b[64];
    memset(b, 0, sizeof b);
    if (strcmp(how, "silence") == 0)
        return;
    if (strcmp(how, "half") == 0) {
        be(b, NBD_MAGIC, 8);
        put_all(fd, b, 7);
        return;
    }
    if (strcmp(how, "http") == 0) {
        put_all(fd, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
        return;
    }
    if (strcmp(how, "second") == 0) {
        be(be(b, NBD_MAGIC, 8), 0x1234, 8);
        put_all(fd, b, 18);
        return;
    }
    if (strcmp(how, "oldstyle") == 0) {
        be(be(b, NBD_MAGIC, 8), 0x420281861253u, 8);
        put_all(fd, b, 28);
        return;
    }
    if (!bad_greet(fd))
        return;
    for (uint32_t option; (option = bad_option(fd)) != 0;) {
        if (option != OPT_GO) {
            if (!bad_answer(fd, option, 0x80000001u, NULL, 0))
                return;
            continue;
        }
        if (strcmp(how, "magic") == 0) {
            put_all(fd, "this is not a reply.", 20);
            return;
        }
        if (strcmp(how, "option") == 0)
            bad_answer(fd, 99, 1, NULL, 0);
        if (strcmp(how, "no size") == 0)
            bad_answer(fd, option, 1, NULL, 0);
        if (strcmp(how, "kind") == 0)
            bad_answer(fd, option, 77, "x", 1);
        if (strcmp(how, "short info") == 0)
            bad_answer(fd, option, 3, b, 5);
        if (strcmp(how, "endless") == 0)
            while (bad_answer(fd, option, 3, "\0\1name", 6))
                ;
        if (strcmp(how, "huge reply") == 0) {
            be(be(be(be(b, REP_MAGIC, 8), option, 4), 3, 4), 0xffffffffu, 4);
            put_all(fd, b, 20);
        }
        if (strcmp(how, "huge export") == 0) {
            memset(b, 0xff, 12);
            be(b, 0, 2);
            bad_answer(fd, option, 3, b, 12);
            bad_answer(fd, option, 1, NULL, 0);
        }
        if (strcmp(how, "block size") == 0) {
            be(be(be(b, 0, 2), SIZE, 8), 1, 2);
            bad_answer(fd, option, 3, b, 12);
            be(be(be(be(b, 3, 2), 3, 4), 4096, 4), 65536, 4);
            bad_answer(fd, option, 3, b, 14);
            bad_answer(fd, option, 1, NULL, 0);
        }
        if (strcmp(how, "policy") == 0)
            bad_answer(fd, option, 0x80000002u, "no \x1b[31m", 8);
        if (strcmp(how, "tls") == 0)
            bad_answer(fd, option, 0x80000005u, NULL, 0);
        bad_option(fd);
        return;
    }
}

static void answers(int fd, const void *arg)
{
    const char *how = (const char *)arg;
    unsigned char b[8192];
    if (!bad_negotiate(fd, SIZE, 1 | 1 << 2))
        return;
    while (get_all(fd, b, 28)) {
        const uint64_t command = eb(b + 4, 4), cookie = eb(b + 8, 8), count = eb(b + 24, 4);
        uint32_t magic = 0x67446698, error = 0;
        uint64_t to = cookie;
        if (command == CMD_DISC)
            return;
        if (command == CMD_WRITE)
            for (uint64_t n = 0; n < count; n++)
                if (!get_all(fd, b + 100, 1))
                    return;
        if (strcmp(how, "hangs up") == 0)
            return;
        if (strcmp(how, "magic") == 0)
            magic = 0x12345678;
        if (strcmp(how, "cookie") == 0)
            to = cookie + 12345678901u;
        if (strcmp(how, "chunk") == 0) /* structured replies were not agreed on */
            magic = 0x668e33ef;
        if (strcmp(how, "EIO") == 0)
            error = 5;
        if (strcmp(how, "ENOSPC") == 0)
            error = 28;
        if (strcmp(how, "unknown error") == 0)
            error = 123456;
        if (strcmp(how, "silent") == 0) {
            hangs_up(fd);
            return;
        }
        memset(b, 'x', sizeof b);
        be(be(be(b, magic, 4), error, 4), to, 8);
        if (!put_all(fd, b, 16))
            return;
        if (strcmp(how, "cut") == 0) {
            put_all(fd, b, 10);
            return;
        }
        if (command == CMD_READ && !error && !put_all(fd, b + 16, (size_t)count))
            return;
        if (strcmp(how, "twice") == 0 && !put_all(fd, b, 16))
            return;
    }
}

static void greetings(void)
{
    static const struct {
        const char *how;
        int code;
        const char *part;
    } bad[] = {
        {"silence", -ECONNRESET, ""}, {"half", -ECONNRESET, ""}, {"http", QBLK_EPROTO, "HTTP/1.1"},
        {"second", QBLK_EPROTO, "0x1234"}, {"oldstyle", QBLK_EUNSUPPORTED, "oldstyle"},
        {"magic", QBLK_EPROTO, ""}, {"option", QBLK_EPROTO, "99"}, {"no size", QBLK_EPROTO, "size"},
        {"kind", QBLK_EPROTO, ""}, {"short info", QBLK_EPROTO, ""}, {"endless", QBLK_EPROTO, ""},
        {"huge reply", QBLK_EPROTO, "4294967295"}, {"huge export", QBLK_EPROTO, "bytes"},
        {"block size", QBLK_EPROTO, "block size"}, {"policy", -EACCES, "policy"}, {"tls", -EACCES, "TLS"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        bad_server s;
        bad_server_begin(&s, "bad", greets, bad[i].how);
        REFUSED(unix_uri("bad", "x"), QBLK_OPEN_RDWR, NULL, bad[i].code, bad[i].part);
        CHECK_HAS(qblk_get_error(), "bad");
        CHECK(!strchr(qblk_get_error(), '\x1b'));
        bad_server_end(&s, "bad");
    }
}

static void replies(void)
{
    static const struct {
        const char *how;
        int code;
    } bad[] = {
        {"magic", QBLK_EPROTO}, {"cookie", QBLK_EPROTO}, {"chunk", QBLK_EPROTO},
        {"EIO", -EIO}, {"ENOSPC", -ENOSPC}, {"unknown error", -EINVAL},
    };
    char buf[512] = "";
    bad_server s;
    qblk *nbd = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        bad_server_begin(&s, "bad", answers, bad[i].how);
        OK(open_opt(unix_uri("bad", "x"), QBLK_OPEN_RDWR, &nbd,
                    options("format", "raw", "nbd.reconnect", "0", "nbd.connections", "1", NULL)));
        FAILS(qblk_pread(nbd, buf, sizeof buf, 0), bad[i].code, "bad");
        if (bad[i].code != QBLK_EPROTO)
            FAILS(qblk_pwrite(nbd, buf, sizeof buf, 0), bad[i].code, "bad");
        qblk_close(nbd);
        bad_server_end(&s, "bad");
    }
    /* A peer that goes in the middle; a second reply; one that says nothing. */
    static const char *const gone[] = {"hangs up", "cut"};
    for (size_t i = 0; i < 2; i++) {
        bad_server_begin(&s, "bad", answers, gone[i]);
        OK(open_opt(unix_uri("bad", "x"), 0, &nbd, options("format", "raw", "nbd.reconnect", "0", NULL)));
        CHECK(qblk_pread(nbd, buf, sizeof buf, 0) < 0);
        CHECK_HAS(qblk_get_error(), "bad");
        qblk_close(nbd);
        bad_server_end(&s, "bad");
    }
    bad_server_begin(&s, "bad", answers, "twice");
    OK(open_opt(unix_uri("bad", "x"), 0, &nbd,
                options("format", "raw", "nbd.reconnect", "0", "nbd.connections", "1", NULL)));
    int rc = 0;
    for (int i = 0; rc == 0; i++)
        rc = qblk_pread(nbd, buf, sizeof buf, 0);
    /* Found out by the call itself, or before the next. */
    CHECK(rc == QBLK_EPROTO || rc == -ENOTCONN);
    CHECK_HAS(qblk_get_error(), "not under way");
    qblk_close(nbd);
    bad_server_end(&s, "bad");
    bad_server_begin(&s, "bad", answers, "silent");
    OK(open_opt(unix_uri("bad", "x"), 0, &nbd,
                options("format", "raw", "nbd.reconnect", "0", "nbd.timeout", "0.5", NULL)));
    double begun = now();
    FAILS(qblk_pread(nbd, buf, sizeof buf, 0), -ETIMEDOUT, "bad");
    CHECK(now() - begun > 0.4);
    qblk_close(nbd);
    bad_server_end(&s, "bad");
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    nobody_there();
    exports();
    greetings();
    replies();
    return 0;
}
