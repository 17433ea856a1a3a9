/* Which functions of a plugin are called, with which flags and in which order: for each operation, each
 * ability and both versions, what is emulated and what fails in the middle included. What is expected was
 * written down by hand from qblk-plugin.h. RUN: plugin */
#include "test.h"

#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#define GIB (UINT64_C(1) << 30)

/* One disk of 8 GiB, of which nothing is kept, and what was called: letter, offset, length, flags (f: FUA,
 * m: MAY_TRIM, q: FAST_ZERO), and ! if it failed. Calls that continue one another are joined. */
static char log_[4096];
static char last_kind, last_flags[8];
static uint64_t last_offset, last_end;
static size_t last_at;
static int join, calls, fail_at, fail_with;

static int note(char kind, uint64_t offset, uint64_t count, uint32_t flags)
{
    char f[8];
    int failed = ++calls == fail_at;
    snprintf(f, sizeof f, "%s%s%s%s", flags & 1 ? "f" : "", flags & 2 ? "m" : "", flags & 4 ? "q" : "",
             failed ? "!" : "");
    if (join && kind == last_kind && offset == last_end && strcmp(f, last_flags) == 0) {
        log_[last_at] = 0;
        count += last_end - last_offset;
        offset = last_offset;
    }
    last_at = strlen(log_);
    if (kind == 'F')
        snprintf(log_ + last_at, sizeof log_ - last_at, "%sF%s", last_at ? " " : "", f);
    else
        snprintf(log_ + last_at, sizeof log_ - last_at, "%s%c%llu+%llu%s", last_at ? " " : "", kind,
                 (unsigned long long)offset, (unsigned long long)count, f);
    last_kind = kind, last_offset = offset, last_end = offset + count;
    snprintf(last_flags, sizeof last_flags, "%s", f);
    return failed ? fail_with : 0;
}

static void *r_open(void *opaque, uint32_t flags) { (void)flags; return opaque; }
static int64_t r_size(void *h) { (void)h; return (int64_t)(8 * GIB); }
static int r_pread1(void *h, void *buf, uint32_t n, uint64_t at)
{
    (void)h;
    memset(buf, 0, n);
    return note('R', at, n, 0);
}
static int r_pwrite1(void *h, const void *b, uint32_t n, uint64_t at) { (void)h, (void)b; return note('W', at, n, 0); }
static int r_flush1(void *h) { (void)h; return note('F', 0, 0, 0); }
static int r_trim1(void *h, uint32_t n, uint64_t at) { (void)h; return note('T', at, n, 0); }
static int r_zero1(void *h, uint32_t n, uint64_t at, int may) { (void)h; return note('Z', at, n, may ? 2 : 0); }
static int r_pread(void *h, void *buf, uint64_t n, uint64_t at, uint32_t f)
{
    (void)h;
    memset(buf, 0, n);
    return note('R', at, n, f);
}
static int r_pwrite(void *h, const void *b, uint64_t n, uint64_t at, uint32_t f) { (void)h, (void)b; return note('W', at, n, f); }
static int r_flush(void *h, uint32_t f) { (void)h; return note('F', 0, 0, f); }
static int r_trim(void *h, uint64_t n, uint64_t at, uint32_t f) { (void)h; return note('T', at, n, f); }
static int r_zero(void *h, uint64_t n, uint64_t at, uint32_t f) { (void)h; return note('Z', at, n, f); }
static int r_cache(void *h, uint64_t n, uint64_t at, uint32_t f) { (void)h; return note('C', at, n, f); }
static int r_extents(void *h, uint64_t n, uint64_t at, uint32_t f, qblk_extent_list *list)
{
    (void)h;
    int rc = note('E', at, n, f);
    return rc ? rc : qblk_plugin_add_extent(list, at, n, QBLK_EXTENT_DATA);
}
static int r_not(void *h) { (void)h; return QBLK_CAN_NOT; }
static int r_emulate(void *h) { (void)h; return QBLK_CAN_EMULATE; }
static int r_native(void *h) { (void)h; return QBLK_CAN_NATIVE; }
static int r_blocks(void *h, uint32_t *least, uint32_t *preferred, uint64_t *most)
{
    (void)h;
    *least = 512, *preferred = 4096, *most = 32768;
    return 0;
}

