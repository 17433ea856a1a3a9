/* A disk of 1 MiB in memory, by functions instead of a struct: some with flags, some without. */
#define QBLK_PLUGIN_FUNCTIONS
#include <qblk-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { SIZE = 1 << 20 };

int qblk_plugin_thread_model(void)
{
    return QBLK_THREAD_PARALLEL;
}

const char *qblk_plugin_description(void)
{
    return "functions, found by their names";
}

void *qblk_plugin_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return calloc(1, SIZE);
}

void qblk_plugin_close(void *handle)
{
    free(handle);
}

int64_t qblk_plugin_get_size(void *handle)
{
    (void)handle;
    return SIZE;
}

int qblk_plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset)
{
    memcpy(buf, (char *)handle + offset, count);
    return 0;
}

/* The one with flags is called where there are both. */
int qblk_plugin_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset)
{
    (void)handle, (void)buf, (void)count, (void)offset;
    return -EDOM;
}

int qblk_plugin_pwrite2(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)flags;
    memcpy((char *)handle + offset, buf, count);
    return 0;
}
