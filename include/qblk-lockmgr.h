/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Lock managers for libqblk: what to write, for whoever writes one. docs/lockmgr.md walks through an
 * example (examples/lockmgr-file.c).
 *
 * A lock manager decides who may have an image open, where the locks of the file system cannot:
 * across hosts, or because a site has such a service already. It is a shared object with the functions
 * below, of which the library finds those that are there by dlsym(). There is no table of functions,
 * no version to agree on, and no call to begin or to end: the object's ELF constructor and destructor
 * are for that. Version 1 needs two functions,
 *
 *     qblk_lockmgr_acquire   qblk_lockmgr_release
 *
 * and makes use of these where they are:
 *
 *     qblk_lockmgr_acquire2  waits, and says why not
 *     qblk_lockmgr_renew     leases that end by themselves
 *     qblk_lockmgr_add       more resources, while those that are held stay held
 *     qblk_lockmgr_remove    fewer of them
 *     qblk_lockmgr_inquire   what another host needs to take a lease over
 *     qblk_lockmgr_adopt     to take it over
 *
 * In all functions:
 *
 *   result    0, or a negative errno. -EBUSY, -EAGAIN and -ETIMEDOUT say that somebody else has a
 *             resource (the program sees QBLK_ELOCKED); -ESTALE that the lease is lost; all others
 *             that the manager itself failed (the program sees that code).
 *   threads   the calls on one lease come one after the other, from a thread of the library's, in
 *             which all signals are blocked; calls on different leases may come at the same time.
 *   time      a call that does not return in time is given up (see docs/options.md,
 *             lock-manager-timeout). If it returns later all the same, its lease is released.
 *   fork      nothing is called in a child of fork.
 *   memory    arguments are valid during the call only. Structs have a fixed size for ever; what is
 *             reserved is zero, and later versions may give it a meaning.
 *
 * A manager must not call libqblk, raise signals, write to standard output, or end the process.
 */
#ifndef QBLK_LOCKMGR_H
#define QBLK_LOCKMGR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* qblk_lockmgr_resource.flags: it is only read. Any number of readers may have it, and no writer. */
#define QBLK_LOCKMGR_READ_ONLY 1u
/* qblk_lockmgr_resource.flags: it is read whatever others do; asks for nothing but to be known. */
#define QBLK_LOCKMGR_SHARED 2u

/* A file of a chain of images. 64 bytes for ever. */
typedef struct qblk_lockmgr_resource {
    const char *path;   /* absolute, symbolic links resolved; bytes, not necessarily UTF-8 */
    const char *format; /* "qcow2", "raw"; "" if it is not known */
    uint8_t uuid[16];   /* of the image, where its format has one; else zero */
    uint32_t flags;     /* QBLK_LOCKMGR_... */
    uint8_t reserved[44 - 2 * sizeof(void *)];
} qblk_lockmgr_resource;

/* Who wants to have them. 64 bytes for ever. */
typedef struct qblk_lockmgr_owner {
    uint64_t id; /* of the open device, random: no other has the same, here or elsewhere */
    const char *name; /* the option lock-owner; else the program's name */
    uint8_t uuid[16]; /* the option lock-owner-uuid (of the virtual machine, say); else zero */
    int32_t pid;      /* the process */
    uint8_t reserved[36 - sizeof(void *)];
} qblk_lockmgr_owner;

/*
 * Acquire `count` resources, all of them or none. They are sorted by path and each is there once, so
 * managers that take them one by one in this order cannot block each other in a circle.
 *
 * `options` are the program's settings for the manager, "KEY=VALUE" each, NULL behind the last. One
 * that is unknown should be refused with -EINVAL. `*lease` is the manager's, for the calls below; the
 * library looks at it only to see that it is not NULL.
 */
int qblk_lockmgr_acquire(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                         size_t count, const char *const *options, void **lease);

/*
 * The same, and wait for others for up to `timeout_ms`. On failure `text` (of `size` bytes with the NUL)
 * may be filled with what stands in the way and who, in words. Where a manager has both functions,
 * this one is called.
 */
int qblk_lockmgr_acquire2(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                          size_t count, const char *const *options, uint32_t timeout_ms, char *text,
                          size_t size, void **lease);

/*
 * Give all resources of a lease back and free it, whatever the answer. Also called for a lease that
 * was lost.
 */
int qblk_lockmgr_release(void *lease);

/*
 * Keep a lease. Called once when it was acquired, and again `*next_ms` after each call; the first
 * answer tells in how many milliseconds (0: never again, it lasts by itself).
 *
 * `*valid_ms` (at entry UINT32_MAX, which means: until told otherwise) is for how long from the
 * *beginning* of the call the lease is good, whatever happens. When that time has passed without another
 * answer (the call fails, hangs, or the process was stopped) writes fail with QBLK_ELOCKED; so a
 * manager may give the resource to somebody else from then on. A later call that succeeds lets writes
 * pass again: it must only do so if nobody else has had the resource meanwhile.
 *
 * -ESTALE: it is lost for good. The library stops writing, waits for the writes that are under way, and
 * then calls qblk_lockmgr_release.
 */
int qblk_lockmgr_renew(void *lease, uint32_t *next_ms, uint32_t *valid_ms);

/*
 * Hotplug: have one resource more (or the same one with other flags), while the others stay held. If it
 * fails the lease is as it was.
 */
int qblk_lockmgr_add(void *lease, const qblk_lockmgr_resource *resource);

/* Give one resource of several back. */
int qblk_lockmgr_remove(void *lease, const qblk_lockmgr_resource *resource);

/*
 * Put what qblk_lockmgr_adopt() needs into `buf`, as text with a NUL, at most `size` bytes. -ENOSPC if
 * that is too little. Programs see it as the property "lock-lease".
 */
int qblk_lockmgr_inquire(void *lease, char *buf, size_t size);

/*
 * Acquire resources that another host has, with the text that qblk_lockmgr_inquire() gave there (the
 * option lock-adopt): the end of a migration. The manager has to see to it that the other host's lease
 * is lost (its next qblk_lockmgr_renew answers -ESTALE) and that it has stopped writing before this
 * one succeeds.
 */
int qblk_lockmgr_adopt(const qblk_lockmgr_owner *owner, const qblk_lockmgr_resource *resources,
                       size_t count, const char *const *options, const char *state,
                       uint32_t timeout_ms, char *text, size_t size, void **lease);

#ifdef __cplusplus
}
#endif

#endif /* QBLK_LOCKMGR_H */
