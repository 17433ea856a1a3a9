/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A lock manager for libqblk: leases in a directory that several hosts share (NFS, a cluster file
 * system; or a local one, for one host). See docs/lockmgr.md.
 *
 * A holder renews its lease every `interval`: it counts a number up in the lease file. Whoever wants
 * the image and sees the same number for `expire` (four intervals), by its own clock that no
 * administrator can turn, may take it over; the holder itself counts on its lease for three intervals
 * only, from before it wrote the number. So clocks of hosts are never compared. Each owner has a token
 * and a generation; one that does not find its token any more has lost the lease.
 *
 * That stops a holder which runs. One that is stopped in the middle of a write, after it has looked and
 * before the system has the data, would write when it goes on. So it also keeps an fcntl lock while its
 * process is there, and as long as that is held nobody takes over (takeover=dead, the default). With
 * takeover=expired the time alone decides. A holder on this host whose lock is gone is dead, and
 * is not waited for.
 */
#include "lease.h"
#include "../include/qblk-lockmgr.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* A resource that is held. */
struct held {
    struct file file;
    struct slot slot;
    int index;
};

struct lease {
    struct setup setup;
    struct slot self; /* what is the same in all of its slots */
    struct held *held;
    size_t count;
};

struct words {
    char *text;
    size_t size;
};

static void say(struct words *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(struct words *w, const char *format, ...)
{
    if (w->text != NULL && w->size > 0) {
        va_list args;
        va_start(args, format);
        vsnprintf(w->text, w->size, format, args);
        va_end(args);
    }
}

static const char *value(const char *option, const char *key)
{
    size_t n = strlen(key);
    return strncmp(option, key, n) == 0 && option[n] == '=' ? option + n + 1 : NULL;
}

static void one_word(char *to, size_t size, const char *from)
{
    size_t n = 0;
    for (; *from != '\0' && n + 1 < size; from++)
        to[n++] = (unsigned char)*from <= ' ' ? '_' : *from;
    if (n == 0)
        to[n++] = '?';
    to[n] = '\0';
}

static int configure(struct setup *s, const char *const *options, struct words *w)
{
    char text[64] = "";
    unsigned long interval = 2000;
    memset(s, 0, sizeof *s);
    for (; options != NULL && *options != NULL; options++) {
        const char *v;
        char *end = NULL;
        if ((v = value(*options, "dir")) != NULL)
            snprintf(s->dir, sizeof s->dir, "%s", v);
        else if ((v = value(*options, "root")) != NULL)
            snprintf(s->root, sizeof s->root, "%s", v);
        else if ((v = value(*options, "interval")) != NULL) {
            interval = strtoul(v, &end, 10);
            if (*v == '\0' || *end != '\0' || interval < 1 || interval > 600000) {
                say(w, "interval: expected milliseconds, 1 to 600000");
                return -EINVAL;
            }
        } else if ((v = value(*options, "takeover")) != NULL && strcmp(v, "expired") == 0)
            s->takeover_expired = 1;
        else if (v != NULL && strcmp(v, "dead") == 0)
            s->takeover_expired = 0;
        else {
            say(w, "unknown setting %s; there are dir, root, interval, takeover=dead|expired", *options);
            return -EINVAL;
        }
    }
    if (s->dir[0] == '\0') {
        say(w, "the setting dir, a directory that all hosts share, is missing");
        return -EINVAL;
    }
    s->interval = (uint32_t)interval;
    s->expire = 4 * s->interval;
    gethostname(text, sizeof text - 1);
    one_word(s->host, sizeof s->host, text);
    memset(text, 0, sizeof text);
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, 36);
    if (fd >= 0)
        close(fd);
    one_word(s->boot, sizeof s->boot, n == 36 ? text : "?");
    return 0;
}

/* Whether somebody's lease may be ended now. */
static int is_dead(const struct setup *s, const struct file *f, int i, const struct slot *slot, struct seen *seen)
{
    uint64_t now = now_ms();
    int alive = alive_is(f, i);
    if (seen->token != slot->token || seen->beat != slot->beat) {
        seen->token = slot->token, seen->beat = slot->beat, seen->since = now;
    }
    if (!alive && strcmp(slot->boot, s->boot) == 0 && s->boot[0] != '?')
        return 1;
    return (!alive || s->takeover_expired) && now - seen->since >= slot->expire;
}

