/* A server that is started for one device, over its standard input and output or handed a listening
 * socket: here this program itself, and nbdkit. It is gone when the device is closed. */
#include "nbd.h"

/* The server's program. */
static int serve(const char *how)
{
    qblk *dev = must_open("mem:1M", QBLK_OPEN_RDWR);
    qblk_server *srv = new_server("x", dev, 0);
    OK(qblk_pwrite(dev, how, strlen(how), 0));
    FILE *f = fopen("pid", "w");
    fprintf(f, "%d", (int)getpid());
    fclose(f);
    if (strcmp(how, "ends") == 0)
        return 3;
    if (strcmp(how, "listens") == 0) {
        CHECK_STR(getenv("LISTEN_FDS"), "1");
        CHECK_INT(atoi(getenv("LISTEN_PID")), getpid());
        OK(qblk_server_listen_fd(srv, 3));
        OK(qblk_server_wait(srv, -1));
        return 0;
    }
    OK(qblk_server_serve_fd(srv, 0));
    /* The client is gone when nobody has the other end. */
    struct pollfd p = {0, 0, 0};
    while (poll(&p, 1, -1) < 0)
        ;
    if (strcmp(how, "deaf") == 0)
        for (signal(SIGTERM, SIG_IGN);;)
            pause();
    return 0;
}

static pid_t server_pid(void)
{
    int pid = 0;
    FILE *f = fopen("pid", "r");
    CHECK(f != NULL);
    CHECK_INT(fscanf(f, "%d", &pid), 1);
    fclose(f);
    return pid;
}

static void own(const char *how, const char *activation)
{
    char argv[2 * PATH_MAX], found[16];
    qblk *nbd = NULL, *other = NULL;
    snprintf(argv, sizeof argv, "'%s' serve %s", test_self_, how);
    OK(open_opt("nbd+exec:///x", QBLK_OPEN_RDWR, &nbd,
                options("argv", argv, "nbd.activation", activation, NULL)));
    OK(qblk_pread(nbd, found, strlen(how), 0));
    CHECK_MEM(found, how, strlen(how));
    OK(qblk_pwrite2(nbd, "Howdy", 5, 1000, QBLK_REQ_FUA));
    OK(qblk_context_open(nbd, NULL, 0, &other));
    OK(qblk_close(nbd));
    OK(qblk_pread(other, found, 5, 1000));
    CHECK_MEM(found, "Howdy", 5);
    CHECK_INT(kill(server_pid(), 0), 0);
    OK(qblk_close(other));
    /* Ended, and waited for. */
    CHECK_INT(kill(server_pid(), 0), -1);
    CHECK_INT(waitpid(-1, NULL, WNOHANG), -1);
    CHECK_INT(errno, ECHILD);
    remove("pid");
}

#define REFUSED(uri, opts, code, part) \
    do { \
        qblk *nbd_ = NULL; \
        FAILS(open_opt((uri), 0, &nbd_, (opts)), (code), (part)); \
        CHECK(nbd_ == NULL); \
    } while (0)

int main(int argc, char **argv)
{
    char text[2 * PATH_MAX], found_dir[PATH_MAX], found[5];
    qblk *nbd = NULL;
    if (argc == 3)
        return serve(argv[2]);
    test_begin(argv);
    alarm(300);
    own("stdio", "off");
    own("listens", "on");
    if (!quick())
        own("deaf", "off");

    REFUSED("nbd+exec:", NULL, -EINVAL, "'argv'");
    REFUSED("nbd+exec:", options("argv", "", NULL), -EINVAL, "'argv'");
    REFUSED("nbd+exec:", options("argv", "  ", NULL), -EINVAL, "'argv'");
    REFUSED("nbd+exec:", options("argv", "'a", NULL), -EINVAL, "'argv'");
    REFUSED("nbd+exec:", options("argv", "a\\", NULL), -EINVAL, "'argv'");
    /* Valgrind does not pass on that it could not be run. */
    if (!quick())
        REFUSED("nbd+exec:", options("argv", "no-such-program-anywhere", NULL), -ENOENT, "no-such-program");
    REFUSED("nbd+exec:", options("argv", "true", "nbd.activation", "maybe", NULL), -EINVAL, "'nbd.activation'");
    REFUSED("nbd+exec://host/x", options("argv", "true", NULL), -EINVAL, "nbd+exec:");
    REFUSED("nbd+exec:", options("argv", "true", "nbd.timeuot", "1", NULL), -EINVAL, "'nbd.timeout'");
    /* One that ends, and one that is no server. */
    snprintf(text, sizeof text, "'%s' serve ends", test_self_);
    CHECK(open_opt("nbd+exec:", 0, &nbd, options("argv", text, NULL)) < 0);
    CHECK(begins_with_a_function(qblk_get_error()));
    CHECK(open_opt("nbd+exec:", 0, &nbd, options("argv", text, "nbd.activation", "on", NULL)) < 0);
    CHECK(begins_with_a_function(qblk_get_error()));
    REFUSED("nbd+exec:", options("argv", "echo this is not a server at all", NULL), QBLK_EPROTO, "this is");
    /* How it ended is told. */
    REFUSED("nbd+exec:", options("argv", "sh -c 'exit 37'", NULL), -ECONNRESET, "status 37");
    CHECK_INT(waitpid(-1, NULL, WNOHANG), -1);
    /* A directory for temporary files whose name leaves no room for a socket's. */
    const char *was = getenv("TMPDIR");
    char *old = was ? strdup(was) : NULL;
    snprintf(text, sizeof text, "%0120d", 1);
    CHECK_INT(mkdir(text, 0700), 0);
    CHECK(realpath(text, found_dir) != NULL);
    CHECK_INT(setenv("TMPDIR", found_dir, 1), 0);
    OK(open_opt("nbd+exec:", 0, &nbd, options("argv", "nbdkit memory 1M", "nbd.activation", "on", NULL)));
    OK(qblk_close(nbd));
    CHECK_INT(old ? setenv("TMPDIR", old, 1) : unsetenv("TMPDIR"), 0);
    free(old);

    /* Words are taken apart as a shell does, and no shell is asked. */
    OK(open_opt("nbd+exec:", QBLK_OPEN_RDWR, &nbd,
                options("argv", "nbdkit -s memory \"1M\" '--filter=log' logfile=a\\ b", NULL)));
    OK(qblk_pwrite(nbd, "Howdy", 5, 1000));
    OK(qblk_pread(nbd, found, 5, 1000));
    CHECK_MEM(found, "Howdy", 5);
    OK(qblk_close(nbd));
    CHECK(exists("a b"));
    return 0;
}