/* What a plugin has. */
enum {
    PREAD1 = 1, PWRITE1 = 2, FLUSH1 = 4, TRIM1 = 8, ZERO1 = 16,
    PREAD2 = 32, PWRITE2 = 64, FLUSH2 = 128, TRIM2 = 256, ZERO2 = 512, CACHE = 1024, EXTENTS = 2048,
    FUA_NOT = 1 << 12, FUA_EMULATE = 1 << 13, FUA_NATIVE = 1 << 14, FAST = 1 << 15, BLOCKS = 1 << 16,
    NO_TRIM = 1 << 17, NO_ZERO = 1 << 18, NO_FLUSH = 1 << 19, NO_CACHE = 1 << 20, NO_EXTENTS = 1 << 21,
    CACHE_EMULATE = 1 << 22, V1 = 1 << 23,
    /* Version 1 with all that it has, version 2 with all that it has. */
    ALL1 = V1 | PREAD1 | PWRITE1 | FLUSH1 | TRIM1 | ZERO1,
    BARE1 = V1 | PREAD1 | PWRITE1,
    ALL2 = PREAD2 | PWRITE2 | FLUSH2 | TRIM2 | ZERO2 | CACHE | EXTENTS | FAST,
    BARE2 = PREAD2 | PWRITE2
};
enum { FUA = QBLK_REQ_FUA, MAY = QBLK_REQ_MAY_TRIM, QUICK = QBLK_REQ_FAST_ZERO };

