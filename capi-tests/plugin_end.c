/* The end of a program that has devices on plugins open, closed by nobody: they are flushed and closed
 * before anything of the plugin is taken down, each once; a child of fork leaves them alone. Many instances
 * in one process. RUN: plugin, RUN: fork */
#include "test.h"

static char name_[3 * PATH_MAX];

static const char *ending(const char *object, const char *log)
{
    const char *dir = getenv("QBLK_TEST_PLUGINS");
    CHECK(dir != NULL);
    snprintf(name_, sizeof name_, "plugin:%s/%s?%s%s", dir, object, log ? "log=" : "", log ? log : "");
    return name_;
}

/* In a process of its own. */
static int forget(const char *how)
{
    qblk *dev, *image;
    qblk_server *srv;
    OK(qblk_open(ending("ending.so", "log"), QBLK_OPEN_RDWR, &dev));
    OK(qblk_pwrite(dev, "x", 1, 5000));
    if (strcmp(how, "closed") == 0)
        OK(qblk_close(dev));
    if (strcmp(how, "served") == 0) {
        OK(qblk_server_new(&srv));
        OK(qblk_server_add_export(srv, "", dev, 0));
        OK(qblk_server_listen(srv, "nbd+unix:///?socket=socket"));
    }
    if (strcmp(how, "layered") == 0)
        OK(qblk_layer_push(dev, "offset;offset=512", NULL, 0));
    if (strcmp(how, "pushed") == 0) {
        /* The plugin is a layer, which came later. */
        OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &image));
        const char *dir = getenv("QBLK_TEST_PLUGINS");
        CHECK(dir != NULL);
        snprintf(name_, sizeof name_, "%s/layer-thread.so", dir);
        OK(qblk_layer_push(image, name_, NULL, 0));
        OK(qblk_pwrite(image, "y", 1, 0));
    }
    if (strcmp(how, "later") == 0) {
        /* Another plugin, and something else, opened behind it. */
        OK(qblk_open(ending("flat.so", NULL), QBLK_OPEN_RDWR, &image));
        OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &image));
    }
    if (strcmp(how, "forked") == 0) {
        int status;
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            char buf[1];
            FAILS(qblk_pread(dev, buf, 1, 0), -ECHILD, "forked");
            CHECK_INT(qblk_close(dev), 0);
            _exit(3);
        }
        CHECK_INT(waitpid(pid, &status, 0), pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
        CHECK(!exists("log"));
    }
    exit(0);
}

static void ends(const char *how, const char *want)
{
    char buf[256];
    int status = run_self("forget", how);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        FAIL_("%s: status %#x", how, status);
    int fd = open("log", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    ssize_t n = read(fd, buf, sizeof buf - 1);
    CHECK(n >= 0);
    buf[n] = 0;
    close(fd);
    /* Once or twice: a layer and a server flush, too. */
    const char *found = buf;
    while (strncmp(found, "flush flush ", 12) == 0)
        found += 6;
    if (strcmp(found, want) != 0)
        FAIL_("%s: expected %s, found %s", how, want, buf);
    CHECK_INT(unlink("log"), 0);
}

static void many(void)
{
    enum { N = 100 };
    static qblk *all[N];
    unsigned char byte;
    char rest[64];
    for (int i = 0; i < N; i++) {
        snprintf(rest, sizeof rest, "memory1.so?size=%dk&fill=%d", i + 1, i);
        ending(rest, NULL);
        name_[strlen(name_) - 1] = 0;
        OK(qblk_open(name_, QBLK_OPEN_RDWR, &all[i]));
    }
    for (int i = 0; i < N; i++) {
        CHECK_INT(device_size(all[i]), (i + 1) * 1024);
        OK(qblk_pread(all[i], &byte, 1, (uint64_t)i * 1024));
        CHECK_INT(byte, i);
        OK(qblk_pwrite(all[i], "w", 1, 0));
    }
    for (int i = 0; i < N; i++)
        OK(qblk_close(all[i]));
}

int main(int argc, char **argv)
{
    if (argc == 3)
        return forget(argv[2]);
    test_begin(argv);
    ends("closed", "flush close gone");
    ends("left", "flush close gone");
    ends("later", "flush close gone");
    ends("layered", "flush close gone");
    ends("pushed", "flush close gone");
    ends("served", "flush close gone");
    ends("forked", "flush close gone");
    many();
    return 0;
}
