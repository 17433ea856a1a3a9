/* A disk in memory, in version 1 of the ABI, one call at a time for each instance. Settings: size; fill, a
 * byte that is everywhere to begin with. */
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct disk {
    uint64_t size;
    uint64_t fill;
    char *bytes;
    uint32_t flags;
};

static void *memory_open(void *opaque, uint32_t flags)
{
    struct disk *disk = (struct disk *)calloc(1, sizeof *disk);
    if (opaque)
        abort();
    if (disk)
        disk->flags = flags;
    return disk;
}

static int memory_config(void *handle, const char *key, const char *value)
{
    struct disk *disk = (struct disk *)handle;
    if (strcmp(key, "size") == 0)
        return qblk_plugin_parse_size(key, value, &disk->size);
    if (strcmp(key, "fill") == 0)
        return qblk_plugin_parse_uint64(key, value, &disk->fill);
    qblk_plugin_error("unknown setting '%s'", key);
    return -EINVAL;
}

static int memory_config_complete(void *handle)
{
    struct disk *disk = (struct disk *)handle;
    if (disk->size == 0) {
        qblk_plugin_error("the setting size is missing");
        qblk_plugin_set_error(EDOM);
        return -1;
    }
    disk->bytes = (char *)malloc(disk->size);
    if (!disk->bytes)
        return -ENOMEM;
    memset(disk->bytes, (int)disk->fill, disk->size);
    return 0;
}

static const char *memory_config_help(void *opaque)
{
    (void)opaque;
    return "size=SIZE   of the disk; needed\nfill=BYTE   what it is full of";
}

static int64_t memory_dump(void *handle, char *buf, size_t size)
{
    if (!handle)
        return snprintf(buf, size, "kind=memory");
    return snprintf(buf, size, "fill=%d\nrdwr=%d", (int)((struct disk *)handle)->fill,
                    (((struct disk *)handle)->flags & QBLK_OPEN_RDWR) != 0);
}

static void memory_close(void *handle)
{
    free(((struct disk *)handle)->bytes);
    free(handle);
}

static int64_t memory_get_size(void *handle)
{
    return (int64_t)((struct disk *)handle)->size;
}

static int memory_pread(void *handle, void *buf, uint32_t count, uint64_t offset)
{
    memcpy(buf, ((struct disk *)handle)->bytes + offset, count);
    return 0;
}

static int memory_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset)
{
    memcpy(((struct disk *)handle)->bytes + offset, buf, count);
    return 0;
}

static int memory_flush(void *handle)
{
    (void)handle;
    return 0;
}

static int memory_zero(void *handle, uint32_t count, uint64_t offset, int may_trim)
{
    if (!may_trim)
        return -EOPNOTSUPP; /* the library writes */
    memset(((struct disk *)handle)->bytes + offset, 0, count);
    return 0;
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "memory1";
    plugin.version = "1.2.3";
    plugin.description = "a disk in memory, version 1";
    plugin.thread_model = QBLK_THREAD_INSTANCE;
    plugin.open = memory_open;
    plugin.config = memory_config;
    plugin.config_complete = memory_config_complete;
    plugin.config_help = memory_config_help;
    plugin.dump = memory_dump;
    plugin.close = memory_close;
    plugin.get_size = memory_get_size;
    plugin.pread = memory_pread;
    plugin.pwrite = memory_pwrite;
    plugin.flush = memory_flush;
    plugin.zero = memory_zero;
}

QBLK_PLUGIN_REGISTER(plugin)
