/* A layer with a thread in the background that has a context of its own: it reads the first block of what
 * is below again and again, and keeps what it saw. Besides, the thread swaps the context that all requests
 * share: opens another, puts it in the place of the old one, and closes that when nobody uses it any more. */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* A context that is shared by all who have a request. */
struct shared {
    qblk *dev;
    int users;
};

struct layer {
    qblk_source *source;
    uint32_t flags;
    pthread_t thread;
    pthread_mutex_t lock;
    int end, running;
    struct shared *now;
    uint64_t looks, swaps;
    char seen[512];
};

static struct shared *make(struct layer *layer)
{
    struct shared *made = (struct shared *)calloc(1, sizeof *made);
    if (made && qblk_source_open(layer->source, layer->flags, &made->dev) < 0) {
        free(made);
        return NULL;
    }
    if (made)
        made->users = 1;
    return made;
}

static struct shared *take(struct layer *layer)
{
    pthread_mutex_lock(&layer->lock);
    struct shared *now = layer->now;
    now->users++;
    pthread_mutex_unlock(&layer->lock);
    return now;
}

static void give(struct layer *layer, struct shared *shared)
{
    pthread_mutex_lock(&layer->lock);
    int last = --shared->users == 0;
    pthread_mutex_unlock(&layer->lock);
    if (last) {
        qblk_close(shared->dev);
        free(shared);
    }
}

static void *background(void *arg)
{
    struct layer *layer = (struct layer *)arg;
    qblk *mine = NULL;
    char block[512];
    for (;;) {
        pthread_mutex_lock(&layer->lock);
        int end = layer->end;
        pthread_mutex_unlock(&layer->lock);
        if (end || (!mine && qblk_source_open(layer->source, 0, &mine) < 0))
            break;
        int rc = qblk_pread(mine, block, sizeof block, 0);
        struct shared *fresh = make(layer), *old = NULL;
        pthread_mutex_lock(&layer->lock);
        if (rc == 0) {
            memcpy(layer->seen, block, sizeof block);
            layer->looks++;
        }
        if (fresh) {
            old = layer->now;
            layer->now = fresh;
            layer->swaps++;
        }
        pthread_mutex_unlock(&layer->lock);
        if (old)
            give(layer, old);
    }
    qblk_close(mine);
    return NULL;
}

static void *layer_open(void *opaque, qblk_source *source, uint32_t flags)
{
    struct layer *layer = (struct layer *)calloc(1, sizeof *layer);
    (void)opaque;
    if (layer) {
        layer->source = source;
        layer->flags = flags & QBLK_OPEN_RDWR;
        pthread_mutex_init(&layer->lock, NULL);
    }
    return layer;
}

static int layer_config_complete(void *handle)
{
    struct layer *layer = (struct layer *)handle;
    layer->now = make(layer);
    if (!layer->now)
        return -EIO;
    int rc = pthread_create(&layer->thread, NULL, background, layer);
    layer->running = rc == 0;
    return -rc;
}

static void layer_close(void *handle)
{
    struct layer *layer = (struct layer *)handle;
    pthread_mutex_lock(&layer->lock);
    layer->end = 1;
    pthread_mutex_unlock(&layer->lock);
    if (layer->running)
        pthread_join(layer->thread, NULL);
    if (layer->now)
        give(layer, layer->now);
    pthread_mutex_destroy(&layer->lock);
    free(layer);
}

static int64_t layer_get_size(void *handle)
{
    struct layer *layer = (struct layer *)handle;
    qblk_info info;
    struct shared *now = take(layer);
    int rc = qblk_get_info(now->dev, &info);
    give(layer, now);
    return rc < 0 ? rc : (int64_t)info.size;
}

static int layer_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct layer *layer = (struct layer *)handle;
    struct shared *now = take(layer);
    int rc = qblk_pread2(now->dev, buf, count, offset, flags);
    give(layer, now);
    return rc;
}

static int layer_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct layer *layer = (struct layer *)handle;
    struct shared *now = take(layer);
    int rc = qblk_pwrite2(now->dev, buf, count, offset, flags);
    give(layer, now);
    return rc;
}

static int layer_flush(void *handle, uint32_t flags)
{
    struct layer *layer = (struct layer *)handle;
    struct shared *now = take(layer);
    (void)flags;
    int rc = qblk_flush(now->dev);
    give(layer, now);
    return rc;
}

static int64_t layer_dump(void *handle, char *buf, size_t size)
{
    struct layer *layer = (struct layer *)handle;
    if (!layer)
        return snprintf(buf, size, "kind=thread");
    pthread_mutex_lock(&layer->lock);
    int n = snprintf(buf, size, "looks=%d swaps=%d seen=%.20s", layer->looks > 3, layer->swaps > 3, layer->seen);
    pthread_mutex_unlock(&layer->lock);
    return n;
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "thread";
    plugin.thread_model = QBLK_THREAD_PARALLEL;
    plugin.open_layer = layer_open;
    plugin.config_complete = layer_config_complete;
    plugin.close = layer_close;
    plugin.dump = layer_dump;
    plugin.get_size = layer_get_size;
    plugin.pread = layer_pread;
    plugin.pwrite = layer_pwrite;
    plugin.flush = layer_flush;
}

QBLK_PLUGIN_REGISTER(plugin)
