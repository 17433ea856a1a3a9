/* Options for opening an NBD export: every key with values that are taken and values that are not;
 * which have no use where; and what a URI says beside them. */
#include "nbd.h"

static const struct option {
    const char *key, *good[5], *bad[9];
} OPTIONS[] = {
    {"nbd.connections", {"1", "2", "16", "64"}, {"", "0", "65", "-1", "x", "1.5", "1k"}},
    {"nbd.timeout", {"60", "0.5", "0", "86400"}, {"", "-1", "x", "1s", "nan", "inf", " 1", "1e3"}},
    {"nbd.reconnect", {"30", "0.5", "0", "86400"}, {"", "-1", "x", "1s", "nan", "inf"}},
    {"nbd.busy-poll", {"0", "50", "1000"}, {"", "1001", "-1", "x", "1.5", "50us"}},
    {"nbd.connect-timeout", {"1", "0.5", "0", "86400"}, {"", "-1", "x", "1s", "nan", "inf"}},
    {"nbd.contexts", {"", "base:allocation", "x-unknown:context", "base:allocation,qemu:allocation-depth"}, {NULL}},
    {"nbd.export", {"x"}, {NULL}},
    {"tls", {"off"}, {"", "no", "1", "ON"}},
    {"cache.l2-size", {"1M"}, {"", "x"}},
    {"format", {"raw"}, {"", "nonsense"}},
    {"implicit-open", {"local", "deny", "any"}, {"", "x"}},
};

static void each_key(const char *uri)
{
    char found[4], key[64];
    for (size_t i = 0; i < sizeof OPTIONS / sizeof OPTIONS[0]; i++) {
        const struct option *o = &OPTIONS[i];
        strcpy(key, o->key);
        for (int underscore = 0; underscore < 2; underscore++) {
            for (char *p = key; *p; p++)
                *p = underscore && *p == '-' ? '_' : *p;
            for (size_t n = 0; n < 5 && o->good[n]; n++) {
                qblk *nbd = NULL;
                OK(open_opt(uri, 0, &nbd, options(key, o->good[n], NULL)));
                OK(qblk_pread(nbd, found, 4, 1000));
                CHECK_MEM(found, "data", 4);
                OK(qblk_close(nbd));
            }
        }
        for (size_t n = 0; n < 9 && o->bad[n]; n++) {
            qblk *nbd = NULL;
            FAILS(open_opt(uri, 0, &nbd, options(o->key, o->bad[n], NULL)), -EINVAL, o->key);
            CHECK(nbd == NULL);
        }
    }
}

#define REFUSED(uri, opts, code, part) \
    do { \
        qblk *nbd_ = NULL; \
        FAILS(open_opt((uri), 0, &nbd_, (opts)), (code), (part)); \
        CHECK(nbd_ == NULL); \
    } while (0)

