/* What a server exports, told to a function of the program's. */
#include "nbd.h"

typedef struct list {
    int n, most;
    char names[8][64], texts[8][64];
} list;

static int each(void *opaque, const char *name, const char *description)
{
    list *l = (list *)opaque;
    CHECK(l->n < 8);
    snprintf(l->names[l->n], sizeof l->names[0], "%s", name);
    snprintf(l->texts[l->n], sizeof l->texts[0], "%s", description);
    l->n++;
    return l->n == l->most;
}

static void answers_twice_too_many(int fd, const void *arg)
{
    unsigned char b[64] = {0};
    const char *how = (const char *)arg;
    if (!bad_greet(fd))
        return;
    for (uint32_t option; (option = bad_option(fd)) != 0;) {
        if (option != OPT_LIST) {
            bad_answer(fd, option, 1, NULL, 0);
            return;
        }
        if (strcmp(how, "refuse") == 0) {
            bad_answer(fd, option, 0x80000002u, "not \x1b[31mtold", 13);
            return;
        }
        if (strcmp(how, "long") == 0)
            be(b, 1000, 4);
        else
            be(b, 1, 4);
        b[4] = 'x';
        bad_answer(fd, option, strcmp(how, "kind") == 0 ? 3 : 2, b, strcmp(how, "short") == 0 ? 3 : 5);
        bad_answer(fd, option, 1, b, strcmp(how, "ack") == 0 ? 7 : 0);
    }
}

int main(int argc, char **argv)
{
    list l;
    (void)argc;
    test_begin(argv);
    alarm(120);
    qblk *dev = must_open("mem:1M", 0);
    qblk_options *o = options("description", "text for people", NULL);
    qblk_server *srv = NULL;
    OK(qblk_server_new(&srv));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    memset(&l, 0, sizeof l);
    CHECK_INT(qblk_nbd_list("nbd+unix:///?socket=sock", NULL, each, &l), 0);
    CHECK_STR(qblk_get_error(), "");
    CHECK_INT(l.n, 0);

    OK(qblk_server_add_export(srv, "b", dev, 0));
    OK(qblk_server_add_export2(srv, "a", dev, o, QBLK_EXPORT_RDONLY));
    OK(qblk_server_add_export(srv, "\xff\xfe", dev, 0));
    OK(qblk_server_add_export(srv, "*", dev, 0));
    CHECK_INT(qblk_nbd_list("nbd+unix:///?socket=sock", NULL, each, &l), 4);
    CHECK_INT(l.n, 4);
    CHECK_STR(l.names[0], ""); /* any name */
    CHECK_STR(l.names[1], "a");
    CHECK_STR(l.texts[1], "text for people");
    CHECK_STR(l.names[2], "b");
    CHECK_STR(l.texts[2], "");
    CHECK_STR(l.names[3], "\xff\xfe");
    /* The name in the URI does not matter; the answer counts all, also when the function ends it. */
    memset(&l, 0, sizeof l);
    l.most = 2;
    CHECK_INT(qblk_nbd_list("nbd+unix:///none?socket=sock", NULL, each, &l), 4);
    CHECK_INT(l.n, 2);

    /* What can go wrong. */
    FAILS(qblk_nbd_list("nbd+unix:///?socket=gone", NULL, each, &l), -ENOENT, "gone");
    FAILS(qblk_nbd_list("gone", NULL, each, &l), -EINVAL, "NBD URI");
    FAILS(qblk_nbd_list("mem:1M", NULL, each, &l), -EINVAL, "NBD URI");
    FAILS(qblk_nbd_list("nbd+unix:///?socket=sock", o, each, &l), -EINVAL, "'description'");
    qblk_options_free(o);
    o = options("nbd.timeout", "x", NULL);
    FAILS(qblk_nbd_list("nbd+unix:///?socket=sock", o, each, &l), -EINVAL, "'nbd.timeout'");
    qblk_options_free(o);
    o = options("tls", "required", "tls-verify-peer", "off", NULL);
    CHECK(qblk_nbd_list("nbd+unix:///?socket=sock", o, each, &l) < 0);
    CHECK_HAS(qblk_get_error(), "TLS");
    qblk_options_free(o);
    qblk_server_free(srv);
    OK(qblk_close(dev));

    static const struct {
        const char *how;
        int code;
    } bad[] = {{"refuse", -EACCES}, {"long", QBLK_EPROTO}, {"short", QBLK_EPROTO},
               {"kind", QBLK_EPROTO}, {"ack", QBLK_EPROTO}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        bad_server s;
        memset(&l, 0, sizeof l);
        bad_server_begin(&s, "bad", answers_twice_too_many, bad[i].how);
        FAILS(qblk_nbd_list("nbd+unix:///?socket=bad", NULL, each, &l), bad[i].code, "bad");
        CHECK_INT(l.n, 0);
        CHECK(!strchr(qblk_get_error(), '\x1b'));
        bad_server_end(&s, "bad");
    }
    return 0;
}
