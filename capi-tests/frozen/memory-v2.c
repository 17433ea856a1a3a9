/* A disk in memory, in version 2 of the ABI, any number of calls at a time: with all that version 2 has.
 * Settings: export, one of a (64 KiB), b (128 KiB) and big (8 GiB, of which nothing is kept). */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 512 };

struct disk {
    uint64_t size;
    char *bytes;
    int big;
};

static void *memory_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return calloc(1, sizeof(struct disk));
}

static int memory_config(void *handle, const char *key, const char *value)
{
    struct disk *disk = (struct disk *)handle;
    if (strcmp(key, "export") != 0) {
        qblk_plugin_error("unknown setting");
        return -EINVAL;
    }
    disk->big = strcmp(value, "big") == 0;
    disk->size = strcmp(value, "a") == 0   ? 65536
                 : strcmp(value, "b") == 0 ? 131072
                 : disk->big               ? UINT64_C(8) << 30
                                           : 0;
    return 0;
}

static int memory_config_complete(void *handle)
{
    struct disk *disk = (struct disk *)handle;
    if (disk->size == 0)
        return -ENOENT;
    disk->bytes = (char *)calloc(1, disk->big ? 1 : disk->size);
    return disk->bytes ? 0 : -ENOMEM;
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

static int memory_block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint64_t *maximum)
{
    (void)handle;
    *minimum = BLOCK;
    *preferred = 4096;
    *maximum = 32768;
    return 0;
}

static int aligned(uint64_t count, uint64_t offset)
{
    return count > 0 && count % BLOCK == 0 && offset % BLOCK == 0;
}

static int memory_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct disk *disk = (struct disk *)handle;
    if (flags != 0 || count > 32768 || !aligned(count, offset))
        return -EDOM;
    if (disk->big)
        memset(buf, 0, count);
    else
        memcpy(buf, disk->bytes + offset, count);
    return 0;
}

static int memory_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset,
                         uint32_t flags)
{
    struct disk *disk = (struct disk *)handle;
    if ((flags & ~(uint32_t)QBLK_REQ_FUA) != 0 || count > 32768 || !aligned(count, offset))
        return -EDOM;
    if (!disk->big)
        memcpy(disk->bytes + offset, buf, count);
    return 0;
}

static int memory_flush(void *handle, uint32_t flags)
{
    (void)handle;
    return flags == 0 ? 0 : -EDOM;
}

static int memory_zero(void *handle, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct disk *disk = (struct disk *)handle;
    if (flags > 7 || !aligned(count, offset))
        return -EDOM;
    if (!disk->big)
        memset(disk->bytes + offset, 0, count);
    return 0;
}

static int memory_trim(void *handle, uint64_t count, uint64_t offset, uint32_t flags)
{
    return flags <= 1 && memory_zero(handle, count, offset, 0) == 0 ? 0 : -EDOM;
}

static int memory_cache(void *handle, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)handle;
    return flags == 0 && aligned(count, offset) ? 0 : -EDOM;
}

/* Blocks, each by itself: whoever asks joins them. */
static int memory_extents(void *handle, uint64_t count, uint64_t offset, uint32_t flags,
                          qblk_extent_list *list)
{
    static const char zeroes[BLOCK] = {0};
    struct disk *disk = (struct disk *)handle;
    if (flags != 0 || !aligned(count, offset))
        return -EDOM;
    if (disk->big)
        return qblk_plugin_add_extent(list, 0, disk->size, QBLK_EXTENT_ZERO);
    for (uint64_t at = offset; at < offset + count; at += BLOCK) {
        int zero = memcmp(disk->bytes + at, zeroes, BLOCK) == 0;
        int rc = qblk_plugin_add_extent(list, at, BLOCK, zero ? QBLK_EXTENT_ZERO : QBLK_EXTENT_DATA);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int memory_native(void *handle)
{
    (void)handle;
    return QBLK_CAN_NATIVE;
}

static int memory_list_exports(void *handle, qblk_export_list *list)
{
    (void)handle;
    if (qblk_plugin_add_export(list, "a", "64 KiB") < 0 || qblk_plugin_add_export(list, "b", NULL) < 0)
        return -1;
    return qblk_plugin_add_export(list, "big", "8 GiB of zeroes");
}

static const char *memory_default_export(void *handle)
{
    (void)handle;
    return "a";
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "memory2";
    plugin.thread_model = QBLK_THREAD_PARALLEL;
    plugin.open = memory_open;
    plugin.config = memory_config;
    plugin.config_complete = memory_config_complete;
    plugin.close = memory_close;
    plugin.get_size = memory_get_size;
    plugin.can_write = memory_native;
    plugin.can_flush = memory_native;
    plugin.can_trim = memory_native;
    plugin.can_zero = memory_native;
    plugin.can_fua = memory_native;
    plugin.can_fast_zero = memory_native;
    plugin.can_cache = memory_native;
    plugin.can_extents = memory_native;
    plugin.can_multi_conn = memory_native;
    plugin.block_size = memory_block_size;
    plugin.pread = memory_pread;
    plugin.pwrite = memory_pwrite;
    plugin.flush = memory_flush;
    plugin.trim = memory_trim;
    plugin.zero = memory_zero;
    plugin.cache = memory_cache;
    plugin.extents = memory_extents;
    plugin.list_exports = memory_list_exports;
    plugin.default_export = memory_default_export;
}

QBLK_PLUGIN_REGISTER(plugin)