static int clash(char a, char b)
{
    return a != '-' && b != '-' && (a == 'W' || b == 'W');
}

/*
 * With the file locked: end what is dead and in the way of `mode`, and answer -EBUSY with who is left, or
 * a free slot.
 */
static int look(const struct setup *s, const struct held *h, char mode, struct slot *slots, struct seen *seen,
                uint64_t *generation, struct words *w)
{
    int free_slot = -EMFILE;
    int rc = file_read(&h->file, generation, slots);
    if (rc != 0) {
        say(w, "the lease file %s/%s is damaged", s->dir, h->file.name);
        return rc;
    }
    for (int i = SLOTS - 1; i >= 0; i--) {
        struct slot *slot = &slots[i];
        if (i == h->index)
            continue;
        if (clash(mode, slot->mode)) {
            if (!is_dead(s, &h->file, i, slot, &seen[i])) {
                say(w, "%s has it for %s (process %u on host %s, generation %" PRIu64
                       "); if it is dead, it is taken over after %.1f s",
                    slot->owner, slot->mode == 'W' ? "writing" : "reading", slot->pid, slot->host,
                    slot->generation, slot->expire / 1000.0);
                return -EBUSY;
            }
            slot->mode = '-';
            if ((rc = file_write_slot(&h->file, i, slot)) != 0)
                return rc;
        }
        /* Of one that was taken over while its process is stopped, the lock may still be there. */
        if (slot->mode == '-' && !alive_is(&h->file, i))
            free_slot = i;
    }
    return free_slot;
}

/* Write what we are into our slot. */
static int enter(struct held *h, uint64_t generation)
{
    int rc = alive_take(&h->file, h->index);
    h->slot.generation = generation + 1;
    if (rc == 0)
        rc = file_write_generation(&h->file, generation + 1);
    if (rc == 0)
        rc = file_write_slot(&h->file, h->index, &h->slot);
    if (rc == 0 && fdatasync(h->file.fd) != 0)
        rc = -errno;
    return rc;
}

static int take(const struct setup *s, struct held *h, uint64_t deadline, struct words *w)
{
    struct slot *slots = calloc(SLOTS, sizeof *slots);
    struct seen *seen = calloc(SLOTS, sizeof *seen);
    uint64_t generation = 0;
    int rc = slots == NULL || seen == NULL ? -ENOMEM : file_open(s, &h->file, deadline);
    int open = rc == 0;
    while (rc == 0) {
        rc = file_lock(&h->file, deadline + s->interval);
        if (rc != 0)
            break;
        if (!file_is_there(s, &h->file)) {
            /* Deleted between opening and locking. */
            close(h->file.fd);
            open = (rc = file_open(s, &h->file, deadline)) == 0;
            continue;
        }
        h->index = -1;
        rc = look(s, h, h->slot.mode, slots, seen, &generation, w);
        if (rc >= 0) {
            h->index = rc;
            rc = enter(h, generation);
            if (rc != 0) {
                slots[h->index].mode = '-';
                file_write_slot(&h->file, h->index, &slots[h->index]);
                alive_drop(&h->file, h->index);
            }
            file_unlock(&h->file);
            break;
        }
        file_unlock(&h->file);
        uint64_t now = now_ms();
        if (rc == -EBUSY && now < deadline) {
            uint64_t pause = s->interval / 4 + 1;
            sleep_ms(pause < deadline - now ? pause : deadline - now);
            rc = 0;
        }
    }
    if (rc != 0 && open)
        close(h->file.fd);
    free(slots);
    free(seen);
    return rc;
}

static void give(struct held *h, const struct setup *s)
{
    struct slot *slots = calloc(SLOTS, sizeof *slots);
    uint64_t generation;
    if (slots != NULL && file_lock(&h->file, now_ms() + s->interval) == 0) {
        if (file_is_there(s, &h->file) && file_read(&h->file, &generation, slots) == 0 &&
            slots[h->index].mode != '-' && slots[h->index].token == h->slot.token) {
            slots[h->index].mode = '-';
            file_write_slot(&h->file, h->index, &slots[h->index]);
        }
        file_unlock(&h->file);
    }
    /* By hand: a child of fork may have the descriptor too. */
    alive_drop(&h->file, h->index);
    close(h->file.fd);
    free(slots);
}

