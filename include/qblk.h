/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libqblk: disk images and block devices inside your own process.
 *
 * Written by cbindgen from src/capi/: change that, then run `make header`.
 *
 * In all functions:
 *
 *   result    0 or a count on success, a negative code on failure: -errno for the system's
 *             errors, QBLK_E... (below -4095) for the library's own. errno says nothing.
 *   text      qblk_get_error() tells the thread's last failure in full.
 *   data      a call moves all bytes and returns 0, or fails; there are no short counts.
 *             Sizes and offsets are bytes, and any offset and count work on any device.
 *   NULL      where the call needs something: -EINVAL. So is a flag without a meaning.
 *   threads   every function may be called from any thread at any time, and two calls on one
 *             device run side by side. Only close and free must be the last call on a handle.
 *   fork      a child may close what it inherited; all other calls there answer -ECHILD.
 *             What it runs by exec inherits no descriptor.
 *   signals   no call fails with -EINTR, and none raises SIGPIPE.
 *   end       what is open when the program ends is flushed and closed for it.
 */
#ifndef QBLK_H
#define QBLK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#if defined(__cplusplus) && __cplusplus >= 201103L
#define QBLK_STATIC_ASSERT(cond, msg) static_assert(cond, msg)
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
#define QBLK_STATIC_ASSERT(cond, msg) _Static_assert(cond, msg)
#else
#define QBLK_CAT_(a, b) a##b
#define QBLK_CAT(a, b) QBLK_CAT_(a, b)
#define QBLK_STATIC_ASSERT(cond, msg) \
    extern char QBLK_CAT(qblk_assert_line_, __LINE__)[(cond) ? 1 : -1]
#endif

