/*
 * The smallest lock manager that is of use: flock() on a file for each image, in a directory that the
 * setting "dir" names. docs/lockmgr.md walks through it. Two functions are all that it takes.
 *
 *   cc -shared -fPIC -o lockmgr-file.so lockmgr-file.c
 *   qblk read -o lock-manager=./lockmgr-file.so -o lock-manager.dir=/run/lock disk.qcow2 0 512
 */
#include <qblk-lockmgr.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

/* What a lease is, is the manager's business: here, descriptors with a lock on each. */
struct lease {
    size_t count;
    int fds[];
};

int qblk_lockmgr_release(void *opaque)
{
    struct lease *lease = opaque;
    while (lease->count > 0) {
        lease->count--;
        /* Not by closing alone: a child of fork may have the descriptor too. */
        flock(lease->fds[lease->count], LOCK_UN);
        close(lease->fds[lease->count]);
    }
    free(lease);
    return 0;
}

int qblk_lockmgr_acquire(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                         size_t count, const char *const *options, void **out)
{
    const char *dir = NULL;
    char path[8192];
    int rc = 0;
    (void)owner;

    for (; *options; options++) {
        if (strncmp(*options, "dir=", 4) != 0)
            return -EINVAL; /* never ignore what you do not know */
        dir = *options + 4;
    }
    if (!dir)
        return -EINVAL;

    struct lease *lease = malloc(sizeof *lease + count * sizeof lease->fds[0]);
    if (!lease)
        return -ENOMEM;
    lease->count = 0;

    for (size_t i = 0; i < count && rc == 0; i++) {
        if (resources[i].flags & QBLK_LOCKMGR_SHARED)
            continue; /* reads whatever others do */
        /* One name for one image: its path, with the slashes made harmless. */
        int n = snprintf(path, sizeof path, "%s/%s", dir, resources[i].path);
        if (n < 0 || (size_t)n >= sizeof path) {
            rc = -ENAMETOOLONG;
            break;
        }
        for (char *p = path + strlen(dir) + 1; *p; p++)
            if (*p == '/')
                *p = '\\';
        int fd = open(path, O_RDONLY | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0) {
            rc = -errno;
            break;
        }
        /* Many may read, one may write. LOCK_NB: the library asks again as long as it is to wait. */
        int how = resources[i].flags & QBLK_LOCKMGR_READ_ONLY ? LOCK_SH : LOCK_EX;
        if (flock(fd, how | LOCK_NB) != 0) {
            rc = errno == EWOULDBLOCK ? -EBUSY : -errno;
            close(fd);
        } else {
            lease->fds[lease->count++] = fd;
        }
    }
    /* All of them or none. */
    if (rc != 0)
        qblk_lockmgr_release(lease);
    else
        *out = lease;
    return rc;
}
