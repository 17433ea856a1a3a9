/* Does nothing: what a call costs that ends here is what it costs to get here. */
#define QBLK_API_VERSION 2
#include <qblk-plugin.h>

static void *empty_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return QBLK_PLUGIN_NO_HANDLE;
}

static int64_t empty_get_size(void *handle)
{
    (void)handle;
    return INT64_C(1) << 40;
}

/* Found by the bench, too, which calls it without anything between. */
QBLK_PLUGIN_EXPORT_ int bench_pread(void *handle, void *buf, uint64_t count, uint64_t offset,
                                    uint32_t flags);
int bench_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)buf, (void)count, (void)offset, (void)flags;
    return 0;
}

static qblk_plugin empty = {
    .thread_model = QBLK_THREAD_PARALLEL,
    .name = "empty",
    .open = empty_open,
    .get_size = empty_get_size,
    .pread = bench_pread,
};

QBLK_PLUGIN_REGISTER(empty)
