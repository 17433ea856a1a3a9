/* A layer that encrypts: each byte is changed by the setting "key" and its place. (A toy: the point is what
 * passes where.) One context, for all calls. What it does not have (zero, trim, extents) must never reach
 * what is below it in the clear. */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct cipher {
    qblk *next;
    uint64_t key;
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

static int cipher_config(void *handle, const char *key, const char *value)
{
    if (strcmp(key, "key") == 0)
        return qblk_plugin_parse_uint64(key, value, &((struct cipher *)handle)->key);
    qblk_plugin_error("unknown setting");
    return -EINVAL;
}

static void cipher_close(void *handle)
{
    qblk_close(((struct cipher *)handle)->next);
    free(handle);
}

static void change(const struct cipher *cipher, unsigned char *to, const unsigned char *from,
                   uint64_t count, uint64_t offset)
{
    for (uint64_t i = 0; i < count; i++)
        to[i] = (unsigned char)(from[i] ^ cipher->key ^ (offset + i) * 167);
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
