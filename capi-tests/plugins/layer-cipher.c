/* A layer that encrypts with ChaCha20 (RFC 8439 section 2.3, with a block counter of 64 bits and no nonce): the
 * key stream's byte N is for the device's byte N. Whoever sees two states of a disk learns what of it changed,
 * and how: LUKS is for disks, this shows what a layer looks like. One context, for all calls. What it
 * does not have (zero, trim, extents) must never reach what is below it in the clear. */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct cipher {
    qblk *next;
    uint32_t key[8];
};

static void *cipher_open(void *opaque, qblk_source *source, uint32_t flags)
{
    struct cipher *cipher = (struct cipher *)calloc(1, sizeof *cipher);
    (void)opaque;
    /* Its size is that of what is below. */
    if (cipher && (qblk_source_open(source, flags & QBLK_OPEN_RDWR, &cipher->next) < 0
                   || qblk_layer_set_next(source, cipher->next) < 0)) {
        qblk_close(cipher->next);
        free(cipher);
        return NULL;
    }
    return cipher;
}

/* key=HEX: the key's last bytes, the others are 0. */
static int cipher_config(void *handle, const char *key, const char *value)
{
    struct cipher *cipher = (struct cipher *)handle;
    size_t digits = strlen(value);
    unsigned char bytes[32] = {0};
    if (strcmp(key, "key") != 0) {
        qblk_plugin_error("unknown setting");
        return -EINVAL;
    }
    if (digits == 0 || digits > 64 || strspn(value, "0123456789abcdef") != digits) {
        qblk_plugin_error("expected 1 to 64 digits of 0-9 and a-f");
        return -EINVAL;
    }
    for (size_t i = 0; i < digits; i++) {
        unsigned char c = (unsigned char)value[digits - 1 - i];
        bytes[31 - i / 2] = (unsigned char)(bytes[31 - i / 2] | (c <= '9' ? c - '0' : c - 'a' + 10) << i % 2 * 4);
    }
    for (int i = 0; i < 8; i++)
        cipher->key[i] = bytes[4 * i] | (uint32_t)bytes[4 * i + 1] << 8 | (uint32_t)bytes[4 * i + 2] << 16
                         | (uint32_t)bytes[4 * i + 3] << 24;
    return 0;
}

static void cipher_close(void *handle)
{
    qblk_close(((struct cipher *)handle)->next);
    free(handle);
}

static uint32_t left(uint32_t x, int bits)
{
    return x << bits | x >> (32 - bits);
}

static void quarter(uint32_t *x, int a, int b, int c, int d)
{
    x[a] += x[b], x[d] = left(x[d] ^ x[a], 16);
    x[c] += x[d], x[b] = left(x[b] ^ x[c], 12);
    x[a] += x[b], x[d] = left(x[d] ^ x[a], 8);
    x[c] += x[d], x[b] = left(x[b] ^ x[c], 7);
}

/* 64 bytes of the key stream. */
static void stream(const struct cipher *cipher, uint64_t block, unsigned char *out)
{
    uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}, x[16];
    memcpy(start + 4, cipher->key, sizeof cipher->key);
    start[12] = (uint32_t)block, start[13] = (uint32_t)(block >> 32);
    memcpy(x, start, sizeof x);
    for (int i = 0; i < 10; i++) {
        quarter(x, 0, 4, 8, 12), quarter(x, 1, 5, 9, 13), quarter(x, 2, 6, 10, 14), quarter(x, 3, 7, 11, 15);
        quarter(x, 0, 5, 10, 15), quarter(x, 1, 6, 11, 12), quarter(x, 2, 7, 8, 13), quarter(x, 3, 4, 9, 14);
    }
    for (int i = 0; i < 64; i++)
        out[i] = (unsigned char)((x[i / 4] + start[i / 4]) >> i % 4 * 8);
}

static void change(const struct cipher *cipher, unsigned char *to, const unsigned char *from,
                   uint64_t count, uint64_t offset)
{
    unsigned char key[64];
    for (uint64_t i = 0; i < count; i++) {
        if (i == 0 || (offset + i) % 64 == 0)
            stream(cipher, (offset + i) / 64, key);
        to[i] = from[i] ^ key[(offset + i) % 64];
    }
}

static int cipher_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct cipher *cipher = (struct cipher *)handle;
    int rc = qblk_pread2(cipher->next, buf, count, offset, flags);
    if (rc == 0)
        change(cipher, (unsigned char *)buf, (unsigned char *)buf, count, offset);
    return rc;
}

static int cipher_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct cipher *cipher = (struct cipher *)handle;
    unsigned char *changed = (unsigned char *)malloc(count);
    if (!changed)
        return -ENOMEM;
    change(cipher, changed, (const unsigned char *)buf, count, offset);
    int rc = qblk_pwrite2(cipher->next, changed, count, offset, flags);
    free(changed);
    return rc;
}

static int cipher_flush(void *handle, uint32_t flags)
{
    (void)flags;
    return qblk_flush(((struct cipher *)handle)->next);
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "cipher";
    plugin.description = "a layer that encrypts, for tests";
    plugin.thread_model = QBLK_THREAD_PARALLEL;
    plugin.passes = QBLK_METHOD_CACHE;
    plugin.open_layer = cipher_open;
    plugin.config = cipher_config;
    plugin.close = cipher_close;
    plugin.pread = cipher_pread;
    plugin.pwrite = cipher_pwrite;
    plugin.flush = cipher_flush;
}

QBLK_PLUGIN_REGISTER(plugin)