static void where_they_have_no_use(const char *uri)
{
    static const char *const keys[][2] = {
        {"argv", "true"}, {"nbd.activation", "on"}, {"nbd.busy-poll", "1"}, {"nbd.connect-timeout", "1"}, {"nbd.connections", "1"},
        {"nbd.contexts", "x:y"}, {"nbd.export", "x"}, {"nbd.reconnect", "1"}, {"nbd.timeout", "1"},
        {"tls", "off"}, {"tls-ca", "x"}, {"tls-certificate", "x"}, {"tls-certificates", "x"},
        {"tls-hostname", "x"}, {"tls-key", "x"}, {"tls-psk-file", "x"}, {"tls-verify-peer", "on"},
    };
    int fd = open("disk", O_RDONLY | O_CLOEXEC);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        qblk *dev = NULL;
        qblk_options *o = options(keys[i][0], keys[i][1], NULL);
        REFUSED("disk", options(keys[i][0], keys[i][1], NULL), -EINVAL, keys[i][0]);
        REFUSED("mem:1M", options(keys[i][0], keys[i][1], NULL), -EINVAL, keys[i][0]);
        FAILS(qblk_open_fd(fd, o, 0, &dev), -EINVAL, keys[i][0]);
        FAILS(qblk_create("new", "raw", 1 << 20, o), -EINVAL, keys[i][0]);
        CHECK(dev == NULL && !exists("new"));
        qblk_options_free(o);
    }
    close(fd);
    /* For a command only, and for TLS only. */
    REFUSED(uri, options("argv", "true", NULL), -EINVAL, "'argv'");
    REFUSED(uri, options("nbd.activation", "on", NULL), -EINVAL, "'nbd.activation'");
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        if (strncmp(keys[i][0], "tls-", 4) != 0 || strcmp(keys[i][0], "tls-psk-file") == 0)
            continue;
        REFUSED(uri, options(keys[i][0], keys[i][1], NULL), -EINVAL, keys[i][0]);
        REFUSED(uri, options("tls", "off", keys[i][0], keys[i][1], NULL), -EINVAL, keys[i][0]);
    }
    REFUSED(uri, options("tls-psk-file", "x", NULL), QBLK_EUNSUPPORTED, "PSK");
    REFUSED(uri, options("tls", "required", "tls-psk-file", "x", NULL), QBLK_EUNSUPPORTED, "PSK");
    REFUSED(uri, options("tls", "required", "tls-verify-peer", "maybe", NULL), -EINVAL, "'tls-verify-peer'");
    REFUSED(uri, options("tls", "required", "tls-certificates", "missing", NULL), -EINVAL, "missing");
    REFUSED(uri, options("tls", "required", "tls-hostname", "h", "tls-ca", "missing.pem", NULL), -ENOENT, "missing.pem");
    /* Misspelt ones are named, with what they may be meant for. */
    REFUSED(uri, options("nbd.timeuot", "1", NULL), -EINVAL, "'nbd.timeout'");
    REFUSED(uri, options("nbd.conections", "1", NULL), -EINVAL, "'nbd.connections'");
}

