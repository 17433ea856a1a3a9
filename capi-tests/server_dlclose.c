/* dlclose while a server runs: the library stays, and serves on; what clients wrote is there when the
 * program ends. RUN: dlopen */
#include "nbd.h"
#include <dlfcn.h>

#define FIND(lib, var, name) \
    do { \
        void *p_ = dlsym(lib, name); \
        CHECK(p_ != NULL); \
        memcpy(&var, &p_, sizeof p_); \
    } while (0)

static void serve_and_forget(const char *file)
{
    int (*open_)(const char *, uint32_t, qblk **);
    int (*new_)(qblk_server **);
    int (*add)(qblk_server *, const char *, qblk *, uint32_t);
    int (*listen_)(qblk_server *, const char *);
    qblk *dev;
    qblk_server *srv;
    void *lib = dlopen("libqblk.so.1", RTLD_NOW | RTLD_LOCAL);
    CHECK(lib != NULL);
    FIND(lib, open_, "qblk_open");
    FIND(lib, new_, "qblk_server_new");
    FIND(lib, add, "qblk_server_add_export");
    FIND(lib, listen_, "qblk_server_listen");
    CHECK_INT(open_(file, QBLK_OPEN_RDWR, &dev), 0);
    CHECK_INT(new_(&srv), 0);
    CHECK_INT(add(srv, "x", dev, 0), 0);
    CHECK_INT(listen_(srv, "nbd+unix:///?socket=sock"), 0);
    CHECK_INT(dlclose(lib), 0);
}

static int child(const char *file)
{
    char c;
    serve_and_forget(file);
    int fd = raw_client("sock", "x");
    raw_request(fd, CMD_WRITE, 1, 12345, 5);
    CHECK(put_all(fd, "Howdy", 5));
    CHECK_INT(raw_reply(fd, 1), 0);
    raw_request(fd, CMD_READ, 2, 12349, 1);
    CHECK_INT(raw_reply(fd, 2), 0);
    CHECK(get_all(fd, &c, 1) && c == 'y');
    return 0;
}

int main(int argc, char **argv)
{
    char found[5];
    if (argc == 3)
        return child(argv[2]);
    test_begin(argv);
    alarm(120);
    make_file("disk", "", 0, 1 << 20);
    CHECK_INT(run_self("child", "disk"), 0);
    CHECK(!exists("sock"));
    int fd = open("disk", O_RDONLY);
    CHECK_INT(pread(fd, found, 5, 12345), 5);
    CHECK_MEM(found, "Howdy", 5);
    close(fd);
    return 0;
}
