/* What is set of a server: every key with values that are taken and values that are not, before the
 * first client may come and not later; an unknown key is answered with those that there are. */
#include "nbd.h"

static const struct setting {
    const char *key, *good[5], *bad[9];
} SETTINGS[] = {
    {"tls", {"off", "on", "required"}, {"", "ON", "yes", "1", "require"}},
    {"tls-certificate", {"file.pem", "-----BEGIN CERTIFICATE-----"}, {""}},
    {"tls-key", {"file.pem", "-----BEGIN PRIVATE KEY-----"}, {""}},
    {"tls-ca", {"file.pem", "-----BEGIN CERTIFICATE-----"}, {""}},
    {"tls-certificates", {"."}, {NULL}},
    {"tls-verify-peer", {"on", "off"}, {"", "1", "true", "On"}},
    {"max-connections", {"1", "256", "65536"}, {"", "0", "65537", "-1", "1k", "x", "1.5", " 1"}},
    {"max-connections-per-peer", {"1", "128", "65536"}, {"", "0", "65537", "-1", "x"}},
    {"handshake-timeout", {"0.001", "10", "86400"}, {"", "0", "86401", "-1", "x", "1s", "inf", "nan"}},
    {"idle-timeout", {"0", "0.5", "31536000"}, {"", "31536001", "-1", "x", "1m", "nan"}},
    {"max-request", {"64k", "65536", "32M", "64M"}, {"", "0", "63k", "65M", "-1", "x"}},
    {"max-in-flight", {"1", "64", "4096"}, {"", "0", "4097", "-1", "x"}},
    {"max-in-flight-in-all", {"1", "1024", "65536"}, {"", "0", "65537", "-1", "x"}},
    {"max-memory-per-connection", {"64k", "8M", "4G"}, {"", "0", "63k", "5G", "-1", "x"}},
    {"max-option", {"8k", "64k", "1M"}, {"", "0", "7k", "2M", "-1", "x"}},
    {"max-memory", {"1M", "64M", "64G"}, {"", "0", "1023k", "65G", "-1", "x"}},
    {"threads", {"1", "16", "256"}, {"", "0", "257", "-1", "x"}},
    {"busy-poll", {"0", "50", "1000"}, {"", "1001", "-1", "x", "1.5", "50us"}},
};
enum { N = sizeof SETTINGS / sizeof SETTINGS[0] };

int main(int argc, char **argv)
{
    qblk_server *srv;
    char key[64], buf[8];
    qblk *dev, *nbd;
    (void)argc;
    test_begin(argv);
    alarm(120);
    OK(qblk_server_new(&srv));
    for (size_t i = 0; i < N; i++) {
        const struct setting *s = &SETTINGS[i];
        for (size_t n = 0; n < 5 && s->good[n]; n++)
            OK(qblk_server_set(srv, s->key, s->good[n]));
        for (size_t n = 0; n < 9 && s->bad[n]; n++) {
            FAILS(qblk_server_set(srv, s->key, s->bad[n]), -EINVAL, s->key);
            CHECK_HAS(qblk_get_error(), "expected ");
        }
        /* An underscore is a hyphen. */
        strcpy(key, s->key);
        for (char *p = key; *p; p++)
            *p = *p == '-' ? '_' : *p;
        OK(qblk_server_set(srv, key, s->good[0]));
    }
    /* Unknown: all that are known are named. */
    FAILS(qblk_server_set(srv, "max-conections", "1"), -EINVAL, "'max-conections'");
    for (size_t i = 0; i < N; i++)
        CHECK_HAS(qblk_get_error(), SETTINGS[i].key);
    FAILS(qblk_server_set(srv, "", "1"), -EINVAL, "''");
    FAILS(qblk_server_set(srv, "TLS", "on"), -EINVAL, "'TLS'");
    FAILS(qblk_server_set(srv, "a\nb", "on"), -EINVAL, "'a\\nb'");
    FAILS(qblk_server_set(srv, "threads", "1\n2"), -EINVAL, "'1\\n2'");
    /* What may be secret is not repeated. */
    FAILS(qblk_server_set(srv, "tls-verify-peer", "hush"), -EINVAL, "expected on or off");
    CHECK(!strstr(qblk_get_error(), "hush"));
    qblk_server_free(srv);

    /* TLS is looked at when the first client may come; what is missing is named, and can be mended. */
    dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    srv = new_server("", dev, 0);
    OK(qblk_server_set(srv, "tls", "on"));
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -EINVAL, "tls-certificate");
    CHECK(!exists("sock"));
    OK(qblk_server_set(srv, "tls-certificate", "gone.pem"));
    OK(qblk_server_set(srv, "tls-key", "gone.pem"));
    FAILS(qblk_server_listen(srv, "nbd+unix:///?socket=sock"), -ENOENT, "gone.pem");
    CHECK(!exists("sock"));
    OK(qblk_server_set(srv, "tls", "off"));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    /* Too late. */
    for (size_t i = 0; i < N; i++)
        FAILS(qblk_server_set(srv, SETTINGS[i].key, SETTINGS[i].good[0]), -EINVAL, "before the first listen");
    nbd = must_open(server_uri(srv), 0);
    OK(qblk_pread(nbd, buf, 8, 0));
    OK(qblk_close(nbd));
    qblk_server_free(srv);
    OK(qblk_close(dev));
    return 0;
}