static void uris(void)
{
    static const char *const bad[][2] = {
        {"nbd:localhost:10809", "nbd://localhost"}, {"nbd:localhost:10809:exportname=x", "nbd://localhost/x"},
        {"nbd:unix:sock", "nbd+unix:///?socket=sock"}, {"nbd:", "nbd"}, {"nbd://h:0/", "port"},
        {"nbd://h:65536/", "port"}, {"nbd://h:x/", "port"}, {"nbd://u:secret@h/", "password"},
        {"nbd://h/x#y", "%23"}, {"nbd://h/%zz", "%"}, {"nbd://h/x?sock=y", "sock"},
        {"nbd://h/?socket=y", "nbd+unix"}, {"nbd+unix://", "socket"}, {"nbd+unix:///x", "socket"},
        {"nbd+unix://h/x?socket=y", "'h'"}, {"nbd+unix:///?socket=a&socket=b", "twice"},
        {"nbd+unix:///?socket=", "no value"}, {"nbd://::1/", "brackets"}, {"nbd://[h]/", "IPv6"},
        {"nbds://h/?tls-verify-peer=maybe", "maybe"}, {"nbds://h/?tls-type=anon", "x509"},
        {"nbd+exec:", "'argv'"}, {"nbd+exec:ls", "nbd+exec:"}, {"nbd+vsock://x", "number"},
        {"nbd://h/x?tls-certificates=/x", "without TLS"}, {"nbd://h/x?tls-verify-peer=off", "without TLS"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        REFUSED(bad[i][0], NULL, -EINVAL, bad[i][1]);
    REFUSED("nbd://u:secret@h/", NULL, -EINVAL, "password");
    CHECK(!strstr(qblk_get_error(), "secret"));
    REFUSED("nbds+unix:///x?socket=sock", options("tls", "off", NULL), -EINVAL, "nbds");
    REFUSED("nbd+unix:///x?socket=sock&tls-psk-file=keys", NULL, QBLK_EUNSUPPORTED, "PSK");
    REFUSED("nbds://someone@h/x", NULL, QBLK_EUNSUPPORTED, "PSK");
    /* A server that has no TLS is told that it is wanted; what it says is not taken for success. */
    REFUSED("nbds+unix:///x?socket=sock&tls-verify-peer=off", NULL, -EACCES, "TLS");
    REFUSED("nbd+unix:///x?socket=sock", options("tls", "required", "tls-verify-peer", "off", NULL), -EACCES, "TLS");
}

int main(int argc, char **argv)
{
    char buf[64];
    qblk_info info;
    (void)argc;
    test_begin(argv);
    alarm(300);
    qblk *dev = new_device("mem", 1 << 20), *nbd = NULL, *context = NULL;
    qblk_server *srv = NULL;
    qblk_options *o = options("description", "text for people", NULL);
    OK(qblk_server_new(&srv));
    OK(qblk_server_add_export2(srv, "x", dev, o, 0));
    qblk_options_free(o);
    make_file("disk", "", 0, 1 << 20);
    OK(qblk_pwrite(dev, "data", 4, 1000));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    const char *uri = "nbd+unix:///x?socket=sock";
    each_key(uri);
    where_they_have_no_use(uri);
    uris();

    /* An option says which export, whatever the URI says. */
    OK(open_opt("nbd+unix:///other?socket=sock", 0, &nbd, options("nbd.export", "x", NULL)));
    OK(qblk_close(nbd));
    REFUSED("nbd+unix:///x?socket=sock", options("nbd.export", "other", NULL), -ENOENT, "'other'");
    /* Schemes and the host are in any case of letters. */
    nbd = must_open("NBD+Unix:///x?socket=sock", QBLK_OPEN_RDWR);
    static const char *const told[][2] = {{"nbd.export", "x"}, {"nbd.protocol", "extended"}, {"nbd.tls", "off"},
        {"nbd.multi-conn", "on"}, {"nbd.minimum-block", "1"}, {"nbd.maximum-payload", "33554432"},
        {"nbd.description", "text for people"}, {"nbd.contexts", "base:allocation,qemu:allocation-depth"}};
    for (size_t i = 0; i < sizeof told / sizeof told[0]; i++) {
        CHECK_INT(qblk_get_property(nbd, told[i][0], buf, sizeof buf), strlen(told[i][1]));
        CHECK_STR(buf, told[i][1]);
    }
    OK(qblk_get_info(nbd, &info));
    CHECK_STR(info.driver, "nbd");
    /* A context shares the connection's settings, and has none of its own. */
    o = options("nbd.timeout", "1", NULL);
    FAILS(qblk_context_open(nbd, o, 0, &context), -EINVAL, "'nbd.timeout'");
    qblk_options_free(o);
    /* Reopened with others. */
    o = options("nbd.connections", "3", "nbd.timeout", "5", NULL);
    OK(qblk_reopen2(nbd, o, QBLK_OPEN_RDWR));
    qblk_options_free(o);
    OK(qblk_pwrite(nbd, "more", 4, 1000));
    OK(qblk_pread(dev, buf, 4, 1000));
    CHECK_MEM(buf, "more", 4);
    OK(qblk_close(nbd));
    /* A file whose name looks like a URI is to be had as one. */
    REFUSED("nbd:disk", NULL, -EINVAL, "nbd");
    make_file("nbd:disk", "file", 4, 1 << 20);
    nbd = must_open("file:nbd:disk", 0);
    OK(qblk_close(nbd));
    /* What describes needs one connection, and moves no data. */
    nbd = must_open(uri, QBLK_OPEN_INFO_ONLY);
    OK(qblk_get_info(nbd, &info));
    CHECK_INT(info.size, 1 << 20);
    FAILS(qblk_pread(nbd, buf, 1, 0), -EBADF, "QBLK_OPEN_INFO_ONLY");
    OK(qblk_close(nbd));
    qblk_server_free(srv);
    OK(qblk_close(dev));
    return 0;
}
