/* A disk in memory, which any number of calls use at a time: what nbdkit's memory plugin is to nbdkit. */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct disk {
    uint64_t size;
    char *bytes;
};

static void *memory_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return calloc(1, sizeof(struct disk));
}

static int memory_config(void *handle, const char *key, const char *value)
{
    struct disk *disk = handle;
    if (strcmp(key, "size") != 0)
        return -EINVAL;
    disk->size = strtoull(value, NULL, 10);
    return 0;
}

static int memory_config_complete(void *handle)
{
    struct disk *disk = handle;
    disk->bytes = calloc(1, disk->size);
    return disk->bytes ? 0 : -ENOMEM;
}

static void memory_close(void *handle)
{
    struct disk *disk = handle;
    free(disk->bytes);
    free(disk);
}

static int64_t memory_get_size(void *handle)
{
    return (int64_t)((struct disk *)handle)->size;
}

static int memory_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy(buf, ((struct disk *)handle)->bytes + offset, count);
    return 0;
}

static int memory_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy(((struct disk *)handle)->bytes + offset, buf, count);
    return 0;
}

static qblk_plugin memory = {
    .thread_model = QBLK_THREAD_PARALLEL,
    .name = "memory",
    .open = memory_open,
    .config = memory_config,
    .config_complete = memory_config_complete,
    .close = memory_close,
    .get_size = memory_get_size,
    .pread = memory_pread,
    .pwrite = memory_pwrite,
};

QBLK_PLUGIN_REGISTER(memory)
