/* Opening by descriptor: the library works on a duplicate, and the caller's stays the caller's. */
#include "test.h"

static void use(const char *kind)
{
    char buf[4];
    qblk *dev;
    qblk_options *o = options("format", kind, NULL);
    OK(qblk_create(kind, kind, 1 << 20, NULL));
    int fd = open(kind, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    OK(qblk_open_fd(fd, o, QBLK_OPEN_RDWR, &dev));
    OK(qblk_pwrite(dev, "data", 4, 5000));
    /* Closing ours changes nothing; nor does closing the device change ours. */
    close(fd);
    OK(qblk_pread(dev, buf, 4, 5000));
    CHECK_MEM(buf, "data", 4);
    /* Opened anew by its own duplicate. */
    OK(qblk_reopen(dev, 0));
    FAILS(qblk_pwrite(dev, "none", 4, 5000), -EROFS, "read-only");
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pread(dev, buf, 4, 5000));
    CHECK_MEM(buf, "data", 4);
    OK(qblk_close(dev));

    fd = open(kind, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    OK(qblk_open_fd(fd, o, 0, &dev));
    OK(qblk_pread(dev, buf, 4, 5000));
    CHECK_MEM(buf, "data", 4);
    OK(qblk_close(dev));
    CHECK(fcntl(fd, F_GETFD) >= 0);
    CHECK_INT(lseek(fd, 0, SEEK_CUR), 0);
    /* What is not open for writing is not written to. */
    dev = NULL;
    int rc = qblk_open_fd(fd, o, QBLK_OPEN_RDWR, &dev);
    CHECK(rc == -EROFS || rc == -EACCES || rc == -EBADF);
    CHECK(qblk_get_error()[0] && dev == NULL);
    close(fd);
    qblk_options_free(o);
}

int main(int argc, char **argv)
{
    qblk *dev = (qblk *)(uintptr_t)8;
    int pipes[2];
    char c;
    (void)argc;
    test_begin(argv);
    use("raw");
    use("qcow2");
    FAILS(qblk_open_fd(-1, NULL, 0, &dev), -EBADF, "descriptor -1");
    CHECK(dev == NULL);
    FAILS(qblk_open_fd(1000000, NULL, 0, &dev), -EBADF, "descriptor 1000000");
    /* Neither a pipe nor a directory is a row of bytes. */
    CHECK_INT(pipe(pipes), 0);
    CHECK(qblk_open_fd(pipes[0], NULL, 0, &dev) < 0);
    CHECK(qblk_get_error()[0]);
    int dir = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FAILS(qblk_open_fd(dir, NULL, 0, &dev), -EISDIR, "");
    close(dir);

    /* A file that has lost its name. */
    int fd = open("gone", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && ftruncate(fd, 100) == 0 && unlink("gone") == 0);
    OK(qblk_open_fd(fd, NULL, QBLK_OPEN_RDWR, &dev));
    OK(qblk_pwrite(dev, "z", 1, 99));
    OK(qblk_close(dev));
    CHECK_INT(pread(fd, &c, 1, 99), 1);
    CHECK_INT(c, 'z');
    close(fd);
    /* An image behind a descriptor finds its backing file beside itself. */
    CHECK_INT(mkdir("sub", 0755), 0);
    OK(qblk_create("sub/base", "raw", 1000, NULL));
    OK(create_opt("sub/top", "qcow2", 1000, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    fd = open("sub/top", O_RDONLY | O_CLOEXEC);
    OK(qblk_open_fd(fd, NULL, 0, &dev));
    OK(qblk_close(dev));
    close(fd);
    return 0;
}
