/*
 * A plugin in a page: a disk in memory, with one setting, "size". qblk-plugin(3) walks through it.
 *
 *   cc -shared -fPIC -o memory.so plugin-memory.c $(pkg-config --cflags --libs qblk)
 *   qblk read 'plugin:./memory.so?size=64M' 0 512 | xxd
 */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct disk {
    uint64_t size;
    char *bytes;
};

/* Every open of the plugin is an instance, with settings of its own. There are no globals. */
static void *memory_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return calloc(1, sizeof(struct disk)); /* NULL is a failure */
}

static int memory_config(void *handle, const char *key, const char *value)
{
    struct disk *disk = (struct disk *)handle;
    if (strcmp(key, "size") == 0)
        return qblk_plugin_parse_size(key, value, &disk->size);
    qblk_plugin_error("unknown setting; there is one, size"); /* never ignore what you do not know */
    return -EINVAL;
}

static int memory_config_complete(void *handle)
{
    struct disk *disk = (struct disk *)handle;
    if (disk->size == 0) {
        qblk_plugin_error("the setting size is missing, as in size=64M");
        return -EINVAL;
    }
    disk->bytes = (char *)calloc(1, disk->size);
    return disk->bytes ? 0 : -ENOMEM;
}

static void memory_close(void *handle)
{
    struct disk *disk = (struct disk *)handle;
    free(disk->bytes);
    free(disk);
}

static int64_t memory_get_size(void *handle)
{
    return (int64_t)((struct disk *)handle)->size;
}

/* Ranges lie on the disk: that has been looked at. */
static int memory_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy(buf, ((struct disk *)handle)->bytes + offset, count);
    return 0;
}

static int memory_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset,
                         uint32_t flags)
{
    (void)flags;
    memcpy(((struct disk *)handle)->bytes + offset, buf, count);
    return 0;
}

static int memory_zero(void *handle, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memset(((struct disk *)handle)->bytes + offset, 0, count);
    return 0;
}

static const char *memory_config_help(void *opaque)
{
    (void)opaque;
    return "size=SIZE    of the disk; needed";
}

static qblk_plugin plugin;

/* An ELF constructor: the one beginning that a shared object needs. (C can also initialise the struct
 * where it is defined: static qblk_plugin plugin = { .name = "memory", ... };) */
__attribute__((constructor)) static void begin(void)
{
    plugin.name = "memory";
    plugin.description = "a disk in memory";
    plugin.thread_model = QBLK_THREAD_PARALLEL;
    plugin.open = memory_open;
    plugin.config = memory_config;
    plugin.config_complete = memory_config_complete;
    plugin.config_help = memory_config_help;
    plugin.close = memory_close;
    plugin.get_size = memory_get_size;
    plugin.pread = memory_pread;
    plugin.pwrite = memory_pwrite;
    plugin.zero = memory_zero;
}

QBLK_PLUGIN_REGISTER(plugin)
