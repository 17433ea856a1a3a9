/*
 * A layer in a page: every byte is exclusive-ored with one setting, "key". It hides nothing from anybody, but
 * shows what a layer that changes bytes consists of. qblk-plugin(3) tells more, under Layers.
 *
 *   cc -shared -fPIC -o xor.so plugin-xor.c $(pkg-config --cflags --libs qblk)
 *   qblk create disk.img -f raw 64M
 *   echo hello | qblk write 'layers:./xor.so;key=0x5a:disk.img' 0
 *   qblk read 'layers:./xor.so;key=0x5a:disk.img' 0 6
 */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <stdlib.h>
#include <string.h>

struct xor_layer {
    qblk *next; /* a context on what is below */
    unsigned char key;
};

/* Open what is below, for writing if the layer itself will be written. */
static void *xor_open(void *opaque, qblk_source *source, uint32_t flags)
{
    struct xor_layer *layer = (struct xor_layer *)calloc(1, sizeof *layer);
    (void)opaque;
    if (!layer)
        return NULL;
    layer->key = 0x5a;
    if (qblk_source_open(source, flags & QBLK_OPEN_RDWR, &layer->next) < 0 ||
        qblk_layer_set_next(source, layer->next) < 0) { /* where flushes go, and what tells the size */
        qblk_close(layer->next);
        free(layer);
        return NULL; /* the words of the call that failed are shown */
    }
    return layer;
}

static int xor_config(void *handle, const char *key, const char *value)
{
    uint64_t number;
    if (strcmp(key, "key") != 0) {
        qblk_plugin_error("unknown setting; there is one, key");
        return -EINVAL;
    }
    if (qblk_plugin_parse_uint64(key, value, &number) < 0)
        return -EINVAL; /* which has its words already */
    if (number > 255) {
        qblk_plugin_error("key is more than 255");
        return -EINVAL;
    }
    ((struct xor_layer *)handle)->key = (unsigned char)number;
    return 0;
}

static void xor_close(void *handle)
{
    struct xor_layer *layer = (struct xor_layer *)handle;
    qblk_close(layer->next);
    free(layer);
}

static int xor_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct xor_layer *layer = (struct xor_layer *)handle;
    unsigned char *bytes = (unsigned char *)buf;
    int rc = qblk_pread2(layer->next, buf, count, offset, flags);
    for (uint64_t i = 0; rc == 0 && i < count; i++)
        bytes[i] ^= layer->key;
    return rc;
}

/* The caller's memory is not to be changed, so it goes by way of a piece of the layer's own. With FUA each
 * piece carries it: flags. */
static int xor_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct xor_layer *layer = (struct xor_layer *)handle;
    const unsigned char *bytes = (const unsigned char *)buf;
    unsigned char piece[16384];
    while (count > 0) {
        size_t n = count < sizeof piece ? (size_t)count : sizeof piece;
        for (size_t i = 0; i < n; i++)
            piece[i] = bytes[i] ^ layer->key;
        int rc = qblk_pwrite2(layer->next, piece, n, offset, flags);
        if (rc < 0)
            return rc;
        bytes += n, offset += n, count -= n;
    }
    return 0;
}

static const char *xor_config_help(void *opaque)
{
    (void)opaque;
    return "key=NUMBER    0 to 255; 0x5a";
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "xor";
    plugin.description = "every byte exclusive-ored with a key";
    plugin.thread_model = QBLK_THREAD_PARALLEL;
    plugin.passes = QBLK_METHOD_FLUSH; /* zeroes below would not read as zeroes: so no ZERO, TRIM, EXTENTS */
    plugin.open_layer = xor_open;
    plugin.config = xor_config;
    plugin.config_help = xor_config_help;
    plugin.close = xor_close;
    plugin.pread = xor_pread;
    plugin.pwrite = xor_pwrite;
}

QBLK_PLUGIN_REGISTER(plugin)
