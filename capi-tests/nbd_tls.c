/* TLS between the library's server and its client: required, offered, verified on both sides, refused
 * where it must be; from files, from a directory, and from text. RUN: tls */
#include "nbd.h"

static qblk *dev;

static const char *text_of(const char *name)
{
    static char text[3][8192];
    static int next;
    char *to = text[next++ % 3];
    FILE *f = fopen(name, "r");
    CHECK(f != NULL);
    size_t n = fread(to, 1, sizeof text[0] - 1, f);
    to[n] = 0;
    fclose(f);
    return to;
}

static void sign(const char *ca, const char *name, const char *cn, const char *alternative)
{
    CHECK_SH("openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout %s-key.pem "
             "-out %s.csr -subj '/CN=%s' 2>/dev/null",
             name, name, cn);
    CHECK_SH("printf 'subjectAltName=%s\\n' > ext", alternative);
    CHECK_SH("openssl x509 -req -in %s.csr -CA %s-cert.pem -CAkey %s-key.pem -CAcreateserial -days 30 "
             "-extfile ext -out %s-cert.pem 2>/dev/null",
             name, ca, ca, name);
}

static void make_ca(const char *name)
{
    CHECK_SH("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 "
             "-keyout %s-key.pem -out %s-cert.pem -subj '/CN=%s' "
             "-addext keyUsage=critical,keyCertSign 2>/dev/null",
             name, name, name);
}

#define SET(key, value) OK(qblk_server_set(srv, key, value))

static qblk_server *tls_server(const char *tls)
{
    qblk_server *srv = new_server("x", dev, 0);
    SET("tls", tls);
    SET("tls-certificate", "server-cert.pem");
    SET("tls-key", "server-key.pem");
    return srv;
}

#define OPENS(uri, opts) \
    do { \
        qblk *nbd_ = NULL; \
        char buf_[3000]; \
        OK(open_opt((uri), QBLK_OPEN_RDWR, &nbd_, (opts))); \
        OK(qblk_pwrite2(nbd_, "Howdy", 5, 1000, QBLK_REQ_FUA)); \
        OK(qblk_pread(nbd_, buf_, sizeof buf_, 0)); \
        CHECK_MEM(buf_ + 1000, "Howdy", 5); \
        OK(qblk_close(nbd_)); \
    } while (0)
#define REFUSED(uri, opts, code, part) \
    do { \
        qblk *nbd_ = NULL; \
        FAILS(open_opt((uri), 0, &nbd_, (opts)), (code), (part)); \
        CHECK(nbd_ == NULL); \
    } while (0)

static void over_tcp(void)
{
    static unsigned char want[3 << 20], found[3 << 20];
    char plain[128], with_host[256];
    qblk *nbd = NULL;
    qblk_server *srv = tls_server("required");
    OK(qblk_server_listen(srv, "nbds://127.0.0.1:0"));
    const char *uri = server_uri(srv);
    CHECK_HAS(uri, "nbds://127.0.0.1:");
    OPENS(uri, options("tls-ca", "ca-cert.pem", NULL));
    OPENS(uri, options("tls-ca", text_of("ca-cert.pem"), NULL));
    OPENS(uri, options("tls-certificates", "client-dir", NULL));
    OPENS(uri, options("tls", "required", "tls-ca", "ca-cert.pem", NULL));
    OPENS(uri, options("tls-verify-peer", "off", NULL));
    snprintf(with_host, sizeof with_host, "%s?tls-certificates=client-dir&tls-hostname=localhost", uri);
    OPENS(with_host, NULL);
    snprintf(plain, sizeof plain, "nbd%s", uri + 4);
    OPENS(plain, options("tls", "required", "tls-ca", "ca-cert.pem", NULL));
    /* Whoever does not ask for it gets nothing. */
    REFUSED(plain, NULL, -EACCES, "TLS");
    REFUSED(plain, options("tls", "off", NULL), -EACCES, "TLS");
    CHECK(qblk_nbd_list(plain, NULL, (qblk_nbd_list_fn)0, NULL) == -EINVAL);
    /* A certificate of somebody else, for another name, and no authority to ask. */
    REFUSED(uri, options("tls-ca", "other-cert.pem", NULL), -EACCES, "ertificate");
    REFUSED(uri, options("tls-ca", "ca-cert.pem", "tls-hostname", "example.org", NULL), -EACCES, "ertificate");
    REFUSED(uri, options("tls-ca", "server-key.pem", NULL), -EINVAL, "tls-ca");
    REFUSED(uri, options("tls-ca", "gone.pem", NULL), -ENOENT, "gone.pem");
    REFUSED(uri, options("tls-certificate", "client-cert.pem", "tls-ca", "ca-cert.pem", NULL), -EINVAL, "tls-key");
    /* Large requests, side by side with others. */
    OK(open_opt(uri, QBLK_OPEN_RDWR, &nbd, options("tls-ca", "ca-cert.pem", NULL)));
    fill(want, sizeof want, 3);
    OK(qblk_pwrite(nbd, want, sizeof want, 77));
    OK(qblk_pread(nbd, found, sizeof found, 77));
    CHECK_MEM(found, want, sizeof want);
    OK(qblk_close(nbd));
    qblk_server_free(srv);
}

