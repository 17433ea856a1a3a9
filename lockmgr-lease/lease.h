/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The parts of the lease manager: lease.c has the contract's functions, record.c the files. */
#ifndef LEASE_H
#define LEASE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <limits.h>
#include <stdint.h>
#include <sys/types.h>

#define SLOTS 64     /* who may have one image at a time */
#define RECORD 256   /* bytes of a record: a line of text */
#define NAME_LEN 240 /* of a lease file */

/* How a site has set the manager up. */
struct setup {
    char dir[PATH_MAX];
    char root[PATH_MAX];  /* what paths are named from, or "" */
    uint32_t interval;    /* between two heartbeats, ms */
    uint32_t expire;      /* so long without one, and a lease may be taken over, ms */
    int takeover_expired; /* even if its holder's process is still there */
    char host[64], boot[40];
};

/* One line of a lease file: who has it. */
struct slot {
    char mode;                            /* 'W', 'R', or '-' for nobody */
    uint64_t token, generation, beat;     /* whose; since when; how often it was renewed */
    uint64_t wanted;                      /* somebody who is to take it over asks for it */
    uint32_t expire, pid;
    char host[64], boot[40], owner[48];
};

/* An open lease file. */
struct file {
    char name[NAME_LEN + 16];
    int fd;
    ino_t ino;
};

/* What is known of another holder's life. */
struct seen {
    uint64_t token, beat, since;
};

uint64_t now_ms(void);           /* since the system was started, time asleep included */
void sleep_ms(uint64_t ms);
int lease_name(const struct setup *s, const char *path, const uint8_t uuid[16], char *name);

int file_open(const struct setup *s, struct file *f, uint64_t deadline); /* made if it is not there */
int file_is_there(const struct setup *s, const struct file *f);          /* still the same */
int file_lock(const struct file *f, uint64_t deadline);                  /* to change it */
void file_unlock(const struct file *f);
int file_read(const struct file *f, uint64_t *generation, struct slot slots[SLOTS]);
int file_write_generation(const struct file *f, uint64_t generation);
int file_write_slot(const struct file *f, int i, const struct slot *slot);

/* A lock that a holder keeps on its slot as long as its process lives, stopped or not. */
int alive_take(const struct file *f, int i);
void alive_drop(const struct file *f, int i);
int alive_is(const struct file *f, int i); /* somebody else has it */

#endif
