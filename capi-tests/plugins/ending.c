/* A disk whose instances note what becomes of them in the file that the setting "log" names; when the
 * object itself is taken down that is noted, too. Nothing may be called after that. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* O_CLOEXEC */
#endif
#include <qblk-plugin.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[4096];
static int gone;

static void note(const char *what)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (gone || fd < 0 || write(fd, what, strlen(what)) != (ssize_t)strlen(what))
        abort();
    close(fd);
}

static void *ending_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return QBLK_PLUGIN_NO_HANDLE;
}

static int ending_config(void *handle, const char *key, const char *value)
{
    (void)handle;
    if (strcmp(key, "log") != 0 || strlen(value) >= sizeof path)
        return -EINVAL;
    memcpy(path, value, strlen(value) + 1);
    return 0;
}

static void ending_close(void *handle)
{
    (void)handle;
    note("close ");
}

static int64_t ending_get_size(void *handle)
{
    (void)handle;
    return 65536;
}

static int ending_pread(void *handle, void *buf, uint32_t count, uint64_t offset)
{
    (void)handle, (void)offset;
    memset(buf, 0, count);
    return 0;
}

static int ending_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset)
{
    (void)handle, (void)buf, (void)count, (void)offset;
    return 0;
}

static int ending_flush(void *handle)
{
    (void)handle;
    note("flush ");
    return 0;
}

static qblk_plugin plugin;

__attribute__((constructor)) static void begin(void)
{
    plugin.name = "ending";
    plugin.open = ending_open;
    plugin.config = ending_config;
    plugin.close = ending_close;
    plugin.get_size = ending_get_size;
    plugin.pread = ending_pread;
    plugin.pwrite = ending_pwrite;
    plugin.flush = ending_flush;
}

__attribute__((destructor)) static void end(void)
{
    if (path[0])
        note("gone");
    gone = 1;
}

QBLK_PLUGIN_REGISTER(plugin)