static struct row {
    int has;
    char op; /* as the letters above */
    uint64_t count, offset;
    uint32_t flags;
    int fail_at, fail_with;
    int rc;
    const char *calls;
} ROWS[] = {
    /* Reading. */
    {BARE1, 'R', 512, 100, 0, 0, 0, 0, "R100+512"},
    {BARE2, 'R', 512, 100, 0, 0, 0, 0, "R100+512"},
    {BARE2 | BLOCKS, 'R', 512, 100, 0, 0, 0, 0, "R0+512 R512+512"},
    {BARE2, 'R', 512, 100, 0, 1, -EREMOTEIO, -EREMOTEIO, "R100+512!"},
    /* Both versions of a function: the newer. */
    {BARE1 + BARE2 - V1, 'R', 512, 0, 0, 0, 0, 0, "R0+512"},
    {PREAD1 | PWRITE1 | PWRITE2, 'W', 512, 0, FUA, 0, 0, 0, "W0+512f"},
    /* What a struct of version 1 has in the slots of version 2 is not meant. */
    {ALL1 | FUA_NOT, 'W', 512, 0, FUA, 0, 0, 0, "W0+512 F"},

    /* Writing, and FUA. */
    {BARE1, 'W', 512, 0, 0, 0, 0, 0, "W0+512"},
    {BARE1, 'W', 512, 0, FUA, 0, 0, -ENOTSUP, ""},
    {BARE1 | FLUSH1, 'W', 512, 0, FUA, 0, 0, 0, "W0+512 F"},
    {BARE1 | FLUSH1, 'W', 512, 0, FUA, 1, -EIO, -EIO, "W0+512!"},
    {BARE1 | FLUSH1, 'W', 512, 0, FUA, 2, -EIO, -EIO, "W0+512 F!"},
    {BARE2, 'W', 512, 0, FUA, 0, 0, 0, "W0+512f"},
    {BARE2 | FLUSH2, 'W', 512, 0, FUA, 0, 0, 0, "W0+512f"},
    {BARE2 | FLUSH2 | FUA_NATIVE, 'W', 512, 0, FUA, 0, 0, 0, "W0+512f"},
    {BARE2 | FLUSH2 | FUA_EMULATE, 'W', 512, 0, FUA, 0, 0, 0, "W0+512 F"},
    {BARE2 | FLUSH2 | FUA_NOT, 'W', 512, 0, FUA, 0, 0, -ENOTSUP, ""},
    {BARE2 | FLUSH2 | FUA_NOT, 'W', 512, 0, 0, 0, 0, 0, "W0+512"},
    /* Pieces each carry it, or one flush follows them all; nothing follows a piece that fails. */
    {BARE2 | BLOCKS, 'W', 1000, 100, FUA, 0, 0, 0, "R0+512 W0+512f W512+512f R1024+512 W1024+512f"},
    {BARE2 | FLUSH2 | FUA_EMULATE | BLOCKS, 'W', 1000, 100, FUA, 0, 0, 0, "R0+512 W0+512 W512+512 R1024+512 W1024+512 F"},
    {BARE2 | BLOCKS, 'W', 70000, 0, FUA, 0, 0, 0, "W0+32768f W32768+32768f W65536+4096f R69632+512 W69632+512f"},
    {BARE2 | FLUSH2 | FUA_EMULATE | BLOCKS, 'W', 70000, 0, FUA, 2, -ENOSPC, -ENOSPC, "W0+32768 W32768+32768!"},

    /* Flushing. */
    {BARE1, 'F', 0, 0, 0, 0, 0, 0, ""},
    {ALL1, 'F', 0, 0, 0, 0, 0, 0, "F"},
    {ALL2, 'F', 0, 0, 0, 0, 0, 0, "F"},
    {ALL2 | NO_FLUSH, 'F', 0, 0, 0, 0, 0, 0, ""},

    /* Zeroing: written where it has to be, all of it, also beyond 64 MiB and 4 GiB. */
    {BARE1, 'Z', 128 << 20, 100, MAY, 0, 0, 0, "W100+134217728"},
    {BARE1 | FLUSH1, 'Z', 128 << 20, 100, FUA, 0, 0, 0, "W100+134217728 F"},
    {BARE1, 'Z', 4096, 0, FUA, 0, 0, -ENOTSUP, ""},
    {BARE1, 'Z', 4096, 0, QUICK, 0, 0, -ENOTSUP, ""},
    {BARE2, 'Z', 5 * GIB, 3, FUA, 0, 0, 0, "W3+5368709120f"},
    {BARE2 | FLUSH2 | FUA_EMULATE, 'Z', 128 << 20, 3, FUA, 0, 0, 0, "W3+134217728 F"},
    {ALL1, 'Z', 4096, 1, 0, 0, 0, 0, "Z1+4096"},
    {ALL1, 'Z', 4096, 1, MAY | FUA, 0, 0, 0, "Z1+4096m F"},
    {ALL1, 'Z', 4096, 1, QUICK, 0, 0, -ENOTSUP, ""},
    {ALL1, 'Z', 5 * GIB, 4096, MAY, 0, 0, 0, "Z4096+4294901760m Z4294905856+1073807360m"},
    {ALL1, 'Z', 5 * GIB, 4096, MAY | FUA, 0, 0, 0, "Z4096+4294901760m Z4294905856+1073807360m F"},
    {ALL1, 'Z', 128 << 20, 0, MAY | FUA, 1, -EOPNOTSUPP, 0, "Z0+134217728m! W0+134217728 F"},
    {ALL1, 'Z', 5 * GIB, 4096, 0, 2, -EOPNOTSUPP, 0, "Z4096+4294901760 Z4294905856+1073807360! W4294905856+1073807360"},
    {ALL1, 'Z', 4096, 0, FUA, 1, -EIO, -EIO, "Z0+4096!"},
    {ALL1, 'Z', 4096, 0, FUA, 2, -EIO, -EIO, "Z0+4096 F!"},
    {ALL2, 'Z', 4096, 1, FUA | MAY, 0, 0, 0, "Z1+4096fm"},
    {ALL2, 'Z', 5 * GIB, 1, FUA | MAY | QUICK, 0, 0, 0, "Z1+5368709120fmq"},
    {ALL2, 'Z', 128 << 20, 0, FUA, 1, -EOPNOTSUPP, 0, "Z0+134217728f! W0+134217728f"},
    {ALL2, 'Z', 128 << 20, 0, QUICK, 1, -EOPNOTSUPP, -ENOTSUP, "Z0+134217728q!"},
    {ALL2 | FUA_EMULATE, 'Z', 4096, 1, FUA, 0, 0, 0, "Z1+4096 F"},
    {ALL2 | FUA_NOT, 'Z', 4096, 1, FUA, 0, 0, -ENOTSUP, ""},
    {ALL2 - FAST, 'Z', 4096, 1, QUICK, 0, 0, -ENOTSUP, ""},
    {ALL2 | NO_ZERO, 'Z', 4096, 1, FUA, 0, 0, 0, "W1+4096f"},
    {ALL2 | NO_ZERO, 'Z', 4096, 1, QUICK, 0, 0, -ENOTSUP, ""},
    /* A zero without flags cannot carry FUA: it is flushed, or written. */
    {BARE2 | ZERO1 | FLUSH1, 'Z', 4096, 1, FUA, 0, 0, 0, "Z1+4096 F"},
    {BARE2 | ZERO1, 'Z', 4096, 1, FUA, 0, 0, 0, "W1+4096f"},
    /* Parts of blocks are written, whole ones zeroed. */
    {ALL2 | BLOCKS, 'Z', 100, 50, FUA, 0, 0, 0, "R0+512 W0+512f"},
    {ALL2 | BLOCKS, 'Z', 1100, 500, FUA, 0, 0, 0, "Z512+1024f R0+512 W0+512f R1536+512 W1536+512f"},
    {ALL2 | BLOCKS, 'Z', 1100, 500, QUICK, 0, 0, -ENOTSUP, ""},

    /* Trimming. */
    {BARE1, 'T', 4096, 0, 0, 0, 0, 0, ""},
    {BARE1 | FLUSH1, 'T', 4096, 0, FUA, 0, 0, 0, "F"},
    {BARE1, 'T', 4096, 0, FUA, 0, 0, -ENOTSUP, ""},
    {BARE2, 'T', 4096, 0, FUA, 0, 0, 0, ""},
    {ALL1, 'T', 5 * GIB, 1, 0, 0, 0, 0, "T1+4294901760 T4294901761+1073807360"},
    {ALL1, 'T', 4096, 1, FUA, 0, 0, 0, "T1+4096 F"},
    {ALL1, 'T', 4096, 1, FUA, 1, -EIO, -EIO, "T1+4096!"},
    {ALL2, 'T', 5 * GIB, 1, FUA, 0, 0, 0, "T1+5368709120f"},
    {ALL2 | FUA_EMULATE, 'T', 4096, 1, FUA, 0, 0, 0, "T1+4096 F"},
    {ALL2 | NO_TRIM, 'T', 4096, 1, 0, 0, 0, 0, ""},
    {BARE2 | TRIM1 | FLUSH2, 'T', 4096, 1, FUA, 0, 0, 0, "T1+4096 F"},
    {BARE2 | TRIM1, 'T', 4096, 1, FUA, 0, 0, 0, ""},
    {ALL2 | BLOCKS, 'T', 1100, 500, 0, 0, 0, 0, "T512+1024"},
    {ALL2 | BLOCKS, 'T', 100, 500, 0, 0, 0, 0, ""},

    /* Bringing near, describing. */
    {BARE1, 'C', 8192, 5, 0, 0, 0, 0, "R5+8192"},
    {ALL2, 'C', 8192, 5, 0, 0, 0, 0, "C5+8192"},
    {ALL2 | BLOCKS, 'C', 8192, 5, 0, 0, 0, 0, "C0+8704"},
    {ALL2 | CACHE_EMULATE, 'C', 8192, 5, 0, 0, 0, 0, "R5+8192"},
    {ALL2 | NO_CACHE, 'C', 8192, 5, 0, 0, 0, -ENOTSUP, ""},
    {BARE2, 'E', 8192, 5, 0, 0, 0, 1, ""},
    {ALL2, 'E', 8192, 5, 0, 0, 0, 1, "E5+8192"},
    {ALL2, 'E', 8192, 5, 0, 1, -EIO, -EIO, "E5+8192!"},
    {ALL2 | BLOCKS, 'E', 8192, 5, 0, 0, 0, 1, "E0+8704"},
    {ALL2 | NO_EXTENTS, 'E', 8192, 5, 0, 0, 0, 1, ""},
};

