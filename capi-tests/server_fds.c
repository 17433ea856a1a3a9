/* Descriptors that the program brings: a listening socket, a connected one, and one to open. The
 * library works on duplicates; the program's own stay open and usable. */
#include "nbd.h"
#include <netinet/in.h>
#include <netinet/tcp.h>

static qblk *dev;

static void same_data(qblk *nbd, uint64_t seed)
{
    unsigned char want[5000], found[5000];
    fill(want, sizeof want, seed);
    OK(qblk_pwrite(nbd, want, sizeof want, seed));
    OK(qblk_flush(nbd));
    OK(qblk_pread(dev, found, sizeof found, seed));
    CHECK_MEM(found, want, sizeof want);
}

static int is_open(int fd)
{
    return fcntl(fd, F_GETFD) != -1;
}

static void a_listening_socket(void)
{
    qblk *nbd;
    qblk_server *srv = new_server("x", dev, 0);
    int fd = unix_listen("sock");
    OK(qblk_server_listen_fd(srv, fd));
    CHECK_STR(server_uri(srv), "nbd+unix:///x?socket=sock");
    nbd = must_open(server_uri(srv), QBLK_OPEN_RDWR);
    same_data(nbd, 1);
    CHECK(is_open(fd));
    /* It is closed here and served there. */
    close(fd);
    same_data(nbd, 2);
    OK(qblk_close(nbd));
    nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
    same_data(nbd, 3);
    OK(qblk_close(nbd));
    OK(qblk_server_stop(srv, 1000));
    /* Who made the path removes it. */
    CHECK(exists("sock"));
    unlink("sock");
    qblk_server_free(srv);

    /* One that the program keeps: the next server takes it over. */
    fd = unix_listen("sock");
    for (int i = 0; i < 3; i++) {
        srv = new_server("x", dev, 0);
        OK(qblk_server_listen_fd(srv, fd));
        nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
        same_data(nbd, 4);
        OK(qblk_close(nbd));
        OK(qblk_server_stop(srv, 0));
        qblk_server_free(srv);
        CHECK(is_open(fd));
    }
    close(fd);
    unlink("sock");

    /* TCP: the URI has the port that the system gave. */
    struct sockaddr_in at;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_INT(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
    CHECK_INT(listen(fd, 1), 0);
    srv = new_server("x", dev, 0);
    OK(qblk_server_listen_fd(srv, fd));
    CHECK_HAS(server_uri(srv), "nbd://127.0.0.1:");
    nbd = must_open(server_uri(srv), QBLK_OPEN_RDWR);
    same_data(nbd, 5);
    OK(qblk_close(nbd));
    qblk_server_free(srv);
    close(fd);
}

static void both_ends_of_a_pair(void)
{
    char c, text[8];
    int fd[2];
    qblk *nbd, *context = NULL;
    qblk_options *o = options("nbd.export", "x", NULL);
    qblk_server *srv = new_server("x", dev, 0);
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    OK(qblk_server_serve_fd(srv, fd[0]));
    CHECK(is_open(fd[0]));
    close(fd[0]);
    /* It is connected: there is nothing to start. */
    qblk_options *start = options("argv", "true", NULL);
    FAILS(qblk_open_fd(fd[1], start, 0, &context), -EINVAL, "'argv'");
    qblk_options_free(start);
    OK(qblk_open_fd(fd[1], o, QBLK_OPEN_RDWR, &nbd));
    CHECK(is_open(fd[1]));
    close(fd[1]);
    same_data(nbd, 6);
    OK(qblk_context_open(nbd, NULL, QBLK_OPEN_RDWR, &context));
    same_data(context, 7);
    OK(qblk_close(nbd));
    same_data(context, 8);
    OK(qblk_close(context));

    /* The client hangs up: the server's side, which the program kept, is told. */
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    OK(qblk_server_serve_fd(srv, fd[0]));
    OK(qblk_open_fd(fd[1], o, 0, &nbd));
    OK(qblk_pread(nbd, text, 8, 0));
    OK(qblk_close(nbd));
    close(fd[1]);
    /* What the client said last may come to this end of the server's socket or to the library's. */
    while (recv(fd[0], &c, 1, 0) > 0)
        ;
    CHECK_INT(recv(fd[0], &c, 1, 0), 0);
    close(fd[0]);

    /* The server stops: the client is told, and has nobody to come back to. */
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    OK(qblk_server_serve_fd(srv, fd[0]));
    close(fd[0]);
    OK(qblk_open_fd(fd[1], o, 0, &nbd));
    close(fd[1]);
    OK(qblk_server_stop(srv, 0));
    CHECK(qblk_pread(nbd, text, 8, 0) < 0);
    CHECK(begins_with_a_function(qblk_get_error()));
    OK(qblk_close(nbd));
    qblk_options_free(o);
    qblk_server_free(srv);
}

/* TCP, connected by the program: what is sent in parts must not wait until the peer has acknowledged the
 * first, which takes it 40 ms. The options are the sockets', not the descriptors'. */
static void both_ends_over_tcp(void)
{
    struct sockaddr_in at;
    socklen_t size = sizeof at;
    int end[2], no_delay = 0, on = 0;
    qblk *nbd;
    qblk_options *o = options("nbd.export", "x", NULL);
    qblk_server *srv = new_server("x", dev, 0);
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_INT(bind(fd, (struct sockaddr *)&at, sizeof at), 0);
    CHECK_INT(listen(fd, 1), 0);
    CHECK_INT(getsockname(fd, (struct sockaddr *)&at, &size), 0);
    end[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_INT(connect(end[1], (struct sockaddr *)&at, sizeof at), 0);
    end[0] = accept(fd, NULL, NULL);
    CHECK(end[0] >= 0);
    OK(qblk_server_serve_fd(srv, end[0]));
    OK(qblk_open_fd(end[1], o, QBLK_OPEN_RDWR, &nbd));
    same_data(nbd, 9);
    for (int i = 0; i < 2; i++) {
        size = sizeof on;
        CHECK_INT(getsockopt(end[i], IPPROTO_TCP, TCP_NODELAY, &on, &size), 0);
        no_delay += on != 0;
        close(end[i]);
    }
    CHECK_INT(no_delay, 2);
    OK(qblk_close(nbd));
    qblk_options_free(o);
    qblk_server_free(srv);
    close(fd);
}

static void what_is_no_socket(void)
{
    qblk *nbd = NULL;
    qblk_server *srv = new_server("x", dev, 0);
    FAILS(qblk_server_listen_fd(srv, -1), -EBADF, "descriptor -1");
    FAILS(qblk_server_serve_fd(srv, -1), -EBADF, "descriptor -1");
    FAILS(qblk_server_listen_fd(srv, 9999), -EBADF, "descriptor 9999");
    FAILS(qblk_server_serve_fd(srv, 9999), -EBADF, "descriptor 9999");
    /* What is not connected can not be served, what does not listen brings no clients. */
    int fd[2];
    fd[0] = open("file", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    FAILS(qblk_server_listen_fd(srv, fd[0]), -ENOTSOCK, "socket");
    FAILS(qblk_server_serve_fd(srv, fd[0]), -ENOTSOCK, "socket");
    close(fd[0]);
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    FAILS(qblk_server_listen_fd(srv, fd[0]), -EINVAL, "does not listen");
    close(fd[0]);
    close(fd[1]);
    fd[0] = unix_listen("sock");
    FAILS(qblk_server_serve_fd(srv, fd[0]), -EINVAL, "listens");
    close(fd[0]);
    unlink("sock");
    /* A peer that is gone before it is served. */
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    close(fd[1]);
    CHECK(qblk_server_serve_fd(srv, fd[0]) <= 0);
    close(fd[0]);
    /* And one to open at whose other end nobody is. */
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    close(fd[1]);
    CHECK(qblk_open_fd(fd[0], NULL, 0, &nbd) < 0);
    CHECK(nbd == NULL && begins_with_a_function(qblk_get_error()));
    close(fd[0]);
    OK(qblk_server_stop(srv, 0));
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    FAILS(qblk_server_serve_fd(srv, fd[0]), -EBADF, "stopped");
    close(fd[0]);
    close(fd[1]);
    fd[0] = unix_listen("sock");
    FAILS(qblk_server_listen_fd(srv, fd[0]), -EBADF, "stopped");
    close(fd[0]);
    unlink("sock");
    qblk_server_free(srv);
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(120);
    dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    a_listening_socket();
    both_ends_of_a_pair();
    both_ends_over_tcp();
    what_is_no_socket();
    OK(qblk_close(dev));
    return 0;
}