static int prepare(const struct lease *l, const qblk_lockmgr_resource *r, struct held *h)
{
    memset(h, 0, sizeof *h);
    h->slot = l->self;
    h->slot.mode = r->flags & QBLK_LOCKMGR_READ_ONLY ? 'R' : 'W';
    h->index = -1;
    return lease_name(&l->setup, r->path, r->uuid, h->file.name);
}

EXPORT int qblk_lockmgr_release(void *lease)
{
    struct lease *l = lease;
    for (size_t i = l->count; i-- > 0;)
        give(&l->held[i], &l->setup);
    free(l->held);
    free(l);
    return 0;
}

static int append(struct lease *l, const struct held *h)
{
    struct held *all = realloc(l->held, (l->count + 1) * sizeof *all);
    if (all == NULL)
        return -ENOMEM;
    l->held = all;
    l->held[l->count++] = *h;
    return 0;
}

EXPORT int qblk_lockmgr_acquire2(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                                 size_t count, const char *const *options, uint32_t timeout_ms, char *text,
                                 size_t size, void **lease)
{
    struct words w = { text, size };
    struct lease *l = calloc(1, sizeof *l);
    uint64_t deadline = now_ms() + timeout_ms;
    if (l == NULL)
        return -ENOMEM;
    int rc = configure(&l->setup, options, &w);
    if (rc == 0 && getrandom(&l->self.token, sizeof l->self.token, 0) != sizeof l->self.token)
        rc = -EIO;
    l->self.expire = l->setup.expire;
    l->self.pid = (uint32_t)owner->pid;
    snprintf(l->self.host, sizeof l->self.host, "%s", l->setup.host);
    snprintf(l->self.boot, sizeof l->self.boot, "%s", l->setup.boot);
    one_word(l->self.owner, sizeof l->self.owner, owner->name);
    for (size_t i = 0; rc == 0 && i < count; i++) {
        struct held h;
        if (resources[i].flags & QBLK_LOCKMGR_SHARED)
            continue;
        rc = prepare(l, &resources[i], &h);
        if (rc == 0)
            rc = take(&l->setup, &h, deadline, &w);
        if (rc == 0 && (rc = append(l, &h)) != 0)
            give(&h, &l->setup);
    }
    if (rc != 0)
        qblk_lockmgr_release(l);
    else
        *lease = l;
    return rc;
}

EXPORT int qblk_lockmgr_acquire(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                                size_t count, const char *const *options, void **lease)
{
    return qblk_lockmgr_acquire2(owner, resources, count, options, 0, NULL, 0, lease);
}

EXPORT int qblk_lockmgr_renew(void *lease, uint32_t *next_ms, uint32_t *valid_ms)
{
    struct lease *l = lease;
    struct slot *slots = calloc(SLOTS, sizeof *slots);
    int rc = slots == NULL ? -ENOMEM : 0;
    for (size_t i = 0; rc == 0 && i < l->count; i++) {
        struct held *h = &l->held[i];
        uint64_t generation;
        rc = file_lock(&h->file, now_ms() + l->setup.interval);
        if (rc != 0)
            break;
        if (!file_is_there(&l->setup, &h->file))
            rc = -ESTALE;
        if (rc == 0)
            rc = file_read(&h->file, &generation, slots);
        /* Another's, or asked for by who is to take it over. */
        if (rc == 0 && (slots[h->index].mode == '-' || slots[h->index].token != h->slot.token ||
                        slots[h->index].wanted != 0))
            rc = -ESTALE;
        if (rc == 0) {
            h->slot.beat++;
            rc = file_write_slot(&h->file, h->index, &h->slot);
        }
        file_unlock(&h->file);
    }
    free(slots);
    *next_ms = l->setup.interval;
    *valid_ms = l->setup.expire - l->setup.interval;
    return rc;
}

static struct held *find(struct lease *l, const char *name)
{
    for (size_t i = 0; i < l->count; i++)
        if (strcmp(l->held[i].file.name, name) == 0)
            return &l->held[i];
    return NULL;
}

