/*
 * What the programs about NBD share: servers with an export, and raw sockets that speak a little of
 * the protocol, for clients and servers that do not behave.
 */
#ifndef QBLK_TEST_NBD_H
#define QBLK_TEST_NBD_H

#include "test.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* --- the library's server ------------------------------------------------------------------- */

/* A server that exports `dev` as `name`, and does not listen yet. */
static inline qblk_server *new_server(const char *name, qblk *dev, uint32_t flags)
{
    qblk_server *srv = NULL;
    OK(qblk_server_new(&srv));
    CHECK(srv != NULL);
    OK(qblk_server_add_export(srv, name, dev, flags));
    return srv;
}

/* The URI of a Unix socket in the current directory, until four others were made in this thread. */
static inline const char *unix_uri(const char *socket, const char *export_name)
{
    static __thread char uri[4][256];
    static __thread unsigned next;
    char *to = uri[next++ % 4];
    snprintf(to, sizeof uri[0], "nbd+unix:///%s?socket=%s", export_name, socket);
    return to;
}

static inline const char *server_uri(qblk_server *srv)
{
    static char uri[512];
    int64_t n = qblk_server_get_uri(srv, uri, sizeof uri);
    CHECK(n > 0 && n < (int64_t)sizeof uri);
    return uri;
}

/* --- raw sockets ---------------------------------------------------------------------------- */

static inline void unix_address(struct sockaddr_un *at, const char *path)
{
    memset(at, 0, sizeof *at);
    at->sun_family = AF_UNIX;
    CHECK(strlen(path) < sizeof at->sun_path);
    strcpy(at->sun_path, path);
}

