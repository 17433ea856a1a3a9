/* A child of fork may only free the server that it inherited; the server and its clients go on as if
 * there had been none, and so does a client whose connection the child has, too. RUN: fork */
#include "nbd.h"

static qblk *dev, *nbd;
static qblk_server *srv;
static volatile int stop;

static int each(void *opaque, const char *name, const char *description)
{
    (void)opaque, (void)name, (void)description;
    return 0;
}

static void child_may_only_free(void)
{
    char buf[64];
    const char *text = "forked child";
    qblk_server *other = NULL;
    qblk *more = NULL;
    FAILS(qblk_server_new(&other), -ECHILD, text);
    CHECK(other == NULL);
    FAILS(qblk_server_set(srv, "threads", "1"), -ECHILD, text);
    FAILS(qblk_server_add_export(srv, "y", dev, 0), -ECHILD, text);
    FAILS(qblk_server_add_export2(srv, "y", dev, NULL, 0), -ECHILD, text);
    FAILS(qblk_server_remove_export(srv, "x"), -ECHILD, text);
    FAILS(qblk_server_listen(srv, "nbd://127.0.0.1:0"), -ECHILD, text);
    FAILS(qblk_server_listen_fd(srv, 0), -ECHILD, text);
    FAILS(qblk_server_serve_fd(srv, 0), -ECHILD, text);
    FAILS(qblk_server_get_uri(srv, buf, sizeof buf), -ECHILD, text);
    FAILS(qblk_server_wait(srv, 0), -ECHILD, text);
    FAILS(qblk_server_stop(srv, 0), -ECHILD, text);
    FAILS(qblk_nbd_list("nbd+unix:///?socket=sock", NULL, each, NULL), -ECHILD, text);
    FAILS(qblk_open("nbd+unix:///x?socket=sock", 0, &more), -ECHILD, text);
    FAILS(qblk_pread(nbd, buf, 1, 0), -ECHILD, text);
    qblk_server_free(srv);
    qblk_server_free(NULL);
    OK(qblk_close(nbd));
    OK(qblk_close(dev));
    CHECK(exists("sock"));
}

static void *busy(void *arg)
{
    unsigned char want[3000], found[3000];
    const uint64_t at = (uint64_t)(uintptr_t)arg * 100000;
    for (uint64_t n = 0; !stop; n++) {
        fill(want, sizeof want, n);
        OK(qblk_pwrite(nbd, want, sizeof want, at));
        OK(qblk_pread(nbd, found, sizeof found, at));
        CHECK_MEM(found, want, sizeof want);
        if (n % 50 == 0)
            OK(qblk_flush(nbd));
    }
    return NULL;
}

static int wait_for(pid_t pid)
{
    int status;
    CHECK(pid > 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    return status;
}

int main(int argc, char **argv)
{
    pthread_t t[3];
    char buf[4];
    (void)argc;
    test_begin(argv);
    alarm(300);
    dev = new_device("qcow2", 1 << 20);
    srv = new_server("x", dev, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    nbd = must_open(unix_uri("sock", "x"), QBLK_OPEN_RDWR);
    OK(qblk_pwrite(nbd, "kept", 4, 1000));

    pid_t pid = fork();
    if (pid == 0) {
        alarm(60);
        child_may_only_free();
        exit(0);
    }
    CHECK_INT(wait_for(pid), 0);
    OK(qblk_pread(nbd, buf, 4, 1000));
    CHECK_MEM(buf, "kept", 4);

    /* In the middle of requests; half of the children forget all, and run the library's end. */
    for (int i = 0; i < 3; i++)
        CHECK_INT(pthread_create(&t[i], NULL, busy, (void *)(intptr_t)(i + 1)), 0);
    for (int i = 0; i < (quick() ? 6 : 60); i++) {
        pid = fork();
        if (pid == 0) {
            alarm(20);
            CHECK_INT(qblk_server_stop(srv, 0), -ECHILD);
            if (i % 2) {
                qblk_server_free(srv);
                CHECK_INT(qblk_close(nbd), 0);
                CHECK_INT(qblk_close(dev), 0);
            }
            exit(0);
        }
        CHECK_INT(wait_for(pid), 0);
    }
    /* A child that runs another program hands it no descriptor. */
    CHECK_INT(sh("ls -l /proc/self/fd | grep -qE ' ([3-9]|[0-9]{2,}) -> (socket|anon_inode)'"), 1);
    stop = 1;
    for (int i = 0; i < 3; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    OK(qblk_pread(nbd, buf, 4, 1000));
    CHECK_MEM(buf, "kept", 4);
    CHECK(exists("sock"));
    OK(qblk_close(nbd));
    OK(qblk_server_stop(srv, 1000));
    qblk_server_free(srv);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