#ifdef __cplusplus
extern "C" {
#endif

/**
 * The image contradicts its format.
 */
#define QBLK_ECORRUPT -5001

/**
 * Not an image of that format.
 */
#define QBLK_EFORMAT -5002

/**
 * The image needs a feature that this build lacks; qblk_get_error() names it.
 */
#define QBLK_EUNSUPPORTED -5003

/**
 * Another process or handle has it.
 */
#define QBLK_ELOCKED -5004

/**
 * The image is encrypted, and no key was given.
 */
#define QBLK_ENEEDKEY -5005

/**
 * The key does not open the image.
 */
#define QBLK_EBADKEY -5006

/**
 * An NBD peer broke the protocol.
 */
#define QBLK_EPROTO -5007

/**
 * The open policy forbids it; qblk_get_error() says what would allow it.
 */
#define QBLK_EPOLICY -5008

/**
 * A defect inside libqblk was met and contained. The device answers so from then on.
 */
#define QBLK_EINTERNAL -5009

/**
 * qblk_open(): write too. Without it the file is opened read-only and nothing on disk changes.
 */
#define QBLK_OPEN_RDWR 1

/**
 * qblk_open(): do not open what the image is backed by; its holes read as zeroes.
 */
#define QBLK_OPEN_NO_BACKING 2

/**
 * qblk_open(): read the header and stop. Touches one file, takes no lock, works on images whose
 * features this build lacks; data calls answer -EBADF.
 */
#define QBLK_OPEN_INFO_ONLY 4

/**
 * qblk_open(): the image is hostile. The option "format" must be given, nothing that the image
 * names is opened, limits are tight.
 */
#define QBLK_OPEN_UNTRUSTED 8

/**
 * qblk_open(): read whatever others do meanwhile; what is read may change. Read-only opens only.
 */
#define QBLK_OPEN_SHARED 16

/**
 * qblk_open(): no locks at all.
 */
#define QBLK_OPEN_NO_LOCK 32

/**
 * qblk_open(): bypass the page cache (O_DIRECT). Any offset, count and memory still work.
 */
#define QBLK_OPEN_DIRECT 64

/**
 * qblk_open(): for qblk_check() only. Opens images that are too damaged to be opened otherwise (marked
 * as corrupt, with a broken refcount table...), nothing but the image's own file, and needs no key.
 * Data calls answer -EBADF. With QBLK_OPEN_RDWR it can be repaired.
 */
#define QBLK_OPEN_CHECK 128

/**
 * qblk_check(): give back space that nothing uses.
 */
#define QBLK_CHECK_REPAIR_LEAKS 1

/**
 * qblk_check(): repair all that can be repaired.
 */
#define QBLK_CHECK_REPAIR_ALL 3

/**
 * A request: return when this write is on stable storage.
 */
#define QBLK_REQ_FUA 1

/**
 * A request: zeroing may leave a hole.
 */
#define QBLK_REQ_MAY_TRIM 2

/**
 * A request: fail with -ENOTSUP at once rather than write zeroes.
 */
#define QBLK_REQ_FAST_ZERO 4

/**
 * qblk_resize(): the new size may be less than the present one; the bytes beyond it are lost.
 */
#define QBLK_RESIZE_SHRINK 1

/**
 * qblk_copy(): only what the source itself has, not what shows from images below it.
 */
#define QBLK_COPY_SHALLOW 1

/**
 * qblk_commit(): the image keeps what it has.
 */
#define QBLK_COMMIT_KEEP 1

/**
 * qblk_rebase(): only the name is changed, nothing is copied.
 */
#define QBLK_REBASE_UNSAFE 1

/**
 * qblk_info.state: this handle does not write.
 */
#define QBLK_STATE_READ_ONLY 1

/**
 * qblk_info.state: the image is marked as not closed cleanly.
 */
#define QBLK_STATE_DIRTY 2

/**
 * qblk_info.state: the image is marked as corrupt.
 */
#define QBLK_STATE_CORRUPT 4

/**
 * qblk_info.state: its data is encrypted.
 */
#define QBLK_STATE_ENCRYPTED 8

/**
 * qblk_info.state: it names a backing image.
 */
#define QBLK_STATE_HAS_BACKING 16

/**
 * qblk_info.state: its data lies in another file.
 */
#define QBLK_STATE_HAS_DATA_FILE 32

/**
 * qblk_info.state: the format was found by probing.
 */
#define QBLK_STATE_PROBED 64

/**
 * qblk_info.state: it is locked, by this handle or (QBLK_OPEN_INFO_ONLY) by anybody.
 */
#define QBLK_STATE_LOCKED 128

/**
 * qblk_info.state: the medium turns.
 */
#define QBLK_STATE_ROTATIONAL 256

/**
 * qblk_info.can_...: not at all.
 */
#define QBLK_CAN_NOT 0

/**
 * qblk_info.can_...: by other requests.
 */
#define QBLK_CAN_EMULATE 1

/**
 * qblk_info.can_...: by itself.
 */
#define QBLK_CAN_NATIVE 2

/**
 * qblk_extent.flags: in this image, not in one below. Set for depth 0 only.
 */
#define QBLK_EXTENT_ALLOCATED 1

/**
 * qblk_extent.flags: reads as zeroes.
 */
#define QBLK_EXTENT_ZERO 2

/**
 * qblk_extent.flags: bytes are kept for it.
 */
#define QBLK_EXTENT_DATA 4

/**
 * qblk_extent.flags: kept compressed.
 */
#define QBLK_EXTENT_COMPRESSED 8

/**
 * qblk_extent.flags: host_offset is valid.
 */
#define QBLK_EXTENT_HOST 16

/**
 * qblk_extent.flags, of qblk_extents2(): dirty in the bitmap that was asked for.
 */
#define QBLK_EXTENT_DIRTY 32

/**
 * qblk_set_log(): something failed, and nobody could be told otherwise.
 */
#define QBLK_LOG_ERROR 1

/**
 * qblk_set_log(): something is not as it should be.
 */
#define QBLK_LOG_WARN 2

/**
 * qblk_set_log(): what is done, once per open or close.
 */
#define QBLK_LOG_INFO 3

/**
 * qblk_set_log(): why it is done.
 */
#define QBLK_LOG_DEBUG 4

/**
 * qblk_set_log(): every request.
 */
#define QBLK_LOG_TRACE 5

/**
 * Size of a qblk_info in bytes, for ever.
 */
#define QBLK_INFO_SIZE 256

/**
 * The header's version, as three numbers. qblk_version() is that of the library that is loaded.
 */
#define QBLK_VERSION_MAJOR 0

/**
 * The header's version, second number.
 */
#define QBLK_VERSION_MINOR 1

/**
 * The header's version, third number.
 */
#define QBLK_VERSION_MICRO 0

/**
 * The header's version as one number, to compare with qblk_version().
 */
#define QBLK_VERSION (((QBLK_VERSION_MAJOR << 24) | (QBLK_VERSION_MINOR << 16)) | QBLK_VERSION_MICRO)

/**
 * Size of a qblk_bitmap in bytes, for ever.
 */
#define QBLK_BITMAP_SIZE 1152

/**
 * qblk_bitmap.flags: writes are noted in it.
 */
#define QBLK_BITMAP_ENABLED 1

/**
 * qblk_bitmap.flags: it is inconsistent, for it was in use and never saved (the program that had it
 * was killed, or another writes the image now). It can be removed, and nothing else.
 */
#define QBLK_BITMAP_IN_USE 2

/**
 * qblk_bitmap.flags: it is kept in the image.
 */
#define QBLK_BITMAP_PERSISTENT 4

/**
 * qblk_bitmap_add(): writes are not noted in it until qblk_bitmap_enable().
 */
#define QBLK_BITMAP_DISABLED 1

/**
 * qblk_extents2(): tell of QBLK_EXTENT_DIRTY only, not of where bytes are.
 */
#define QBLK_EXTENTS_BITMAP 1

/**
 * qblk_server_add_export(): clients can not write to it.
 */
#define QBLK_EXPORT_RDONLY 1

/**
 * qblk_plugin.passes: reading goes to what qblk_layer_set_next() was given.
 */
#define QBLK_METHOD_READ 1

/**
 * qblk_plugin.passes: so does writing.
 */
#define QBLK_METHOD_WRITE 2

/**
 * qblk_plugin.passes: so does flushing.
 */
#define QBLK_METHOD_FLUSH 4

/**
 * qblk_plugin.passes: so does trimming.
 */
#define QBLK_METHOD_TRIM 8

/**
 * qblk_plugin.passes: so does zeroing.
 */
#define QBLK_METHOD_ZERO 16

/**
 * qblk_plugin.passes: so does bringing near.
 */
#define QBLK_METHOD_CACHE 32

/**
 * qblk_plugin.passes: so do descriptions of ranges.
 */
#define QBLK_METHOD_EXTENTS 64

#define QBLK_HAVE_VERSION 1

#define QBLK_HAVE_VERSION_STRING 1

#define QBLK_HAVE_SUPPORTS 1

#define QBLK_HAVE_STRERROR 1

#define QBLK_HAVE_GET_ERROR 1

#define QBLK_HAVE_SET_LOG 1

#define QBLK_HAVE_OPTIONS_NEW 1

#define QBLK_HAVE_OPTIONS_SET 1

#define QBLK_HAVE_OPTIONS_FREE 1

#define QBLK_HAVE_OPEN 1

#define QBLK_HAVE_OPEN2 1

#define QBLK_HAVE_OPEN_FD 1

#define QBLK_HAVE_CLOSE 1

#define QBLK_HAVE_CONTEXT_OPEN 1

#define QBLK_HAVE_REOPEN 1

#define QBLK_HAVE_REOPEN2 1

#define QBLK_HAVE_LAYER_PUSH 1

#define QBLK_HAVE_PREAD 1

#define QBLK_HAVE_PREAD2 1

#define QBLK_HAVE_PWRITE 1

#define QBLK_HAVE_PWRITE2 1

#define QBLK_HAVE_PREADV 1

#define QBLK_HAVE_PWRITEV 1

#define QBLK_HAVE_FLUSH 1

#define QBLK_HAVE_ZERO 1

#define QBLK_HAVE_TRIM 1

#define QBLK_HAVE_CACHE 1

#define QBLK_HAVE_GET_INFO 1

#define QBLK_HAVE_GET_PROPERTY 1

#define QBLK_HAVE_EXTENTS 1

#define QBLK_HAVE_CREATE 1

#define QBLK_HAVE_RESIZE 1

#define QBLK_HAVE_RESIZE2 1

#define QBLK_HAVE_CHECK 1

#define QBLK_HAVE_CHECK2 1

#define QBLK_HAVE_SERVER_NEW 1

#define QBLK_HAVE_SERVER_SET 1

#define QBLK_HAVE_SERVER_ADD_EXPORT 1

#define QBLK_HAVE_SERVER_ADD_EXPORT2 1

#define QBLK_HAVE_SERVER_REMOVE_EXPORT 1

#define QBLK_HAVE_SERVER_LISTEN 1

#define QBLK_HAVE_SERVER_LISTEN_FD 1

#define QBLK_HAVE_SERVER_SERVE_FD 1

#define QBLK_HAVE_SERVER_GET_URI 1

#define QBLK_HAVE_SERVER_WAIT 1

#define QBLK_HAVE_SERVER_STOP 1

#define QBLK_HAVE_SERVER_FREE 1

#define QBLK_HAVE_NBD_LIST 1

#define QBLK_HAVE_LOCK_MANAGER_LOAD 1

#define QBLK_HAVE_OPTIONS_SET_LOCK_MANAGER 1

#define QBLK_HAVE_LOCK_MANAGER_FREE 1

#define QBLK_HAVE_BLOCK_STATUS 1

#define QBLK_HAVE_BITMAP_LIST 1

#define QBLK_HAVE_BITMAP_ADD 1

#define QBLK_HAVE_BITMAP_REMOVE 1

#define QBLK_HAVE_BITMAP_ENABLE 1

#define QBLK_HAVE_BITMAP_DISABLE 1

#define QBLK_HAVE_BITMAP_CLEAR 1

#define QBLK_HAVE_BITMAP_MERGE 1

#define QBLK_HAVE_EXTENTS2 1

#define QBLK_HAVE_WRITE_COMPRESSED 1

#define QBLK_HAVE_COPY 1

#define QBLK_HAVE_COMMIT 1

#define QBLK_HAVE_REBASE 1

#define QBLK_HAVE_AMEND 1

#define QBLK_HAVE_SNAPSHOT_LIST 1

#define QBLK_HAVE_SNAPSHOT_CREATE 1

#define QBLK_HAVE_SNAPSHOT_APPLY 1

#define QBLK_HAVE_SNAPSHOT_DELETE 1

#define QBLK_HAVE_VMSTATE_WRITE 1

#define QBLK_HAVE_VMSTATE_READ 1

#define QBLK_HAVE_REGISTER_PLUGIN 1

#define QBLK_HAVE_UNREGISTER_PLUGIN 1

#define QBLK_HAVE_PLUGIN_SET_ERROR 1

#define QBLK_HAVE_PLUGIN_SET_ERROR_TEXT 1

#define QBLK_HAVE_PLUGIN_DEBUG_TEXT 1

#define QBLK_HAVE_PLUGIN_PARSE_SIZE 1

#define QBLK_HAVE_PLUGIN_PARSE_UINT64 1

#define QBLK_HAVE_PLUGIN_PARSE_BOOL 1

#define QBLK_HAVE_PLUGIN_ABSOLUTE_PATH 1

#define QBLK_HAVE_PLUGIN_ADD_EXTENT 1

#define QBLK_HAVE_PLUGIN_ADD_EXPORT 1

#define QBLK_HAVE_SOURCE_OPEN 1

#define QBLK_HAVE_LAYER_SET_NEXT 1

/**
 * An open block device: a context, an independent way into a source of bytes.
 *
 * Any number of threads may call on one handle at once, and their calls run side by side. Only
 * qblk_close() must be the last call on it.
 */
typedef struct qblk qblk;

/**
 * Where a plugin puts what it exports: see qblk_plugin_add_export().
 */
typedef struct qblk_export_list qblk_export_list;

/**
 * Where a plugin puts what it describes: see qblk_plugin_add_extent().
 */
typedef struct qblk_extent_list qblk_extent_list;

/**
 * A lock manager that was loaded: a shared object that decides who may have an image open. What one
 * has to be is told in qblk-lockmgr.h.
 */
typedef struct qblk_lock_manager qblk_lock_manager;

/**
 * key=value settings for a call. docs/options.md lists the keys.
 *
 * Any number of threads may use one at once. Only qblk_options_free() must be the last.
 */
typedef struct qblk_options qblk_options;

/**
 * What a plugin fills: see qblk-plugin.h.
 */
typedef struct qblk_plugin qblk_plugin;

/**
 * An NBD server inside the process. Any number of them may live at once.
 *
 * Any number of threads may call on one at once. Only qblk_server_free() must be the last. A server
 * has threads of its own, which no signal of the program reaches.
 */
typedef struct qblk_server qblk_server;

/**
 * What a layer stands on: contexts are opened on it by qblk_source_open(). It is the library's, and there
 * from the call of the layer's function open_layer until its function close has returned.
 */
typedef struct qblk_source qblk_source;

/**
 * Receives messages; see qblk_set_log().
 *
 * `message` is one line of UTF-8, valid during the call. The function may be called from any
 * thread, from several at once. It must return: neither throw a C++ exception nor longjmp().
 */
typedef void (*qblk_log_fn)(void *opaque, int level, const char *message);

/**
 * What qblk_get_info() tells. 256 bytes for ever; later versions give reserved bytes a meaning.
 */
typedef struct qblk_info {
    /**
     * Bytes.
     */
    uint64_t size;
    /**
     * Bytes in use on the host; UINT64_MAX = not known.
     */
    uint64_t allocated;
    /**
     * Bytes in one request; 0 = no limit. Larger ones are cut by the library.
     */
    uint64_t max_transfer;
    /**
     * Bytes that requests are best multiples of; 1 = any.
     */
    uint32_t request_alignment;
    /**
     * Bytes that a request is best a multiple of.
     */
    uint32_t optimal_io_size;
    /**
     * Bytes; 0 = none.
     */
    uint32_t cluster_size;
    /**
     * Images below this one.
     */
    uint32_t backing_depth;
    /**
     * Bits of QBLK_STATE_...
     */
    uint32_t state;
    /**
     * QBLK_CAN_...: flush.
     */
    uint8_t can_flush;
    /**
     * QBLK_CAN_...: QBLK_REQ_FUA.
     */
    uint8_t can_fua;
    /**
     * QBLK_CAN_...: trim.
     */
    uint8_t can_trim;
    /**
     * QBLK_CAN_...: zero.
     */
    uint8_t can_zero;
    /**
     * QBLK_CAN_...: zero with QBLK_REQ_FAST_ZERO.
     */
    uint8_t can_fast_zero;
    /**
     * QBLK_CAN_...: cache.
     */
    uint8_t can_cache;
    /**
     * QBLK_CAN_...: extents.
     */
    uint8_t can_extents;
    /**
     * QBLK_CAN_...: a flush through one context holds for what was written through all.
     */
    uint8_t can_multi_conn;
    /**
     * "qcow2", "raw"...; NUL-terminated.
     */
    char format[32];
    /**
     * What holds the bytes: "file", "mem"...; NUL-terminated.
     */
    char driver[32];
    /**
     * Zero.
     */
    uint8_t reserved[140];
} qblk_info;

/**
 * A run of bytes of a device that are alike. 48 bytes for ever.
 */
typedef struct qblk_extent {
    /**
     * Where it begins on the device, bytes.
     */
    uint64_t offset;
    /**
     * Bytes.
     */
    uint64_t length;
    /**
     * Where it begins in the file that holds it, bytes; only with QBLK_EXTENT_HOST.
     */
    uint64_t host_offset;
    /**
     * Bits of QBLK_EXTENT_...
     */
    uint32_t flags;
    /**
     * 0 = this image, 1 = its backing image...
     */
    uint32_t depth;
    /**
     * Zero.
     */
    uint8_t reserved[16];
} qblk_extent;

/**
 * A run of bytes that a meta context says the same of. 16 bytes for ever.
 */
typedef struct qblk_status {
    /**
     * Bytes.
     */
    uint64_t length;
    /**
     * What it means is the context's to say: of "base:allocation", 1 is a hole and 2 reads as zeroes;
     * of "qemu:allocation-depth" it is the depth; of "qemu:dirty-bitmap:NAME", 1 is dirty.
     */
    uint64_t flags;
} qblk_status;

/**
 * What qblk_bitmap_list() tells of a dirty bitmap. 1152 bytes for ever.
 */
typedef struct qblk_bitmap {
    /**
     * Its name, NUL-terminated: at most 1023 bytes, in no encoding that would be known.
     */
    char name[1024];
    /**
     * Bytes of the device that one bit stands for.
     */
    uint64_t granularity;
    /**
     * Bytes of the device that are dirty; UINT64_MAX = not known.
     */
    uint64_t dirty;
    /**
     * Bits of QBLK_BITMAP_...
     */
    uint32_t flags;
    /**
     * Zero.
     */
    uint8_t reserved[108];
} qblk_bitmap;

/**
 * What qblk_check() found. 128 bytes for ever; later versions give reserved bytes a meaning.
 */
typedef struct qblk_check_result {
    /**
     * Places found that contradict the format, or at which data is or will be lost.
     */
    uint64_t corruptions;
    /**
     * Clusters found that are counted as in use more often than they are: space that is lost.
     */
    uint64_t leaks;
    /**
     * How many of the corruptions were repaired; the rest is still there.
     */
    uint64_t corruptions_fixed;
    /**
     * How many of the leaks were repaired; the rest is still there.
     */
    uint64_t leaks_fixed;
    /**
     * Places that could not be looked at or repaired: what they hide is not in the numbers above.
     */
    uint64_t check_errors;
    /**
     * Where the last part of the file that is in use ends, bytes.
     */
    uint64_t image_end;
    /**
     * Clusters of the disk.
     */
    uint64_t total_clusters;
    /**
     * Those of them that this image has.
     */
    uint64_t allocated_clusters;
    /**
     * Those of them that are compressed.
     */
    uint64_t compressed_clusters;
    /**
     * Those that do not lie behind the one before them.
     */
    uint64_t fragmented_clusters;
    /**
     * Zero.
     */
    uint8_t reserved[48];
} qblk_check_result;

/**
 * Is told how far long work is: `done` of `total`, in a unit of the work's own; `total` may grow.
 *
 * What is returned decides: 0 = go on, anything else = stop, and the call answers -ECANCELED, with
 * the image whole. The function is called from one thread at a time, which need not be the caller's;
 * it must return (neither throw a C++ exception nor longjmp()) and call nothing on the same device.
 */
typedef int (*qblk_progress_fn)(void *opaque, uint64_t done, uint64_t total);

/**
 * An internal snapshot. 512 bytes for ever; later versions give reserved bytes a meaning.
 */
typedef struct qblk_snapshot {
    /**
     * What names it alone; NUL-terminated, cut if it is longer.
     */
    char id[128];
    /**
     * What people call it; NUL-terminated, cut if it is longer.
     */
    char name[256];
    /**
     * Bytes of the machine's state that it keeps; 0 = none.
     */
    uint64_t vm_state_size;
    /**
     * Bytes that the disk had.
     */
    uint64_t disk_size;
    /**
     * When it was made: seconds since 1970.
     */
    uint64_t date_sec;
    /**
     * And nanoseconds.
     */
    uint32_t date_nsec;
    /**
     * Zero.
     */
    uint32_t reserved0;
    /**
     * How long the machine had run, nanoseconds.
     */
    uint64_t vm_clock_nsec;
    /**
     * Instructions that it had executed; UINT64_MAX = not known.
     */
    uint64_t icount;
    /**
     * Zero.
     */
    uint8_t reserved[80];
} qblk_snapshot;

/**
 * Receives what qblk_nbd_list() finds: the name and the description of an export, valid during the
 * call. Anything but 0 ends the list.
 */
typedef int (*qblk_nbd_list_fn)(void *opaque, const char *name, const char *description);

/**
 * The version of the library that is loaded: major << 24 | minor << 16 | micro.
 *
 * Cannot fail. Any thread. Since 0.1.
 */
uint32_t qblk_version(void);

/**
 * The version of the library that is loaded, as text: "0.1.0". Valid for ever.
 *
 * Cannot fail. Any thread. Since 0.1.
 */
const char *qblk_version_string(void);

/**
 * Whether the library that is loaded can do `feature`: 1 or 0.
 *
 * Features are named "format:qcow2", "format:raw", "format:luks", "encrypt:luks", "compress:zlib",
 * "compress:zstd", "io:mmap", "mem", "file", "bitmaps", "nbd:client", "nbd:server", "nbd:tls",
 * "layers", "plugins". What it does not know, and NULL, is 0.
 *
 * Cannot fail. Any thread. Since 0.1.
 */
int qblk_supports(const char *feature);

/**
 * The fixed text of a code that a call answered: one of QBLK_E..., or -errno. Valid for ever.
 *
 * 0 and above are "success". It never answers NULL. qblk_get_error() tells more.
 *
 * Cannot fail. Any thread. Since 0.1.
 */
const char *qblk_strerror(int code);

/**
 * This thread's last failure in full: function, file, what was found, what was expected.
 *
 * UTF-8, at most 1023 bytes. Texts that come from an image or a peer stand in quotes, with
 * control characters escaped. Each call that can fail clears it first; it is "" then, never NULL.
 * The text is valid until this thread's next call that can fail.
 *
 * Cannot fail. Since 0.1.
 */
const char *qblk_get_error(void);

/**
 * Send the library's messages to `fn`, with `opaque`; NULL sends them nowhere.
 *
 * `level` is the least grave kind of message wanted, QBLK_LOG_ERROR to QBLK_LOG_TRACE. When the
 * call returns, the function that was there before is called no more. The environment
 * variable QBLK_LOG (error, warn, info, debug, trace) logs to stderr until this is called.
 *
 * Returns 0; -EINVAL for an unknown level; -EDEADLK from inside such a function, which may make
 * all other calls (what these would log is left out). Any thread. Since 0.1.
 */
int qblk_set_log(qblk_log_fn fn, void *opaque, int level);

/**
 * Make an empty set of options, for qblk_options_set(). Free it with qblk_options_free().
 *
 * Returns 0 and the options in `*out`; -EINVAL if `out` is NULL. Any thread. Since 0.1.
 */
int qblk_options_new(struct qblk_options **out);

/**
 * Set `key` to a copy of `value`; a NULL value removes the key.
 *
 * Keys are lower case with hyphens; an underscore is the same as a hyphen. The call that uses the
 * options is the one that refuses a key which it does not know or has no use for. A value may
 * hold any bytes (a file's name does).
 *
 * Returns 0; -EINVAL if `o` or `key` is NULL. Any thread. Since 0.1.
 */
int qblk_options_set(struct qblk_options *o,
                     const char *key,
                     const char *value);

/**
 * Free options; NULL does nothing. No call may be using them.
 *
 * Cannot fail. Any thread, also in a child of fork. Since 0.1.
 */
void qblk_options_free(struct qblk_options *o);

/**
 * Open the device `name`: qblk_open2() without options.
 *
 * Since 0.1.
 */
int qblk_open(const char *name, uint32_t flags, struct qblk **out);

/**
 * Open the device `name`, with `options` (NULL: none) and flags (QBLK_OPEN_...).
 *
 * `name` is a path, "file:PATH" (needed when a path begins like a URI), "mem:SIZE" (memory that
 * begins as zeroes and goes when it is closed), an NBD URI ("nbd://HOST:PORT/EXPORT",
 * "nbd+unix:///EXPORT?socket=PATH", "nbd+vsock://CID:PORT/EXPORT"; "nbds..." with TLS),
 * "nbd+exec:///EXPORT" (a server that is started: option "argv"), or a plugin ("plugin:PATH?KEY=VALUE&...",
 * "plugin:NAME" of one that was registered; see qblk-plugin.h). It need not be UTF-8. Without the
 * option "format" the format is found by probing; a raw image found so refuses a write that would make
 * its first sector look like another format.
 *
 * Returns 0 and the device in `*out`, to be closed with qblk_close(). On failure `*out` is
 * NULL, and the code is -EINVAL (a NULL, an unknown flag, an unknown option or one that has no use
 * here, QBLK_OPEN_UNTRUSTED without a format), the system's (-ENOENT, -EACCES, -EISDIR...),
 * QBLK_EFORMAT, QBLK_ECORRUPT, QBLK_EUNSUPPORTED, QBLK_ELOCKED or QBLK_EPOLICY (a backing
 * chain that is a loop, or goes where it may not); of an NBD export also -ENOENT (no such export),
 * -ECONNREFUSED and others of connecting, -EACCES (TLS, or the server's policy), -EROFS (read-only,
 * opened for writing), QBLK_EPROTO. Any thread. Since 0.1.
 */
int qblk_open2(const char *name,
               const struct qblk_options *options,
               uint32_t flags,
               struct qblk **out);

/**
 * Open the file or block device behind the descriptor `fd`, as qblk_open2() opens a name; or, if it
 * is a connected socket, the export of the NBD server at its other end that the option "nbd.export"
 * names.
 *
 * The library works on a duplicate; `fd` stays the caller's and may be closed at once. For
 * QBLK_OPEN_RDWR a file must be open for writing. A socket is one connection, which can not be made
 * again when it is lost.
 *
 * Returns as qblk_open2(); -EBADF if `fd` is none. Any thread. Since 0.1.
 */
int qblk_open_fd(int fd,
                 const struct qblk_options *options,
                 uint32_t flags,
                 struct qblk **out);

/**
 * Flush and close a device. NULL is a success that does nothing.
 *
 * The handle is freed whatever the answer is. A device is closed with its last context.
 *
 * Returns 0; or the first failure to write that was not reported yet: what was written since the
 * last qblk_flush() may then be lost. In a child of fork it only frees, and answers 0.
 * Any thread, as the last call on this handle. Since 0.1.
 */
int qblk_close(struct qblk *dev);

/**
 * Open another context of the device that `dev` is a context of.
 *
 * It is a handle with its own flags (QBLK_OPEN_RDWR, QBLK_OPEN_SHARED, QBLK_OPEN_NO_LOCK) that
 * shares all state of the image: what one writes, the other reads. Closing one leaves the other
 * working. `options` may be NULL.
 *
 * Returns 0 and the context in `*out`; on failure `*out` is NULL: -EROFS for QBLK_OPEN_RDWR on
 * a device that is not open for writing, -EINVAL for other flags and for options that have no
 * use here. Any thread. Since 0.1.
 */
int qblk_context_open(struct qblk *dev,
                      const struct qblk_options *options,
                      uint32_t flags,
                      struct qblk **out);

/**
 * Open the device anew with other flags, beneath the handle and all its contexts: qblk_reopen2()
 * with the options that it was opened with.
 *
 * Since 0.1.
 */
int qblk_reopen(struct qblk *dev,
                uint32_t flags);

/**
 * Open the device anew with other options and flags, beneath the handle and all its contexts.
 *
 * The new one is opened first; calls on the device wait meanwhile. NULL options are those that
 * it was opened with. A device that refuses writes because a flush failed takes them again.
 *
 * A device that was opened by descriptor is opened anew by a duplicate of it.
 *
 * Returns 0; on failure, as qblk_open2(), all stays as it was. Any thread. Since 0.1.
 */
int qblk_reopen2(struct qblk *dev, const struct qblk_options *options, uint32_t flags);

/**
 * Read `count` bytes at `offset` into `buf`: all of them, or none that counts and an error.
 *
 * `count` and `offset` are bytes; any values inside the device do. `buf` may be NULL if `count`
 * is 0.
 *
 * Returns 0; -EINVAL for a NULL, and for a range that leaves the device (`buf` is not touched
 * then); -EBADF on a handle that is open for its description only; -EIO and other codes of the
 * system; QBLK_ECORRUPT. Any thread. Since 0.1.
 */
int qblk_pread(struct qblk *dev, void *buf, size_t count, uint64_t offset);

/**
 * qblk_pread() with flags; there are none yet, so `flags` must be 0.
 *
 * Since 0.1.
 */
int qblk_pread2(struct qblk *dev, void *buf, size_t count, uint64_t offset, uint32_t flags);

/**
 * Write `count` bytes of `buf` at `offset`: qblk_pwrite2() without flags.
 *
 * Since 0.1.
 */
int qblk_pwrite(struct qblk *dev, const void *buf, size_t count, uint64_t offset);

/**
 * Write `count` bytes of `buf` at `offset`: all of them, or an error.
 *
 * `count` and `offset` are bytes; any values inside the device do. `buf` may be NULL if `count`
 * is 0. The one flag is QBLK_REQ_FUA: return when the bytes are on stable storage.
 *
 * Returns 0; -EINVAL for a NULL, another flag, and a range that leaves the device (nothing
 * changes then); -EROFS on a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its
 * description only; -ENOSPC and -EFBIG when the image can grow no further; -EIO and other
 * codes of the system, also after a flush has failed; QBLK_ECORRUPT; QBLK_EPOLICY (see
 * qblk_open2()). After an error the range may hold a part of the new bytes. Any thread. Since 0.1.
 */
int qblk_pwrite2(struct qblk *dev,
                 const void *buf,
                 size_t count,
                 uint64_t offset,
                 uint32_t flags);

/**
 * qblk_pread2() into `iovcnt` pieces of memory, one after the other.
 *
 * `iov` may be NULL if `iovcnt` is 0, and so may the base of a piece whose length is 0.
 *
 * Returns as qblk_pread(); -EINVAL also for an `iovcnt` below 0 or above 65536, and for lengths
 * whose sum overflows. Any thread. Since 0.1.
 */
int qblk_preadv(struct qblk *dev,
                const struct iovec *iov,
                int iovcnt,
                uint64_t offset,
                uint32_t flags);

/**
 * qblk_pwrite2() from `iovcnt` pieces of memory, one after the other.
 *
 * Returns as qblk_pwrite2(); -EINVAL also where qblk_preadv() answers it. Any thread. Since 0.1.
 */
int qblk_pwritev(struct qblk *dev,
                 const struct iovec *iov,
                 int iovcnt,
                 uint64_t offset,
                 uint32_t flags);

/**
 * Make everything that was written survive a power cut.
 *
 * Returns 0; -EIO and other codes of the system. A failed flush is told to every context of the
 * device, which refuses writes until qblk_reopen(): what was written before may be lost.
 * -EBADF on a handle that is open for its description only. Any thread. Since 0.1.
 */
int qblk_flush(struct qblk *dev);

/**
 * Make `count` bytes at `offset` read as zeroes, without writing them where that is possible.
 *
 * Note the order of the arguments. Flags: QBLK_REQ_MAY_TRIM (the space may be given back),
 * QBLK_REQ_FAST_ZERO (-ENOTSUP at once rather than write zeroes), QBLK_REQ_FUA.
 *
 * Returns as qblk_pwrite2(). Any thread. Since 0.1.
 */
int qblk_zero(struct qblk *dev, uint64_t count, uint64_t offset, uint32_t flags);

/**
 * Give the space of `count` bytes at `offset` back; what they hold matters no more.
 *
 * Note the order of the arguments. Each byte reads as before or as zero from then on, the same at
 * every read until it is written. The one flag is QBLK_REQ_FUA.
 *
 * Returns as qblk_pwrite2(). Any thread. Since 0.1.
 */
int qblk_trim(struct qblk *dev,
              uint64_t count,
              uint64_t offset,
              uint32_t flags);

/**
 * Bring `count` bytes at `offset` near, so that reading them soon is quick; a hint.
 *
 * Note the order of the arguments. There are no flags yet, so `flags` must be 0.
 *
 * Returns as qblk_pread(). Any thread. Since 0.1.
 */
int qblk_cache(struct qblk *dev, uint64_t count, uint64_t offset, uint32_t flags);

/**
 * Tell what the device is: fills `*info`, all 256 bytes of it.
 *
 * Works on any handle, also one that is open for its description only.
 *
 * Returns 0; -EINVAL for a NULL. Any thread. Since 0.1.
 */
int qblk_get_info(struct qblk *dev, struct qblk_info *info);

/**
 * Tell the property `key` of the device, as text in `buf`.
 *
 * Keys: "filename", "backing-filename", "backing-format", "data-file", and the format's own
 * ("qcow2.compat"...). "properties" lists those that this device has, a line each. `size` is that
 * of `buf` in bytes, with room for the NUL that ends the text; `buf` may be NULL if it is 0.
 *
 * Returns the length of the value in bytes without the NUL, 0 if it is empty; as with snprintf(),
 * a result of `size` or more means that the text was cut. -ENOENT for a key that this device
 * does not have; -EINVAL for a NULL. Any thread. Since 0.1.
 */
int64_t qblk_get_property(struct qblk *dev,
                          const char *key,
                          char *buf,
                          size_t size);

/**
 * Tell where the bytes from `offset` on live: fills `out` with at most `max` extents, which begin
 * at `offset` and follow one another without gaps. Neighbours that are alike are one extent.
 *
 * They cover `count` bytes, or fewer when `max` is too small; go on from where the last one ends.
 * There are no flags yet, so `flags` must be 0. `out` may be NULL if `max` is 0. What has changed is
 * told by qblk_extents2().
 *
 * Returns how many were filled; -EINVAL for a NULL, a flag, a range that leaves the device; -EBADF
 * on a handle that is open for its description only; codes of reading. Any thread. Since 0.1.
 */
int64_t qblk_extents(struct qblk *dev,
                     uint64_t count,
                     uint64_t offset,
                     uint32_t flags,
                     struct qblk_extent *out,
                     size_t max);

/**
 * Tell what a meta context of the NBD server behind `dev` says of a range (or, of an image that has
 * dirty bitmaps, what "qemu:dirty-bitmap:NAME" would be): fills `out` with at most
 * `max` runs, which begin at `offset` and follow one another.
 *
 * `context` is "base:allocation", "qemu:allocation-depth", or one that the option "nbd.contexts" asked
 * for at open. They cover `count` bytes, or fewer; go on from where the last one ends. There are no
 * flags yet, so `flags` must be 0. `out` may be NULL if `max` is 0.
 *
 * Returns how many were filled; -EINVAL for a NULL, a flag, a range that leaves the device; -ENOTSUP
 * if this is no NBD export, or the server does not have the context; codes of reading. Any thread.
 * Since 0.1.
 */
int64_t qblk_block_status(struct qblk *dev,
                          const char *context,
                          uint64_t count,
                          uint64_t offset,
                          uint32_t flags,
                          struct qblk_status *out,
                          size_t max);

/**
 * List the dirty bitmaps of the device: fills `out` with the first `max` of them.
 *
 * Bitmaps are counted as far as that is quick (64 MiB of them are read); on a handle that is open for
 * its description only none is. A device that can have none has none. `out` may be NULL if `max`
 * is 0.
 *
 * Returns how many bitmaps there are, which may be more than `max`; -EINVAL for a NULL; QBLK_ECORRUPT
 * if what the image says of its bitmaps contradicts the format; codes of reading. Any thread.
 * Since 0.1.
 */
int64_t qblk_bitmap_list(struct qblk *dev,
                         struct qblk_bitmap *out,
                         size_t max);

/**
 * Add a dirty bitmap `name`, in which nothing is dirty. It is kept in the image, a qcow2 one of
 * version 3, and says what was changed since, through whichever program that knows bitmaps.
 *
 * `granularity` is how many bytes one bit stands for: a power of two from 512 to 2 GiB, 0 for 64 KiB.
 * Writes, zeroing and trims are noted in it from now on, before they happen, unless
 * QBLK_BITMAP_DISABLED is given.
 *
 * Returns 0; -EINVAL for a NULL, a name of none or more than 1023 bytes, a granularity that is none,
 * an unknown flag; -EEXIST; -EFBIG if it would have more than 512 MiB, or there are 65535; -EROFS on
 * a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its description only; -ENOTSUP
 * for a device that can have none; codes of writing. Any thread; other calls on the device may run
 * meanwhile. Since 0.1.
 */
int qblk_bitmap_add(struct qblk *dev,
                    const char *name,
                    uint64_t granularity,
                    uint32_t flags);

/**
 * Remove the dirty bitmap `name`, also one that is inconsistent.
 *
 * Returns 0; -EINVAL for a NULL; -ENOENT if there is none of that name; -EROFS on a handle without
 * QBLK_OPEN_RDWR; -EBADF on one that is open for its description only; -ENOTSUP for a device that
 * can have none; codes of writing. Any thread; other calls on the device may run meanwhile.
 * Since 0.1.
 */
int qblk_bitmap_remove(struct qblk *dev,
                       const char *name);

/**
 * Note what is changed from now on in the dirty bitmap `name`. One that is enabled stays so.
 *
 * Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
 * the device may run meanwhile. Since 0.1.
 */
int qblk_bitmap_enable(struct qblk *dev,
                       const char *name);

/**
 * Note nothing more in the dirty bitmap `name`. One that is disabled stays so.
 *
 * If it fails to be saved it is disabled all the same, and saved when the device is closed.
 *
 * Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
 * the device may run meanwhile. Since 0.1.
 */
int qblk_bitmap_disable(struct qblk *dev,
                        const char *name);

/**
 * Make nothing dirty in the dirty bitmap `name`. An enabled one notes all that is changed from the
 * return of this call on; what calls that run meanwhile change has happened by then.
 *
 * Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
 * the device may run meanwhile. Since 0.1.
 */
int qblk_bitmap_clear(struct qblk *dev,
                      const char *name);

/**
 * Make dirty in the bitmap `target` what is dirty in the bitmap `source`, which stays as it is. Their
 * granularities may differ.
 *
 * Returns 0; -ESTALE if one of them is inconsistent; codes of qblk_bitmap_remove(). Any thread;
 * other calls on the device may run meanwhile. Since 0.1.
 */
int qblk_bitmap_merge(struct qblk *dev,
                      const char *target,
                      const char *source);

/**
 * qblk_extents(), and what the dirty bitmap `bitmap` says: extents have QBLK_EXTENT_DIRTY where it is
 * dirty, and end where that ends.
 *
 * With QBLK_EXTENTS_BITMAP nothing else is told: `flags` of an extent are QBLK_EXTENT_DIRTY or 0, and
 * there are fewer of them. `bitmap` may be NULL without that flag: then this is qblk_extents(). Over
 * NBD a bitmap can be asked for whose context the option "nbd.contexts" named at open
 * ("qemu:dirty-bitmap:NAME").
 *
 * Returns how many were filled; -ENOENT if there is no bitmap of that name; -ESTALE if it is
 * inconsistent; -ENOTSUP for a device that can have none, or a server that does not tell of it; codes
 * of qblk_extents(). Any thread. Since 0.1.
 */
int64_t qblk_extents2(struct qblk *dev,
                      uint64_t count,
                      uint64_t offset,
                      const char *bitmap,
                      uint32_t flags,
                      struct qblk_extent *out,
                      size_t max);

/**
 * Make the image `name` of `format` ("qcow2", "raw") with `size` bytes, all zero.
 *
 * `options` (NULL: none) have the names and values of `qemu-img create -o`: "cluster-size",
 * "backing-file", "backing-fmt", "preallocation"..., and "exclusive" ("on" fails if the file
 * exists). A file that is in use is never overwritten, and no half file is left on failure.
 *
 * Returns 0; -EINVAL for a NULL, an unknown format, an option that is unknown, has no use here
 * or a value that it cannot have; -EEXIST with exclusive=on; -EFBIG for a size that the format
 * cannot have; QBLK_ELOCKED; QBLK_EUNSUPPORTED; the system's codes. Any thread. Since 0.1.
 */
int qblk_create(const char *name,
                const char *format,
                uint64_t size,
                const struct qblk_options *options);

/**
 * Change the size of the device to `size` bytes: qblk_resize2() without options.
 *
 * Since 0.1.
 */
int qblk_resize(struct qblk *dev, uint64_t size, uint32_t flags);

/**
 * Change the size of the device to `size` bytes; bytes that come into being read as zeroes.
 *
 * QBLK_RESIZE_SHRINK must be set for a size below the present one: the bytes beyond it are lost.
 * The one option is "preallocation" (off, metadata, falloc, full): what is done about room for
 * new bytes. `options` may be NULL.
 *
 * Returns 0; -EINVAL for a smaller size without the flag, another flag, an option that has no use
 * here; -EROFS on a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its description
 * only; -ENOTSUP for a device whose size is fixed; -EFBIG, -ENOSPC and other codes of the
 * system. Any thread; other calls on the device may run meanwhile. Since 0.1.
 */
int qblk_resize2(struct qblk *dev,
                 uint64_t size,
                 const struct qblk_options *options,
                 uint32_t flags);

/**
 * Write `count` bytes of `buf` at `offset` in compressed form, by the image's compression type.
 *
 * `offset` and `count` are bytes, and multiples of the cluster size (qblk_info), but for the image's
 * end, which may cut the last cluster. What there was before is replaced. A cluster that does not
 * get smaller is written as it is; compressed ones share clusters of the host. Compressing is done
 * by the calling thread, and several threads compress at once; qblk_copy() uses as many as there
 * are processors. A later qblk_pwrite() to such a cluster writes it out at full size.
 *
 * Returns 0; -ENOTSUP, with nothing written, for a format that has no compression, and for images
 * with encryption or an external data file; -EINVAL for a NULL, for parts of clusters, and for a
 * range that leaves the device; else as qblk_pwrite2(). Any thread. Since 0.1.
 */
int qblk_write_compressed(struct qblk *dev,
                          const void *buf,
                          size_t count,
                          uint64_t offset);

/**
 * Put a layer on the device: all of its contexts see it from then on.
 *
 * `layer` is the layer's name, with settings if need be ("offset;offset=1M;range=64k", as in the option
 * "layers"); `options` (NULL: none) are more of its settings, without the name in front. `flags` is 0.
 * Other calls on the device wait while the layer is opened. There is no way to take it off but closing
 * the device. A handle that may not write gets no right to by this; where the layer makes a device
 * writable that was not ("cow"), qblk_context_open() with QBLK_OPEN_RDWR makes one that may.
 *
 * Returns 0; on failure the device is what it was, and the code is -EINVAL (a NULL, a flag, no such layer,
 * a setting that it has not or that means nothing, too many layers), -EBADF on a handle that is open for
 * its description or to be checked only, or what opening the layer came to. Any thread. Since 0.1.
 */
int qblk_layer_push(struct qblk *dev,
                    const char *layer,
                    const struct qblk_options *options,
                    uint32_t flags);

/**
 * Check the image: qblk_check2() without progress.
 *
 * Since 0.1.
 */
int qblk_check(struct qblk *dev, uint32_t flags, struct qblk_check_result *result);

/**
 * Check the image (not those that it stands on), repair it if `flags` says so, and tell in `*result`
 * what was found and what was repaired.
 *
 * Flags: 0 = nothing is written; QBLK_CHECK_REPAIR_LEAKS = space that nothing uses is given back;
 * QBLK_CHECK_REPAIR_ALL = all is repaired that can be without losing data, also refcounts and their
 * tables, and the marks "dirty" and "corrupt" are taken away when nothing is wrong any more. What is
 * counted, and how, is as in `qemu-img check`. `progress` (NULL: nobody) is told how far it is, and
 * may stop it; the image is whole then, and no worse than before.
 *
 * On a device that is open for writing, other calls wait meanwhile. An image that can not be opened
 * otherwise is opened with QBLK_OPEN_CHECK. After a repair on another handle the device has been
 * opened anew; should that fail the code says why, and the handle is as if QBLK_OPEN_CHECK had been
 * given.
 *
 * Returns 0 if the check ran, whatever it found; -EINVAL for a NULL or another flag; -EROFS if it is to
 * repair through a handle that does not write; -EBADF on a handle that is open for its description
 * only; -ENOTSUP for a format without a check; -ECANCELED; QBLK_ECORRUPT for a header that says
 * nothing; QBLK_EUNSUPPORTED; codes of reading and writing. Any thread. Since 0.1.
 */
int qblk_check2(struct qblk *dev,
                uint32_t flags,
                qblk_progress_fn progress,
                void *opaque,
                struct qblk_check_result *result);

/**
 * Copy all bytes of the device `from` to the beginning of `to`, in parallel.
 *
 * What reads as zeroes is not read, and in `to` it is zeroed where it does not read so yet. `to` must
 * be open for writing and have at least as many bytes; what it has beyond those of `from` stays.
 * Both may be used meanwhile, but what is written to either then may be copied or not.
 * qblk_flush() makes the copy last.
 *
 * `options` may be NULL. They are "compress" (on: clusters are written in compressed form, as
 * qblk_write_compressed() does), "threads" (1 to 64; as many as there are processors), "sparse" (bytes:
 * the shortest run of zeroes in data that is not written as data, a multiple of 4096; 0 = zeroes are
 * written too; 4k), "target-is-zero" (on: `to` is known to read as zeroes) and "compare" (on: `to` is
 * read, and only what differs is written: for an overlay).
 *
 * The one flag is QBLK_COPY_SHALLOW: only what `from` has itself is copied, not what shows from images
 * below, which is left as it is in `to`: a copy of one image of a chain. `progress` (NULL: nobody)
 * is called by the calling thread, in bytes.
 *
 * Returns 0; -EINVAL for a NULL, another flag, an option that is unknown or has a value that it
 * cannot have, a `to` that is too small, is `from` or is part of its chain (nothing is written then);
 * -ECANCELED if `progress` said so; -ENOTSUP where compressed writes are not to be had; else as
 * qblk_pread() and qblk_pwrite2(). After an error a part may have been copied. Any thread. Since 0.1.
 */
int qblk_copy(struct qblk *from,
              struct qblk *to,
              const struct qblk_options *options,
              uint32_t flags,
              qblk_progress_fn progress,
              void *opaque);

/**
 * Write what the image has itself into its backing image, and empty it.
 *
 * The backing image, whatever its format, is opened for writing meanwhile, which nobody else may have
 * open; it grows if it is smaller. What is committed is on stable storage before the image is
 * emptied, and what the device reads is the same all the time. The one flag is QBLK_COMMIT_KEEP:
 * the image keeps what it has. `progress` (NULL: nobody) is called by the calling thread, in bytes.
 *
 * Other calls on the device wait until this has ended. Other overlays of the backing image read
 * otherwise afterwards.
 *
 * Returns 0; -EINVAL for a NULL, another flag, and where no backing image is open; -EROFS on a handle
 * without QBLK_OPEN_RDWR; QBLK_ELOCKED if somebody has the backing image; -ECANCELED if `progress` said
 * so; else as qblk_pread(), qblk_pwrite2() and qblk_resize(). After an error a part may have been
 * committed; the image itself is whole then. Any thread. Since 0.1.
 */
int qblk_commit(struct qblk *dev,
                uint32_t flags,
                qblk_progress_fn progress,
                void *opaque);

/**
 * Put another image below: the image names `backing` (NULL: none) as its backing file from now on.
 *
 * `backing` is a path, seen from the image's directory, and recorded as it is given. What would read
 * otherwise with it is copied into the image first and put on stable storage; then the header is
 * switched. So what the device reads stays the same, whenever the power is cut. With the flag
 * QBLK_REBASE_UNSAFE only the name is changed: for a backing file that was moved, or was replaced by one
 * that holds the same. Then it need not be there, if its format is given; if it can not be opened the
 * device goes on with the old one until it is closed.
 *
 * `options` may be NULL. They are "backing-fmt" (the format, which is found by probing now if it is not
 * given, and recorded) and "threads". `progress` (NULL: nobody) is called by the calling thread, in
 * bytes. Other calls on the device wait until this has ended.
 *
 * Returns 0; -EINVAL for a NULL, another flag, an option that has no use here, a name that is too long,
 * and on a device that was opened without its backing file; -ENOTSUP for a format that has none;
 * -EFBIG if the name does not fit into the header; -EROFS; -ECANCELED; QBLK_EPOLICY for an image that
 * would stand on itself; else as qblk_open2() and qblk_pwrite2(). After an error a part may have been
 * copied; the device reads the same. Any thread. Since 0.1.
 */
int qblk_rebase(struct qblk *dev,
                const char *backing,
                const struct qblk_options *options,
                uint32_t flags,
                qblk_progress_fn progress,
                void *opaque);

/**
 * Change what an image is like, as `options` say: all of it, or nothing.
 *
 * Of a qcow2 image: "compat" ("0.10" or "1.1"), "refcount-bits", "lazy-refcounts", "backing-file" and
 * "backing-fmt" (what is recorded; empty for none), "data-file-raw" ("off"), and its key slots:
 * "encrypt.state" ("active" adds a passphrase, "inactive" takes one away), "encrypt.new-secret",
 * "encrypt.old-secret", "encrypt.keyslot", "encrypt.iter-time", which change in a call of their own
 * (-EINVAL with the others). Of a LUKS image the same for key slots without "encrypt.". There are no
 * flags yet, so `flags` must be 0.
 *
 * `progress` (NULL: nobody) is told how far it is, with `opaque`, and may stop it: -ECANCELED. It is
 * on stable storage when the call returns; a power cut before leaves the image as it was. Calls of
 * other threads on the device wait meanwhile. Unless it was key slots that changed the image is opened
 * anew beneath the handle and all its contexts, as by qblk_reopen(); if only that fails the image is
 * amended, and the handle refuses to write until it is reopened.
 *
 * Returns 0; -EINVAL for a NULL, a flag, an option that has no use here or a value that it can not have
 * (refcounts too narrow for what there is, say); -ENOTSUP for a format that has nothing to amend;
 * QBLK_EUNSUPPORTED for a version that lacks what the image has; QBLK_ENEEDKEY and QBLK_EBADKEY;
 * -EROFS on a handle without QBLK_OPEN_RDWR; -ENOSPC and other codes of the system; QBLK_ECORRUPT;
 * as qblk_reopen(). Any thread. Since 0.1.
 */
int qblk_amend(struct qblk *dev,
               const struct qblk_options *options,
               uint32_t flags,
               qblk_progress_fn progress,
               void *opaque);

/**
 * List the image's internal snapshots: fills `out` with the first `max` of them, in the order of the
 * image's table. `out` may be NULL if `max` is 0.
 *
 * Works on any handle, also one that is open for its description only.
 *
 * Returns how many there are, which may be more than `max`; -ENOTSUP for a format without snapshots;
 * -EINVAL for a NULL; QBLK_ECORRUPT for a table that is no such; codes of reading. Any thread.
 * Since 0.1.
 */
int64_t qblk_snapshot_list(struct qblk *dev,
                           struct qblk_snapshot *out,
                           size_t max);

/**
 * Keep the state of the disk as it is now in an internal snapshot `name`, and with it what was written
 * by qblk_vmstate_write() since the last one, which is not in the active image any more then.
 *
 * `options` (NULL: none): "id" (a text that names it alone; without it the next number), "date" (seconds
 * since 1970, with a fraction; without it now), "vm-clock" (nanoseconds), "icount". There are no flags
 * yet, so `flags` must be 0. It is on stable storage when the call returns; a power cut before leaves
 * the image as it was. Calls of other threads on the device wait meanwhile; what they wrote before
 * is in the snapshot.
 *
 * Returns 0; -EEXIST if the name or the ID is taken; -EINVAL for a NULL, a name that is empty or has more
 * than 255 bytes, an ID of more than 127, an option that has no use here, a flag, and where the image's
 * refcounts are too narrow for another reference; -ENOTSUP for a format without snapshots;
 * QBLK_EUNSUPPORTED for an image with an external data file; -EROFS on a handle without
 * QBLK_OPEN_RDWR; -EFBIG for more than 65536 snapshots; -ENOSPC and other codes of the system;
 * QBLK_ECORRUPT. After an error the image is as it was. Any thread. Since 0.1.
 */
int qblk_snapshot_create(struct qblk *dev,
                         const char *name,
                         const struct qblk_options *options,
                         uint32_t flags);

/**
 * Make the disk, its size and the machine's state what they were in a snapshot: the one whose ID is
 * `id_or_name`, or else the first with that name. What was written since the last snapshot is lost.
 *
 * There are no flags yet, so `flags` must be 0. Calls of other threads on the device wait meanwhile.
 *
 * Returns as qblk_snapshot_create(); -ENOENT if there is no such snapshot. Any thread. Since 0.1.
 */
int qblk_snapshot_apply(struct qblk *dev,
                        const char *id_or_name,
                        uint32_t flags);

/**
 * Forget a snapshot: the one whose ID is `id_or_name`, or else the first with that name. The space that
 * it alone has taken is free then.
 *
 * There are no flags yet, so `flags` must be 0. Calls of other threads on the device wait meanwhile.
 *
 * Returns as qblk_snapshot_apply(). Any thread. Since 0.1.
 */
int qblk_snapshot_delete(struct qblk *dev,
                         const char *id_or_name,
                         uint32_t flags);

/**
 * Write `count` bytes of `buf` at `offset` of the area of the machine's state, which lies apart from the
 * disk's bytes. The next qblk_snapshot_create() takes it with it; its size there is the end of the
 * furthest write since the last snapshot was made or applied.
 *
 * The area is as large as the format can make it, and grows as it is written to. Resizing the device
 * empties it. `buf` may be NULL if `count` is 0.
 *
 * Returns 0; -EINVAL for a NULL; -EFBIG for a range that the format can not have; -ENOTSUP for a format
 * without such an area; QBLK_EUNSUPPORTED for an image with an external data file; else as
 * qblk_pwrite2(). Any thread; calls on the area are done one by one. Since 0.1.
 */
int qblk_vmstate_write(struct qblk *dev,
                       const void *buf,
                       size_t count,
                       uint64_t offset);

/**
 * Read `count` bytes at `offset` of the area of the machine's state into `buf`: what was written since,
 * or what the snapshot has kept that was applied, or opened by the option "snapshot".
 *
 * What was never written reads as zeroes; how much there is the property "qcow2.vm-state-size" tells.
 * `buf` may be NULL if `count` is 0.
 *
 * Returns as qblk_vmstate_write(), and codes of reading. Any thread; calls on the area are done one by
 * one. Since 0.1.
 */
int qblk_vmstate_read(struct qblk *dev,
                      void *buf,
                      size_t count,
                      uint64_t offset);

/**
 * Make an NBD server that exports nothing and listens nowhere yet. Free it with qblk_server_free().
 *
 * Returns 0 and the server in `*out`; -EINVAL if `out` is NULL; -EMFILE and other codes of the
 * system. Any thread. Since 0.1.
 */
int qblk_server_new(struct qblk_server **out);

/**
 * Set `key` to `value`, before the first qblk_server_listen(), _listen_fd() or _serve_fd().
 *
 * Keys: "tls" ("off", "on", "required"), "tls-certificate", "tls-key", "tls-ca" (PEM files, or PEM text
 * that begins with "-----BEGIN"), "tls-certificates" (a directory), "tls-verify-peer" ("on": clients
 * need a certificate too), "max-connections", "max-connections-per-peer", "handshake-timeout",
 * "idle-timeout" (seconds), "max-request", "max-in-flight", "max-in-flight-in-all", "max-memory",
 * "max-memory-per-connection", "max-option", "threads", "busy-poll". docs/options.md tells their
 * meanings and what holds when they are not set.
 *
 * Returns 0; -EINVAL for a NULL, an unknown key, a value out of range, or too late. Any thread.
 * Since 0.1.
 */
int qblk_server_set(struct qblk_server *srv,
                    const char *key,
                    const char *value);

/**
 * Export `dev` under `name`: qblk_server_add_export2() without options.
 *
 * Since 0.1.
 */
int qblk_server_add_export(struct qblk_server *srv,
                           const char *name,
                           struct qblk *dev,
                           uint32_t flags);

/**
 * Export `dev` under `name`, at any time, also while clients are served.
 *
 * The name "" is what clients get that ask for no name. The name "*" is what they get that ask for
 * any name which no other export has. The server holds the device until the export is removed: `dev`
 * may be closed before. Clients can write if `dev` can, unless `flags` has QBLK_EXPORT_RDONLY. The
 * option "description" is a text for people; `options` may be NULL.
 *
 * Clients are told of the device's dirty bitmaps as the meta contexts "qemu:dirty-bitmap:NAME"; the
 * option "bitmap" names one that they are told of alone, or ("") keeps them all to itself.
 *
 * Returns 0; -EINVAL for a NULL, an unknown flag, a name of more than 4096 bytes; -EEXIST if the name
 * is taken; -ENOENT or -ESTALE for a bitmap that is not there or inconsistent; -EBADF for a device that is open for its description only, and for a server that was
 * stopped. Any thread. Since 0.1.
 */
int qblk_server_add_export2(struct qblk_server *srv,
                            const char *name,
                            struct qblk *dev,
                            const struct qblk_options *options,
                            uint32_t flags);

/**
 * Export `name` no more. Its clients get the answers that are under way and are hung up on; then what
 * they wrote is flushed, and the server lets go of the device.
 *
 * Returns 0; -EINVAL for a NULL; -ENOENT if there is no such export; what the flush answered. Any
 * thread. Since 0.1.
 */
int qblk_server_remove_export(struct qblk_server *srv,
                              const char *name);

/**
 * Listen at an address, and serve whoever connects, in the background.
 *
 * `uri` is "nbd+unix:///?socket=PATH", "nbd://127.0.0.1:0" (port 0: any that is free; no host: all
 * addresses), or "nbd+vsock://CID:PORT". May be called several times.
 *
 * Returns 0; -EINVAL for a NULL and for what is no such URI; -EADDRINUSE, -EACCES and other codes of
 * the system; an error of the "tls-..." settings; -EBADF for a server that was stopped. Any thread.
 * Since 0.1.
 */
int qblk_server_listen(struct qblk_server *srv,
                       const char *uri);

/**
 * Serve whoever connects to `fd`, a socket that listens already, as socket activation hands over.
 *
 * The library works on a duplicate; `fd` stays the caller's. It is made non-blocking.
 *
 * Returns 0; -EBADF if `fd` is none, and for a server that was stopped; -ENOTSOCK if it is no socket;
 * -EINVAL if it does not listen; an error of the "tls-..." settings. Any thread. Since 0.1.
 */
int qblk_server_listen_fd(struct qblk_server *srv,
                          int fd);

/**
 * Serve one client on `fd`, a connected socket, in the background.
 *
 * The library works on a duplicate; the caller closes `fd`, or the client is not told when the
 * server hangs up. It is made blocking.
 *
 * Returns 0; -EBADF if `fd` is none, and for a server that was stopped; -ENOTSOCK if it is no socket;
 * -EINVAL if it listens; -EAGAIN when a limit of connections is reached; an error of the "tls-..."
 * settings. Any thread. Since 0.1.
 */
int qblk_server_serve_fd(struct qblk_server *srv,
                         int fd);

/**
 * Tell where clients find the server: a URI, as text in `buf`, with the real port.
 *
 * It is the first address that is listened at; with the name of the export if there is just one.
 * `size` is that of `buf` in bytes; `buf` may be NULL if it is 0.
 *
 * Returns the length of the URI in bytes without the NUL, as snprintf() does: a result of `size` or
 * more means that it was cut. -ENOENT if the server listens nowhere; -EINVAL for a NULL. Any thread.
 * Since 0.1.
 */
int64_t qblk_server_get_uri(struct qblk_server *srv,
                            char *buf,
                            size_t size);

/**
 * Wait until the server is stopped (by qblk_server_stop() in another thread), for at most
 * `timeout_ms` milliseconds; -1 waits for ever.
 *
 * Returns 0; -ETIMEDOUT; -EINVAL for a NULL. Any thread. Since 0.1.
 */
int qblk_server_wait(struct qblk_server *srv, int timeout_ms);

/**
 * Stop: take no more clients and requests, let those that are under way finish for at most `drain_ms`
 * milliseconds (-1: for as long as it takes), hang up, and flush all exports.
 *
 * Returns 0; what the first flush that failed answered; -ETIMEDOUT if a device did not answer a
 * request even then; -EINVAL for a NULL. Any thread. Since 0.1.
 */
int qblk_server_stop(struct qblk_server *srv,
                     int drain_ms);

/**
 * Stop a server without draining, unless it is stopped, and free it. NULL does nothing.
 *
 * Cannot fail. Any thread, as the last call on this server. In a child of fork it only frees.
 * Since 0.1.
 */
void qblk_server_free(struct qblk_server *srv);

/**
 * Ask the NBD server at `uri` for its exports, and call `fn` with `opaque` for each. `uri` may also be
 * that of a plugin ("plugin:PATH?KEY=VALUE"): what it offers are values of its setting "export".
 *
 * `options` are those of qblk_open2() for NBD ("tls-ca", "nbd.timeout"...) or for the plugin; NULL: none.
 * The export's name in the URI does not matter.
 *
 * Returns how many there are; -EACCES or -EPERM when the server does not tell; else as qblk_open2().
 * Any thread. Since 0.1.
 */
int64_t qblk_nbd_list(const char *uri,
                      const struct qblk_options *options,
                      qblk_nbd_list_fn fn,
                      void *opaque);

/**
 * Load the lock manager `path`, a shared object, for qblk_options_set_lock_manager().
 *
 * `path` is as for dlopen(). The keys and values of `options` (NULL: none) are the manager's, for all
 * leases that it gives. (A manager can also be named at open, by the options "lock-manager" and
 * "lock-manager.KEY", or for the whole site by the environment: QBLK_LOCK_MANAGER.)
 *
 * Returns 0 and the manager in `*out`, to be freed with qblk_lock_manager_free(). On failure `*out`
 * is NULL: -EINVAL for a NULL or an empty path, -ENOENT, -ELIBACC if it cannot be loaded,
 * -ELIBBAD if it lacks a function that every lock manager has. Any thread. Since 0.1.
 */
int qblk_lock_manager_load(const char *path,
                           const struct qblk_options *options,
                           struct qblk_lock_manager **out);

/**
 * Use `mgr` for what is opened or created with these options; NULL: none, not even the site's.
 *
 * The options "lock-owner", "lock-owner-uuid" and "lock-wait" say for whom, and how long to wait. The
 * manager must not be freed before the last open (or reopen) with these options; what is open then
 * keeps it.
 *
 * Returns 0; -EINVAL if `o` is NULL. Any thread. Since 0.1.
 */
int qblk_options_set_lock_manager(struct qblk_options *o,
                                  struct qblk_lock_manager *mgr);

/**
 * Free a lock manager; NULL does nothing. Devices that it has leased keep it until they are closed.
 *
 * Cannot fail. Any thread, also in a child of fork, as the last call on it. Since 0.1.
 */
void qblk_lock_manager_free(struct qblk_lock_manager *mgr);

/**
 * Register a plugin of the program's own, so that "plugin:NAME" opens instances of it.
 *
 * `plugin` is a struct as qblk-plugin.h has it (its macro QBLK_REGISTER_PLUGIN sets its size and
 * version and calls this); it is copied. `opaque` is what its function open is given. Names have none of
 * '/', '?' and '%', and come before files of the same name.
 *
 * Returns 0; -EEXIST if the name is taken; -EINVAL for a NULL, and for a struct that lacks something or
 * is of another version: qblk_get_error() says what. Any thread. Since 0.1.
 */
int qblk_register_plugin(const struct qblk_plugin *plugin,
                         void *opaque);

/**
 * Forget a plugin that was registered. Its functions are not called any more.
 *
 * Returns 0; -EBUSY while devices on it are open, and then it stays; -ENOENT if none of that name is
 * registered; -EINVAL for a NULL. Any thread. Since 0.1.
 */
int qblk_unregister_plugin(const char *name);

/**
 * Called by a layer: open a context on what it stands on. Any number of them, at any time from its
 * function open_layer until its function close has returned, from any thread, its own too.
 *
 * The one flag is QBLK_OPEN_RDWR. What one context writes, the others read. The layer closes it with
 * qblk_close().
 *
 * Returns 0 and the context in `*out`; on failure `*out` is NULL: -EROFS where what is below is not open
 * for writing, -EINVAL for a NULL and for another flag. Any thread. Since 0.1.
 */
int qblk_source_open(struct qblk_source *source,
                     uint32_t flags,
                     struct qblk **out);

/**
 * Called by a layer: the methods that its struct passes on (`passes`) go to the context `next` from now
 * on, and its size is that of `next` if it has no function get_size. NULL: to none.
 *
 * `next` is a context of this source. The library opens one of its own beside it; `next` stays the layer's
 * to close. To be called before config_complete returns (or open_layer, where there is none); called again
 * it swaps them, while requests run.
 *
 * Returns 0; -EINVAL for a NULL source, and for a context of anything else. Any thread. Since 0.1.
 */
int qblk_layer_set_next(struct qblk_source *source,
                        struct qblk *next);

/**
 * Called by a plugin's function before it returns -1: the code that the call is to fail with, an errno
 * (of either sign) or QBLK_E... The last of several counts. Outside of such a function it does nothing.
 *
 * Cannot fail. Any thread that is in a function of a plugin. Since 0.1.
 */
void qblk_plugin_set_error(int code);

/**
 * Called by a plugin's function before it fails: why, in words (at most 1024 bytes are kept). It becomes
 * part of what qblk_get_error() says. qblk-plugin.h has qblk_plugin_error(), which formats as printf()
 * does. NULL takes it back.
 *
 * Cannot fail. Any thread that is in a function of a plugin. Since 0.1.
 */
void qblk_plugin_set_error_text(const char *text);

/**
 * Send a line to the log at the level QBLK_LOG_DEBUG: see qblk_set_log(). qblk-plugin.h has
 * qblk_plugin_debug(), which formats as printf() does.
 *
 * Cannot fail; NULL does nothing. Any thread. Since 0.1.
 */
void qblk_plugin_debug_text(const char *text);

/**
 * Read a size in bytes: a whole number, and k, M, G, T, P or E (times 1024 each) behind it.
 *
 * `key` is named in the error's text; NULL is "".
 *
 * Returns 0 and the bytes in `*out`; -EINVAL for anything else, and for a NULL. Any thread. Since 0.1.
 */
int qblk_plugin_parse_size(const char *key,
                           const char *value,
                           uint64_t *out);

/**
 * Read a whole number, decimal or with 0x before it.
 *
 * Returns as qblk_plugin_parse_size(). Any thread. Since 0.1.
 */
int qblk_plugin_parse_uint64(const char *key, const char *value, uint64_t *out);

/**
 * Read a switch: on, true, yes, 1 or off, false, no, 0, in letters of either case.
 *
 * Returns as qblk_plugin_parse_size(), with 1 or 0 in `*out`. Any thread. Since 0.1.
 */
int qblk_plugin_parse_bool(const char *key, const char *value, int *out);

/**
 * Make a path independent of the working directory, which need not be the same later. The file need not
 * be there, and links are left as they are.
 *
 * Returns 0 and the path in `*out`, to be freed with free(); -EINVAL for a NULL or an empty path;
 * -ENOMEM; on failure `*out` is NULL. Any thread. Since 0.1.
 */
int qblk_plugin_absolute_path(const char *path,
                              char **out);

/**
 * Called by a plugin's function extents: the next extent of what it was asked to describe.
 *
 * Extents follow one another; the first begins at the offset that was asked for, or before it, and the
 * last ends where the range does, or behind it (if it ends before, the rest is asked for again). `offset`
 * and `length` are bytes. `flags`: QBLK_EXTENT_DATA, or QBLK_EXTENT_ZERO for a hole, or both for zeroes
 * that take space.
 *
 * Returns 0; -EINVAL for a NULL, and for an extent that does not follow the one before: the whole call
 * fails then. In the function extents only, on its thread. Since 0.1.
 */
int qblk_plugin_add_extent(struct qblk_extent_list *list,
                           uint64_t offset,
                           uint64_t length,
                           uint32_t flags);

/**
 * Called by a plugin's function list_exports: another export, by its name, and in words (NULL: none).
 *
 * Returns 0; -EINVAL for a NULL; -E2BIG for the 65537th. In the function list_exports only, on its
 * thread. Since 0.1.
 */
int qblk_plugin_add_export(struct qblk_export_list *list,
                           const char *name,
                           const char *description);

QBLK_STATIC_ASSERT(sizeof(qblk_info) == QBLK_INFO_SIZE, "qblk_info is 256 bytes, for ever");
QBLK_STATIC_ASSERT(offsetof(qblk_info, size) == 0, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, allocated) == 8, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, max_transfer) == 16, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, request_alignment) == 24, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, optimal_io_size) == 28, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, cluster_size) == 32, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, backing_depth) == 36, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, state) == 40, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_flush) == 44, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_fua) == 45, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_trim) == 46, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_zero) == 47, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_fast_zero) == 48, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_cache) == 49, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_extents) == 50, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, can_multi_conn) == 51, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, format) == 52, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, driver) == 84, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_info, reserved) == 116, "fields do not move");
QBLK_STATIC_ASSERT(sizeof(qblk_extent) == 48, "qblk_extent is 48 bytes, for ever");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, offset) == 0, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, length) == 8, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, host_offset) == 16, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, flags) == 24, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, depth) == 28, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_extent, reserved) == 32, "fields do not move");
QBLK_STATIC_ASSERT(sizeof(qblk_bitmap) == QBLK_BITMAP_SIZE, "qblk_bitmap is 1152 bytes, for ever");
QBLK_STATIC_ASSERT(offsetof(qblk_bitmap, name) == 0, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_bitmap, granularity) == 1024, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_bitmap, dirty) == 1032, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_bitmap, flags) == 1040, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_bitmap, reserved) == 1044, "fields do not move");
QBLK_STATIC_ASSERT(sizeof(qblk_snapshot) == 512, "qblk_snapshot is 512 bytes, for ever");
QBLK_STATIC_ASSERT(offsetof(qblk_snapshot, vm_state_size) == 384, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_snapshot, vm_clock_nsec) == 416, "fields do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_snapshot, reserved) == 432, "fields do not move");

#ifdef __cplusplus
}
#endif

#endif /* QBLK_H */
