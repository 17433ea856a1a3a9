/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Lease files: one for each image, in a directory that all hosts see. A file is lines of text of
 * RECORD bytes: first the generation, which grows with every owner, then SLOTS holders. It is changed
 * in place under an fcntl lock on a byte far behind its end, so that a renewal needs no room on the
 * disk, and every line carries a checksum, so that one that is torn is known.
 *
 * A file that is not there is either new or was deleted under its holder. ".names" lists those that
 * have been there: what it lists, or a directory without it, is waited out for as long as a lease
 * may still be good (its holder stops by itself when it sees that the file is gone).
 */
#include "lease.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define UPDATE ((off_t)1 << 32)
#define ALIVE (UPDATE + 1)

uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void sleep_ms(uint64_t ms)
{
    struct timespec t = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000 };
    while (nanosleep(&t, &t) != 0 && errno == EINTR)
        ;
}

static uint64_t fnv(const char *bytes, size_t n, uint64_t h)
{
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)bytes[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* The path as a name: readable where it is short enough, never the same for two. */
int lease_name(const struct setup *s, const char *path, const uint8_t uuid[16], char *name)
{
    static const uint8_t none[16];
    size_t root = strlen(s->root), n = 0;
    if (memcmp(uuid, none, 16) != 0) {
        for (int i = 0; i < 16; i++)
            n += (size_t)sprintf(name + n, "%02x", uuid[i]);
        strcpy(name + n, ".uuid.lease");
        return 0;
    }
    if (root > 0 && strncmp(path, s->root, root) == 0 && path[root] == '/')
        path += root;
    for (const char *p = path; *p != '\0'; p++) {
        if (n > NAME_LEN - 60) {
            uint64_t a = fnv(path, strlen(path), UINT64_C(0xcbf29ce484222325));
            uint64_t b = fnv(path, strlen(path), UINT64_C(0x9e3779b97f4a7c15));
            n += (size_t)sprintf(name + n, "%%%016" PRIx64 "%016" PRIx64, a, b);
            break;
        }
        if (*p == '/' || *p == '%' || (unsigned char)*p <= ' ')
            n += (size_t)sprintf(name + n, "%%%02X", (unsigned char)*p);
        else
            name[n++] = *p;
    }
    strcpy(name + n, ".lease");
    return 0;
}

static int set_lock(int fd, short type, off_t at)
{
    struct flock l;
    memset(&l, 0, sizeof l);
    l.l_type = type, l.l_whence = SEEK_SET, l.l_start = at, l.l_len = 1;
    return fcntl(fd, F_OFD_SETLK, &l) == 0 ? 0 : -errno;
}

/* Never by waiting in the kernel: whoever has it may be stopped. */
static int lock_until(int fd, off_t at, uint64_t deadline)
{
    for (;;) {
        int rc = set_lock(fd, F_WRLCK, at);
        if (rc != -EAGAIN && rc != -EACCES)
            return rc;
        if (now_ms() >= deadline)
            return -EAGAIN;
        sleep_ms(1);
    }
}

int file_lock(const struct file *f, uint64_t deadline)
{
    return lock_until(f->fd, UPDATE, deadline);
}

void file_unlock(const struct file *f)
{
    set_lock(f->fd, F_UNLCK, UPDATE);
}

int alive_take(const struct file *f, int i)
{
    return set_lock(f->fd, F_WRLCK, ALIVE + i);
}

void alive_drop(const struct file *f, int i)
{
    set_lock(f->fd, F_UNLCK, ALIVE + i);
}

int alive_is(const struct file *f, int i)
{
    struct flock l;
    memset(&l, 0, sizeof l);
    l.l_type = F_WRLCK, l.l_whence = SEEK_SET, l.l_start = ALIVE + i, l.l_len = 1;
    /* What cannot be found out is taken for alive. */
    return fcntl(f->fd, F_OFD_GETLK, &l) != 0 || l.l_type != F_UNLCK;
}

/* --- lines ---------------------------------------------------------------------------------- */

static int put(int fd, off_t at, const char *text)
{
    char line[RECORD + 1];
    int n = snprintf(line, sizeof line, "%s", text);
    if (n < 0 || n > RECORD - 22)
        return -ENAMETOOLONG;
    memset(line + n, ' ', (size_t)(RECORD - n));
    uint64_t sum = fnv(line, RECORD - 22, UINT64_C(0xcbf29ce484222325));
    snprintf(line + RECORD - 22, 23, " sum=%016" PRIx64, sum);
    line[RECORD - 1] = '\n';
    ssize_t done = pwrite(fd, line, RECORD, at);
    return done == RECORD ? 0 : done < 0 ? -errno : -ENOSPC;
}

static int sound(const char *line)
{
    char sum[24];
    snprintf(sum, sizeof sum, " sum=%016" PRIx64, fnv(line, RECORD - 22, UINT64_C(0xcbf29ce484222325)));
    return memcmp(line + RECORD - 22, sum, 21) == 0;
}

int file_write_generation(const struct file *f, uint64_t generation)
{
    char text[RECORD];
    snprintf(text, sizeof text, "qblk-lease 1 generation=%" PRIu64, generation);
    return put(f->fd, 0, text);
}

int file_write_slot(const struct file *f, int i, const struct slot *s)
{
    char text[RECORD];
    if (s->mode == '-')
        snprintf(text, sizeof text, "-");
    else
        snprintf(text, sizeof text,
                 "%c %016" PRIx64 " %" PRIu64 " %" PRIu64 " %016" PRIx64 " %u %u %s %s %s", s->mode, s->token,
                 s->generation, s->beat, s->wanted, s->expire, s->pid, s->host, s->boot, s->owner);
    return put(f->fd, (off_t)(i + 1) * RECORD, text);
}

int file_read(const struct file *f, uint64_t *generation, struct slot slots[SLOTS])
{
    static const size_t size = (size_t)(SLOTS + 1) * RECORD;
    char *all = malloc(size);
    if (all == NULL)
        return -ENOMEM;
    ssize_t n = pread(f->fd, all, size, 0);
    int rc = n < 0 ? -errno : (size_t)n == size ? 0 : -EILSEQ;
    if (rc == 0 && (!sound(all) || sscanf(all, "qblk-lease 1 generation=%" SCNu64, generation) != 1))
        rc = -EILSEQ;
    for (int i = 0; rc == 0 && i < SLOTS; i++) {
        const char *line = all + (size_t)(i + 1) * RECORD;
        struct slot *s = &slots[i];
        memset(s, 0, sizeof *s);
        s->mode = line[0];
        if (!sound(line))
            rc = -EILSEQ;
        else if (s->mode != '-' &&
                 sscanf(line, "%c %" SCNx64 " %" SCNu64 " %" SCNu64 " %" SCNx64 " %u %u %63s %39s %47s", &s->mode,
                        &s->token, &s->generation, &s->beat, &s->wanted, &s->expire, &s->pid, s->host, s->boot,
                        s->owner) != 10)
            rc = -EILSEQ;
    }
    free(all);
    return rc;
}

/* --- files ---------------------------------------------------------------------------------- */

static int path_of(const struct setup *s, const char *name, char *path, size_t size)
{
    int n = snprintf(path, size, "%s/%s", s->dir, name);
    return n > 0 && (size_t)n < size ? 0 : -ENAMETOOLONG;
}

int file_is_there(const struct setup *s, const struct file *f)
{
    char path[PATH_MAX + NAME_LEN];
    struct stat st;
    return path_of(s, f->name, path, sizeof path) == 0 && stat(path, &st) == 0 && st.st_ino == f->ino;
}

/* Make a file with nobody in it, whole or not at all. -EEXIST if somebody else was faster. */
static int make(const struct setup *s, const char *name)
{
    char path[PATH_MAX + NAME_LEN], temp[PATH_MAX + NAME_LEN];
    uint64_t random = 0;
    struct slot nobody = { .mode = '-' };
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return -EIO;
    if (path_of(s, name, path, sizeof path) != 0 ||
        snprintf(temp, sizeof temp, "%s/.new-%016" PRIx64, s->dir, random) >= (int)sizeof temp)
        return -ENAMETOOLONG;
    struct file f = { .fd = open(temp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666) };
    if (f.fd < 0)
        return -errno;
    int rc = file_write_generation(&f, 0);
    for (int i = 0; rc == 0 && i < SLOTS; i++)
        rc = file_write_slot(&f, i, &nobody);
    /* On a network file system only this tells that the disk is full. */
    if (rc == 0 && fsync(f.fd) != 0)
        rc = -errno;
    if (rc == 0 && link(temp, path) != 0)
        rc = -errno;
    close(f.fd);
    unlink(temp);
    return rc;
}

/* Whether `line` is in the list of names, which is locked. */
static int listed(int fd, const char *line)
{
    char *all = NULL;
    size_t size = 0, len = strlen(line);
    int found = 0;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    FILE *in = copy < 0 ? NULL : fdopen(copy, "r");
    if (in == NULL)
        return -ENOMEM;
    rewind(in);
    ssize_t n;
    while (!found && (n = getline(&all, &size, in)) > 0)
        found = (size_t)n == len + 1 && memcmp(all, line, len) == 0;
    free(all);
    fclose(in);
    return found;
}

static int append(int fd, const char *line)
{
    char text[NAME_LEN + 20];
    int n = snprintf(text, sizeof text, "%s\n", line);
    off_t end = lseek(fd, 0, SEEK_END);
    if (end < 0 || pwrite(fd, text, (size_t)n, end) != n || fdatasync(fd) != 0) {
        int rc = errno != 0 ? -errno : -ENOSPC;
        /* Half a line would hide the next. */
        if (end >= 0 && ftruncate(fd, end) != 0)
            rc = -EIO;
        return rc;
    }
    return 0;
}

/* Make a lease file, after the time in which somebody may still count on one that was deleted. */
static int create(const struct setup *s, const char *name, uint64_t deadline)
{
    char path[PATH_MAX + NAME_LEN];
    int rc = path_of(s, ".names", path, sizeof path);
    if (rc != 0)
        return rc;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return -errno;
    rc = lock_until(fd, UPDATE, deadline + s->expire);
    int ready = rc == 0 ? listed(fd, "ready") : rc, known = rc == 0 ? listed(fd, name) : rc;
    if (rc == 0 && ready >= 0 && known >= 0 && (!ready || known)) {
        set_lock(fd, F_UNLCK, UPDATE);
        sleep_ms(s->expire);
        rc = lock_until(fd, UPDATE, now_ms() + s->expire);
        if (rc == 0 && (ready = listed(fd, "ready")) == 0)
            rc = append(fd, "ready");
        known = listed(fd, name);
    }
    if (rc == 0 && (ready < 0 || known < 0))
        rc = ready < 0 ? ready : known;
    if (rc == 0 && !known)
        rc = append(fd, name);
    if (rc == 0)
        rc = make(s, name);
    close(fd);
    return rc == -EEXIST ? 0 : rc;
}

int file_open(const struct setup *s, struct file *f, uint64_t deadline)
{
    char path[PATH_MAX + NAME_LEN];
    struct stat st;
    int rc = path_of(s, f->name, path, sizeof path);
    while (rc == 0) {
        f->fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (f->fd >= 0) {
            if (fstat(f->fd, &st) == 0) {
                f->ino = st.st_ino;
                return 0;
            }
            rc = -errno;
            close(f->fd);
            return rc;
        }
        rc = errno == ENOENT ? create(s, f->name, deadline) : -errno;
    }
    return rc;
}