static void offered_over_unix(void)
{
    qblk_server *srv = tls_server("on");
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    CHECK_STR(server_uri(srv), "nbd+unix:///x?socket=sock");
    OPENS("nbd+unix:///x?socket=sock", NULL);
    /* There is no host in such a URI, so it has to be said whose certificate is expected. */
    OPENS("nbds+unix:///x?socket=sock", options("tls-ca", "ca-cert.pem", "tls-hostname", "localhost", NULL));
    qblk_server_free(srv);
}

static int count(void *opaque, const char *name, const char *description)
{
    (void)name, (void)description;
    ++*(int *)opaque;
    return 0;
}

static void clients_with_certificates(void)
{
    int n = 0;
    qblk_server *srv = new_server("x", dev, 0);
    SET("tls", "required");
    SET("tls-certificate", text_of("server-cert.pem"));
    SET("tls-key", text_of("server-key.pem"));
    SET("tls-ca", text_of("ca-cert.pem"));
    SET("tls-verify-peer", "on");
    OK(qblk_server_listen(srv, "nbd://127.0.0.1:0"));
    const char *uri = server_uri(srv);
    CHECK_HAS(uri, "nbds://");
    OPENS(uri, options("tls-ca", "ca-cert.pem", "tls-certificate", "client-cert.pem", "tls-key",
                       "client-key.pem", NULL));
    OPENS(uri, options("tls-certificates", "client-dir", NULL));
    qblk_options *o = options("tls-certificates", "client-dir", NULL);
    CHECK_INT(qblk_nbd_list(uri, o, count, &n), 1);
    CHECK_INT(n, 1);
    qblk_options_free(o);
    /* Without one, and with one of somebody else. */
    qblk *nbd = NULL;
    CHECK(open_opt(uri, 0, &nbd, options("tls-ca", "ca-cert.pem", NULL)) < 0);
    CHECK(nbd == NULL && begins_with_a_function(qblk_get_error()));
    CHECK(open_opt(uri, 0, &nbd, options("tls-ca", "ca-cert.pem", "tls-certificate", "stranger-cert.pem",
                                         "tls-key", "stranger-key.pem", NULL)) < 0);
    CHECK(nbd == NULL && begins_with_a_function(qblk_get_error()));
    qblk_server_free(srv);
}

static void settings_of_a_server(void)
{
    qblk_server *srv = new_server("x", dev, 0);
    SET("tls", "required");
    SET("tls-certificates", "server-dir");
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    OPENS("nbds+unix:///x?socket=sock&tls-hostname=localhost", options("tls-ca", "ca-cert.pem", NULL));
    qblk_server_free(srv);
    /* A key that is not the certificate's; a file that is none; peers to verify and no authority. */
    srv = tls_server("on");
    SET("tls-key", "client-key.pem");
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -EINVAL, "tls-key");
    SET("tls-key", "ext");
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -EINVAL, "tls-key");
    SET("tls-key", "server-key.pem");
    SET("tls-verify-peer", "on");
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -EINVAL, "tls-ca");
    SET("tls-ca", "ca-cert.pem");
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    qblk_server_free(srv);
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    if (sh("command -v openssl >/dev/null"))
        FAIL_("openssl is missing: apt-get install openssl");
    make_ca("ca");
    make_ca("other");
    sign("ca", "server", "server", "DNS:localhost,IP:127.0.0.1");
    sign("ca", "client", "client", "DNS:client");
    sign("other", "stranger", "stranger", "DNS:client");
    CHECK_SH("mkdir client-dir server-dir && cp ca-cert.pem client-cert.pem client-key.pem client-dir && "
             "cp ca-cert.pem server-cert.pem server-key.pem server-dir");
    dev = must_open("mem:4M", QBLK_OPEN_RDWR);
    over_tcp();
    offered_over_unix();
    clients_with_certificates();
    settings_of_a_server();
    OK(qblk_close(dev));
    return 0;
}