static int register_it(int has)
{
    qblk_plugin p;
    memset(&p, 0, sizeof p);
    p._struct_size = sizeof p;
    p._api_version = has & V1 ? 1 : 2;
    p.thread_model = QBLK_THREAD_INSTANCE;
    p.name = "recorder";
    p.open = r_open;
    p.get_size = r_size;
    if (has & PREAD1) p._pread_v1 = r_pread1;
    if (has & PWRITE1) p._pwrite_v1 = r_pwrite1;
    if (has & FLUSH1) p._flush_v1 = r_flush1;
    if (has & TRIM1) p._trim_v1 = r_trim1;
    if (has & ZERO1) p._zero_v1 = r_zero1;
    if (has & PREAD2) p.pread = r_pread;
    if (has & PWRITE2) p.pwrite = r_pwrite;
    if (has & FLUSH2) p.flush = r_flush;
    if (has & TRIM2) p.trim = r_trim;
    if (has & ZERO2) p.zero = r_zero;
    if (has & CACHE) p.cache = r_cache;
    if (has & EXTENTS) p.extents = r_extents;
    if (has & FUA_NOT) p.can_fua = r_not;
    if (has & FUA_EMULATE) p.can_fua = r_emulate;
    if (has & FUA_NATIVE) p.can_fua = r_native;
    if (has & FAST) p.can_fast_zero = r_native;
    if (has & BLOCKS) p.block_size = r_blocks;
    if (has & NO_TRIM) p.can_trim = r_not;
    if (has & NO_ZERO) p.can_zero = r_not;
    if (has & NO_FLUSH) p.can_flush = r_not;
    if (has & NO_CACHE) p.can_cache = r_not;
    if (has & CACHE_EMULATE) p.can_cache = r_emulate;
    if (has & NO_EXTENTS) p.can_extents = r_not;
    return qblk_register_plugin(&p, log_);
}