static inline int unix_connect(const char *path)
{
    struct sockaddr_un at;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    unix_address(&at, path);
    CHECK_INT(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    return fd;
}

static inline int unix_listen(const char *path)
{
    struct sockaddr_un at;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    unix_address(&at, path);
    CHECK_INT(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
    CHECK_INT(listen(fd, 16), 0);
    return fd;
}

/* All of `n` bytes: 1; the peer has hung up: 0. */
static inline int get_all(int fd, void *buf, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t got = recv(fd, (char *)buf + at, n - at, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        at += (size_t)got;
    }
    return 1;
}

static inline int put_all(int fd, const void *buf, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t put = send(fd, (const char *)buf + at, n - at, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return 0;
        at += (size_t)put;
    }
    return 1;
}

/* Whether the peer hangs up without another byte. Waits for it. */
static inline int hangs_up(int fd)
{
    char c;
    return !get_all(fd, &c, 1);
}

/* Numbers as the protocol has them: big-endian. */
static inline unsigned char *be(unsigned char *to, uint64_t n, int bytes)
{
    for (int i = bytes; i-- > 0; n >>= 8)
        to[i] = (unsigned char)n;
    return to + bytes;
}
static inline uint64_t eb(const unsigned char *from, int bytes)
{
    uint64_t n = 0;
    for (int i = 0; i < bytes; i++)
        n = n << 8 | from[i];
    return n;
}

#define NBD_MAGIC 0x4e42444d41474943u
#define OPT_MAGIC 0x49484156454f5054u
#define REP_MAGIC 0x0003e889045565a9u
enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_LIST = 3, OPT_GO = 7, OPT_STRUCTURED = 8, OPT_SET_META = 10, OPT_EXTENDED = 11 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3 };

/* Choose an export by the shortest way, and send requests from then on; 0 if the server hangs up. */
static inline int raw_negotiate(int fd, const char *name)
{
    unsigned char b[300], *p = b;
    if (!get_all(fd, b, 18))
        return 0;
    CHECK(eb(b, 8) == NBD_MAGIC && eb(b + 8, 8) == OPT_MAGIC);
    p = be(p, 3, 4);
    p = be(p, OPT_MAGIC, 8);
    p = be(p, OPT_EXPORT_NAME, 4);
    p = be(p, strlen(name), 4);
    memcpy(p, name, strlen(name));
    return put_all(fd, b, (size_t)(p - b) + strlen(name)) && get_all(fd, b, 10);
}

static inline int raw_client(const char *path, const char *name)
{
    int fd = unix_connect(path);
    CHECK(raw_negotiate(fd, name));
    return fd;
}

static inline void raw_request(int fd, int command, uint64_t cookie, uint64_t offset, uint32_t count)
{
    unsigned char b[28], *p = b;
    p = be(p, 0x25609513, 4);
    p = be(p, (uint64_t)command, 4);
    p = be(p, cookie, 8);
    p = be(p, offset, 8);
    p = be(p, count, 4);
    CHECK(put_all(fd, b, sizeof b));
}

/* The error number of the reply to `cookie`, 0 if there is none. */
static inline int raw_reply(int fd, uint64_t cookie)
{
    unsigned char b[16];
    CHECK(get_all(fd, b, 16));
    CHECK_INT(eb(b, 4), 0x67446698);
    CHECK_INT(eb(b + 8, 8), cookie);
    return (int)eb(b + 4, 4);
}

/* --- a server that does what a test says ---------------------------------------------------- */

/* Serves one connection after the other on a socket, by `serve`, until told to end. */
typedef struct bad_server {
    int listener;
    void (*serve)(int fd, const void *arg);
    const void *arg;
    pthread_t thread;
} bad_server;

static inline void *bad_server_run_(void *opaque)
{
    bad_server *s = (bad_server *)opaque;
    for (;;) {
        int fd = accept(s->listener, NULL, NULL);
        if (fd < 0)
            return NULL;
        s->serve(fd, s->arg);
        close(fd);
    }
}

static inline void bad_server_begin(bad_server *s, const char *path, void (*serve)(int, const void *),
                                    const void *arg)
{
    s->listener = unix_listen(path);
    s->serve = serve;
    s->arg = arg;
    CHECK_INT(pthread_create(&s->thread, NULL, bad_server_run_, s), 0);
}

static inline void bad_server_end(bad_server *s, const char *path)
{
    shutdown(s->listener, SHUT_RDWR);
    CHECK_INT(pthread_join(s->thread, NULL), 0);
    close(s->listener);
    unlink(path);
}

/* A server's greeting. */
static inline int bad_greet(int fd)
{
    unsigned char b[18];
    be(be(be(b, NBD_MAGIC, 8), OPT_MAGIC, 8), 3, 2);
    return put_all(fd, b, 18) && get_all(fd, b, 4);
}

static inline int bad_answer(int fd, uint32_t option, uint32_t kind, const void *payload, uint32_t len)
{
    unsigned char b[20];
    be(be(be(be(b, REP_MAGIC, 8), option, 4), kind, 4), len, 4);
    return put_all(fd, b, 20) && put_all(fd, payload, len);
}

/* The next option, its payload forgotten; 0 when the client is gone. */
static inline uint32_t bad_option(int fd)
{
    unsigned char b[16], payload[8192];
    if (!get_all(fd, b, 16) || eb(b, 8) != OPT_MAGIC || eb(b + 12, 4) > sizeof payload ||
        !get_all(fd, payload, (size_t)eb(b + 12, 4)))
        return 0;
    return (uint32_t)eb(b + 8, 4);
}

/* Negotiate an export of `size` bytes with simple replies; 0 when the client is gone. */
static inline int bad_negotiate(int fd, uint64_t size, unsigned flags)
{
    unsigned char info[12];
    if (!bad_greet(fd))
        return 0;
    for (;;) {
        uint32_t option = bad_option(fd);
        if (option == OPT_GO) {
            be(be(be(info, 0, 2), size, 8), flags, 2);
            return bad_answer(fd, option, 3, info, 12) && bad_answer(fd, option, 1, NULL, 0);
        }
        if (!option || !bad_answer(fd, option, 0x80000001u, NULL, 0))
            return 0;
    }
}

#endif
