/* Children of fork and exec inherit no descriptor of the library. */
#include "test.h"
#include <dirent.h>

/* Descriptors that this process has; fails for one that is new and would be inherited. */
static int descriptors(int check, const char *was_there)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    CHECK(d != NULL);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        int fd = atoi(e->d_name);
        if (e->d_name[0] == '.' || fd == dirfd(d) || fd >= 1024)
            continue;
        n++;
        if (check && !was_there[fd] && !(fcntl(fd, F_GETFD) & FD_CLOEXEC))
            FAIL_("descriptor %d would be inherited", fd);
    }
    closedir(d);
    return n;
}

int main(int argc, char **argv)
{
    static char was_there[1024];
    qblk *dev[8];
    int n = 0;
    if (argc == 3) {
        /* The child: has nothing that is not a standard stream or was there before. */
        CHECK_INT(descriptors(0, NULL), atoi(argv[2]));
        return 0;
    }
    test_begin(argv);
    for (int fd = 0; fd < 1024; fd++)
        was_there[fd] = fcntl(fd, F_GETFD) != -1;
    char inherited[16];
    int keep = 0;
    for (int fd = 0; fd < 1024; fd++)
        keep += was_there[fd] && !(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    snprintf(inherited, sizeof inherited, "%d", keep);

    dev[n++] = new_device("raw", 1 << 20);
    dev[n++] = new_device("qcow2", 1 << 20);
    dev[n++] = new_device("mem", 1 << 20);
    OK(create_opt("over", "qcow2", 1 << 20, options("backing-file", "raw", "backing-fmt", "raw", NULL)));
    /* Of one file, in all sorts of ways at a time: without locks, which would be against it. */
    OK(qblk_open("over", QBLK_OPEN_RDWR | QBLK_OPEN_NO_LOCK, &dev[n++]));
    OK(qblk_open("raw", QBLK_OPEN_RDWR | QBLK_OPEN_DIRECT | QBLK_OPEN_NO_LOCK, &dev[n++]));
    OK(open_opt("raw", QBLK_OPEN_NO_LOCK, &dev[n++], options("io", "mmap", NULL)));
    int fd = open("raw", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    OK(qblk_open_fd(fd, NULL, QBLK_OPEN_NO_LOCK, &dev[n++]));
    OK(qblk_context_open(dev[0], NULL, 0, &dev[n++]));
    for (int i = 0; i < n; i++) {
        char buf[4096];
        OK(qblk_pread(dev[i], buf, sizeof buf, 1));
    }
    OK(qblk_pwrite(dev[3], "x", 1, 5));
    CHECK(descriptors(1, was_there) > keep);
    CHECK_INT(run_self("count", inherited), 0);
    for (int i = 0; i < n; i++)
        OK(qblk_close(dev[i]));
    close(fd);
    return 0;
}