static long long run(qblk *dev, const struct row *row)
{
    static char buf[70000];
    qblk_extent e[4];
    switch (row->op) {
    case 'R': return qblk_pread(dev, buf, row->count, row->offset);
    case 'W': return qblk_pwrite2(dev, buf, row->count, row->offset, row->flags);
    case 'F': return qblk_flush(dev);
    case 'Z': return qblk_zero(dev, row->count, row->offset, row->flags);
    case 'T': return qblk_trim(dev, row->count, row->offset, row->flags);
    case 'C': return qblk_cache(dev, row->count, row->offset, 0);
    default: return qblk_extents(dev, row->count, row->offset, 0, e, 4);
    }
}

int main(int argc, char **argv)
{
    qblk *dev;
    (void)argc;
    test_begin(argv);
    for (size_t i = 0; i < sizeof ROWS / sizeof *ROWS; i++) {
        const struct row *row = &ROWS[i];
        OK(register_it(row->has));
        OK(open_opt("plugin:recorder", QBLK_OPEN_RDWR, &dev, options("format", "raw", NULL)));
        log_[0] = 0, last_kind = 0, calls = 0;
        fail_at = row->fail_at, fail_with = row->fail_with;
        /* Written zeroes come in many pieces; nobody cares how many. */
        join = row->op == 'Z' && row->count >= 128 << 20 && strchr(row->calls, 'W') != NULL;
        long long rc = run(dev, row);
        if (rc != row->rc || strcmp(log_, row->calls) != 0)
            FAIL_("row %zu (has %#x, %c of %llu at %llu, flags %u): expected %d after \"%s\", found %lld after \"%s\" (%s)", i,
                  (unsigned)row->has, row->op, (unsigned long long)row->count, (unsigned long long)row->offset,
                  row->flags, row->rc, row->calls, rc, log_, qblk_get_error());
        /* A flush that failed is not forgotten: nothing is written any more, nor is it flushed again. */
        if (strchr(row->calls, 'F') && strstr(row->calls, "F!")) {
            log_[0] = 0;
            FAILS(qblk_pwrite(dev, "x", 1, 0), -EIO, "refuses writes");
            FAILS(qblk_flush(dev), -EIO, "refuses writes");
            CHECK_STR(log_, "");
            OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
            OK(qblk_pwrite(dev, "x", 1, 0));
            fail_at = 0;
        }
        fail_at = 0;
        OK(qblk_close(dev));
        OK(qblk_unregister_plugin("recorder"));
    }
    return 0;
}