/* What is held, for another purpose. */
static int change(struct lease *l, struct held *h, char mode)
{
    struct slot *slots = calloc(SLOTS, sizeof *slots), old = h->slot;
    struct seen *seen = calloc(SLOTS, sizeof *seen);
    struct words none = { NULL, 0 };
    uint64_t generation = 0;
    int rc = slots == NULL || seen == NULL ? -ENOMEM : file_lock(&h->file, now_ms() + l->setup.interval);
    if (rc == 0) {
        rc = file_is_there(&l->setup, &h->file) ? 0 : -ESTALE;
        if (rc == 0)
            rc = look(&l->setup, h, mode, slots, seen, &generation, &none);
        if (rc >= 0 || rc == -EMFILE) {
            rc = slots[h->index].mode != '-' && slots[h->index].token == h->slot.token ? 0 : -ESTALE;
            h->slot.mode = mode;
            if (rc == 0)
                rc = enter(h, generation);
            if (rc != 0)
                h->slot = old;
        }
        file_unlock(&h->file);
    }
    free(slots);
    free(seen);
    return rc;
}

EXPORT int qblk_lockmgr_add(void *lease, const qblk_lockmgr_resource *resource)
{
    struct lease *l = lease;
    struct words none = { NULL, 0 };
    struct held h, *old;
    int rc = prepare(l, resource, &h);
    if (rc != 0 || resource->flags & QBLK_LOCKMGR_SHARED)
        return rc;
    if ((old = find(l, h.file.name)) != NULL)
        return change(l, old, h.slot.mode);
    rc = take(&l->setup, &h, now_ms(), &none);
    if (rc == 0 && (rc = append(l, &h)) != 0)
        give(&h, &l->setup);
    return rc;
}

EXPORT int qblk_lockmgr_remove(void *lease, const qblk_lockmgr_resource *resource)
{
    struct lease *l = lease;
    struct held h, *old;
    int rc = prepare(l, resource, &h);
    if (rc != 0 || (old = find(l, h.file.name)) == NULL)
        return rc;
    give(old, &l->setup);
    *old = l->held[--l->count];
    return 0;
}

EXPORT int qblk_lockmgr_inquire(void *lease, char *buf, size_t size)
{
    struct lease *l = lease;
    int n = snprintf(buf, size, "%016" PRIx64, l->self.token);
    return n > 0 && (size_t)n < size ? 0 : -ENOSPC;
}

/* Ask the holder with this token to let go. */
static int ask(const struct setup *s, const struct held *h, uint64_t token)
{
    struct file f = h->file;
    struct slot *slots = calloc(SLOTS, sizeof *slots);
    uint64_t generation;
    int rc = slots == NULL ? -ENOMEM : file_open(s, &f, now_ms());
    if (rc == 0) {
        rc = file_lock(&f, now_ms() + s->expire);
        if (rc == 0) {
            rc = file_read(&f, &generation, slots);
            for (int i = 0; rc == 0 && i < SLOTS; i++)
                if (slots[i].mode != '-' && slots[i].token == token) {
                    slots[i].wanted = h->slot.token;
                    rc = file_write_slot(&f, i, &slots[i]);
                }
            file_unlock(&f);
        }
        close(f.fd);
    }
    free(slots);
    return rc;
}

EXPORT int qblk_lockmgr_adopt(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                              size_t count, const char *const *options, const char *state,
                              uint32_t timeout_ms, char *text, size_t size, void **lease)
{
    struct words w = { text, size };
    struct lease asking;
    struct held h;
    uint64_t token;
    char more;
    memset(&asking, 0, sizeof asking);
    int rc = configure(&asking.setup, options, &w);
    if (rc != 0)
        return rc;
    if (sscanf(state, "%" SCNx64 "%c", &token, &more) != 1 || token == 0) {
        say(&w, "what is to be adopted is no lease of this manager");
        return -EINVAL;
    }
    asking.self.token = token ^ 1;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        if (resources[i].flags & QBLK_LOCKMGR_SHARED)
            continue;
        rc = prepare(&asking, &resources[i], &h);
        if (rc == 0)
            rc = ask(&asking.setup, &h, token);
    }
    if (rc != 0)
        return rc;
    /* The holder sees it at its next heartbeat, stops writing, and lets go. */
    if (timeout_ms < 2 * asking.setup.expire)
        timeout_ms = 2 * asking.setup.expire;
    return qblk_lockmgr_acquire2(owner, resources, count, options, timeout_ms, text, size, lease);
}
