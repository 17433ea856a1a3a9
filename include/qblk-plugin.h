/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Plugins for libqblk: devices written in C. qblk-plugin(3) is the manual; examples/plugin-memory.c a
 * page of code that works.
 *
 * A plugin is a shared object, or part of the program. It fills a struct qblk_plugin and hands it over:
 *
 *     QBLK_PLUGIN_REGISTER(plugin)                   in a shared object, opened as "plugin:PATH"
 *     QBLK_REGISTER_PLUGIN(&plugin, opaque)          in the program, opened as "plugin:NAME"
 *
 * Or it has no struct, and a function qblk_plugin_open, one qblk_plugin_pread, and so on: see "Functions
 * instead of a struct" below.
 *
 * What an instance goes through:
 *
 *     open(opaque, flags)              a handle, which all other functions are given; NULL: it failed
 *     config(handle, key, value)       once for each setting, in the order of "plugin:PATH?key=value&..."
 *     config_complete(handle)          there are no more
 *     can_...(handle), get_size(handle), block_size(...)    once each
 *     pread, pwrite, flush, ...        as it is used
 *     close(handle)                    once, whatever has failed since open
 *
 * What all functions have in common:
 *
 *   result    0, or a failure. -1: the code is what qblk_plugin_set_error() said; else errno, if
 *             errno_is_preserved is not 0; else that of the last call of libqblk that failed in this
 *             function; else EIO. Any other negative number is the code itself: -errno or QBLK_E...
 *             (To fail with EPERM, which is 1, call qblk_plugin_set_error().) A positive number is a
 *             mistake of the plugin's and fails with EIO. Data moves as a whole: nothing returns short.
 *   text      qblk_plugin_error() says why, in words, which become part of qblk_get_error().
 *   threads   as thread_model says. Calls come on the threads of the program, not on one of their own.
 *   ranges    lie on the device, and keep to block_size where there is one; counts are never 0.
 *   missing   a function that is NULL is emulated or refused: pwrite (the device is read-only), flush
 *             (nothing to do), trim (nothing is done), zero (zeroes are written), cache (it is read),
 *             extents (all is data), can_... (it can if the function is there).
 *   calls     of libqblk are allowed, on other devices. One on the very device that stands on the
 *             instance answers -EDEADLK.
 *   never     throw an exception out of a function, longjmp() out of it, end the thread or the process.
 *
 * Layers stand on another device and change what passes through. A plugin is one by its function
 * open_layer, instead of open or besides. It is named in the option "layers", by its path or the name that
 * it was registered under. It is given a source, opens contexts on it with qblk_source_open() (one, one for
 * each of its threads, at any time), calls qblk_pread() and all other functions of qblk.h on them, and
 * closes them with qblk_close(), in its function close at the latest. What a layer does not have is
 * emulated by what it has, or refused, as if it were a device of its own: no method is ever passed around
 * it, whatever later libraries can do, but those that it names in `passes`, which go to the context that it
 * gave to qblk_layer_set_next(). One that is written must have flush, or pass it on.
 *
 * How the struct grows: new functions are appended; what is there keeps its place, its type and its
 * meaning for ever. A library copies as much as both it and the plugin have, so a plugin that was
 * compiled once works with every later library, and what it does not have is emulated or refused. A
 * library refuses a plugin whose _api_version it does not know, and loads one of a version that it knows
 * whose struct is longer than its own: it does not see the rest.
 */
#ifndef QBLK_PLUGIN_H
#define QBLK_PLUGIN_H

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <qblk.h>

/* The version of the ABI that a plugin is written for: 1, unless it says 2 before it includes this. */
#ifndef QBLK_API_VERSION
#define QBLK_API_VERSION 1
#endif
#if QBLK_API_VERSION != 1 && QBLK_API_VERSION != 2
#error "QBLK_API_VERSION: this header has versions 1 and 2"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* thread_model: one call at a time in the whole process, for all instances together. A layer of this model is
 * in a stack once, and of two of them the same is the upper in all stacks that are open together: else
 * opening answers -EDEADLK. */
#define QBLK_THREAD_PROCESS 0
/* thread_model: one call at a time for each instance. */
#define QBLK_THREAD_INSTANCE 100
/* thread_model: any number of calls at a time. */
#define QBLK_THREAD_PARALLEL 200
/* (A number between two of them, which a later library may know, counts as the lower.) */

/* What open may return when a plugin has nothing to tell instances apart by. */
#ifdef __cplusplus
#define QBLK_PLUGIN_NO_HANDLE (reinterpret_cast<void *>(static_cast<uintptr_t>(1)))
#else
#define QBLK_PLUGIN_NO_HANDLE ((void *)(uintptr_t)1)
#endif

#if QBLK_API_VERSION == 1
#define QBLK_V1_(name) name
#define QBLK_V2_(name) _##name##_v2
#else
#define QBLK_V1_(name) _##name##_v1
#define QBLK_V2_(name) name
#endif

/* A plugin. What is not needed is NULL or 0: a zeroed struct is a valid beginning. */
struct qblk_plugin {
    uint64_t _struct_size; /* set by the macros that register it */
    int32_t _api_version;  /* likewise */
    int32_t thread_model;  /* QBLK_THREAD_... */
    int32_t errno_is_preserved; /* not 0: when a function returns -1, errno says why */
    int32_t _reserved;          /* 0 */
    uint64_t passes;            /* of a layer: QBLK_METHOD_..., see the beginning */

    const char *name;        /* needed */
    const char *version;     /* of the plugin itself, for people */
    const char *description; /* a line, for people */

    /* Begin an instance. `opaque` is what qblk_register_plugin() was given (NULL in a shared object).
     * `flags` are QBLK_OPEN_RDWR if it will be written, and perhaps others of qblk.h: ignore those that
     * you do not know. What is opened may still be configured: open files in config_complete. Needed. */
    void *(*open)(void *opaque, uint32_t flags);
    /* Instead of open, in a layer: begin an instance that stands on `source`. See the beginning. */
    void *(*open_layer)(void *opaque, qblk_source *source, uint32_t flags);
    /* A setting. Keys have hyphens where the user gave underscores. Refuse what you do not know.
     * Without this function every setting is refused. */
    int (*config)(void *handle, const char *key, const char *value);
    int (*config_complete)(void *handle);
    /* What settings there are, for people, a line each; it stays valid. No handle is needed. */
    const char *(*config_help)(void *opaque);
    /* What the plugin (if handle is NULL) or an instance tells of itself, as lines of key=value. Puts it
     * into buf, which has room for size bytes with the NUL, and returns its length as snprintf() does. */
    int64_t (*dump)(void *handle, char *buf, size_t size);
    /* The end of an instance. Nothing else is being called, nor will it be. */
    void (*close)(void *handle);

    /* Bytes, or a failure. It does not change while the instance is open. Needed. */
    int64_t (*get_size)(void *handle);
    /* QBLK_CAN_NOT, QBLK_CAN_EMULATE (by the library) or QBLK_CAN_NATIVE, or a failure. */
    int (*can_write)(void *handle);
    int (*can_flush)(void *handle);
    int (*can_trim)(void *handle);
    int (*can_zero)(void *handle);
    int (*is_rotational)(void *handle);

    /* Version 1. Under version 2 they have the names _pread_v1 ... and are used where the one below is
     * NULL. Counts and offsets are bytes. pread or its successor is needed. */
    int (*QBLK_V1_(pread))(void *handle, void *buf, uint32_t count, uint64_t offset);
    int (*QBLK_V1_(pwrite))(void *handle, const void *buf, uint32_t count, uint64_t offset);
    /* What was written before is on stable storage when it returns 0. */
    int (*QBLK_V1_(flush))(void *handle);
    /* The bytes matter no more. They read as before or as zeroes, always the same. */
    int (*QBLK_V1_(trim))(void *handle, uint32_t count, uint64_t offset);
    /* The bytes read as zeroes; may_trim: the space may be given back. -EOPNOTSUPP: the library writes
     * zeroes instead. */
    int (*QBLK_V1_(zero))(void *handle, uint32_t count, uint64_t offset, int may_trim);

    /* Version 2. Under version 1 they have the names _can_fua_v2 ... and must be left alone. */

    /* Whether QBLK_REQ_FUA is honoured. NULL: natively if there is pwrite with flags, else by flush if
     * there is that, else not. QBLK_CAN_EMULATE: the library flushes after the request. */
    int (*QBLK_V2_(can_fua))(void *handle);
    /* Whether zero honours QBLK_REQ_FAST_ZERO: fails with -EOPNOTSUPP at once where it would have to
     * write. NULL: it is not called with it, and the request fails at once. */
    int (*QBLK_V2_(can_fast_zero))(void *handle);
    int (*QBLK_V2_(can_cache))(void *handle);
    int (*QBLK_V2_(can_extents))(void *handle);
    /* Whether a flush of one instance also holds for what others have written to the same source. */
    int (*QBLK_V2_(can_multi_conn))(void *handle);
    /* What requests must keep to, in bytes: *minimum, a power of two up to 64 KiB of which offset and
     * count are multiples; *preferred, a power of two; *maximum, the longest read or write, a multiple of
     * the minimum, or 0. At entry they are 1, 4096 and 0. */
    int (*QBLK_V2_(block_size))(void *handle, uint32_t *minimum, uint32_t *preferred,
                                uint64_t *maximum);
    /* flags is 0: ignore what you do not know. */
    int (*QBLK_V2_(pread))(void *handle, void *buf, uint64_t count, uint64_t offset,
                           uint32_t flags);
    /* QBLK_REQ_FUA, if can_fua is native: return when the bytes are on stable storage. */
    int (*QBLK_V2_(pwrite))(void *handle, const void *buf, uint64_t count, uint64_t offset,
                            uint32_t flags);
    int (*QBLK_V2_(flush))(void *handle, uint32_t flags);
    /* QBLK_REQ_FUA, as pwrite. */
    int (*QBLK_V2_(trim))(void *handle, uint64_t count, uint64_t offset, uint32_t flags);
    /* QBLK_REQ_FUA, as pwrite; QBLK_REQ_MAY_TRIM: the space may be given back; QBLK_REQ_FAST_ZERO. */
    int (*QBLK_V2_(zero))(void *handle, uint64_t count, uint64_t offset, uint32_t flags);
    /* The range will be read soon. */
    int (*QBLK_V2_(cache))(void *handle, uint64_t count, uint64_t offset, uint32_t flags);
    /* Describe the range by calls of qblk_plugin_add_extent(). */
    int (*QBLK_V2_(extents))(void *handle, uint64_t count, uint64_t offset, uint32_t flags,
                             qblk_extent_list *list);
    /* What there is to open, by calls of qblk_plugin_add_export(): a name each, that is, a value of the
     * setting "export". Called instead of config_complete; the instance is closed then. */
    int (*QBLK_V2_(list_exports))(void *handle, qblk_export_list *list);
    /* The export that is meant when the setting "export" is not given: it is handed to config before
     * config_complete. NULL: there is none. */
    const char *(*QBLK_V2_(default_export))(void *handle);
};

#define QBLK_PLUGIN_AT_(slot) (32 + (slot) * sizeof(void *))
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, _api_version) == 8, "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, thread_model) == 12, "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, errno_is_preserved) == 16, "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, passes) == 24, "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, name) == QBLK_PLUGIN_AT_(0), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, open) == QBLK_PLUGIN_AT_(3), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, config) == QBLK_PLUGIN_AT_(5), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, close) == QBLK_PLUGIN_AT_(9), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, get_size) == QBLK_PLUGIN_AT_(10), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, is_rotational) == QBLK_PLUGIN_AT_(15), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V1_(pread)) == QBLK_PLUGIN_AT_(16), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V1_(zero)) == QBLK_PLUGIN_AT_(20), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V2_(can_fua)) == QBLK_PLUGIN_AT_(21), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V2_(block_size)) == QBLK_PLUGIN_AT_(26), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V2_(pread)) == QBLK_PLUGIN_AT_(27), "slots do not move");
QBLK_STATIC_ASSERT(offsetof(qblk_plugin, QBLK_V2_(default_export)) == QBLK_PLUGIN_AT_(35), "slots do not move");

#if defined(__GNUC__)
#define QBLK_PLUGIN_EXPORT_ __attribute__((visibility("default")))
#define QBLK_PLUGIN_PRINTF_(text, first) __attribute__((format(printf, text, first)))
#else
#define QBLK_PLUGIN_EXPORT_
#define QBLK_PLUGIN_PRINTF_(text, first)
#endif

#ifdef __cplusplus
#define QBLK_PLUGIN_C_ extern "C"
#else
#define QBLK_PLUGIN_C_
#endif

/* Hand `plugin`, a qblk_plugin that lives for ever, over to whoever loads this shared object. */
#define QBLK_PLUGIN_REGISTER(plugin)                                          \
    QBLK_PLUGIN_C_ QBLK_PLUGIN_EXPORT_ const qblk_plugin *qblk_plugin_init(void); \
    QBLK_PLUGIN_C_ QBLK_PLUGIN_EXPORT_ const qblk_plugin *qblk_plugin_init(void)  \
    {                                                                         \
        (plugin)._struct_size = sizeof(qblk_plugin);                          \
        (plugin)._api_version = QBLK_API_VERSION;                             \
        return &(plugin);                                                     \
    }

/* qblk_register_plugin(), with the size and the version of the struct set. */
#define QBLK_REGISTER_PLUGIN(plugin, opaque)           \
    ((plugin)->_struct_size = sizeof(qblk_plugin),     \
     (plugin)->_api_version = QBLK_API_VERSION,        \
     qblk_register_plugin((plugin), (opaque)))

/* Say why the function that calls it is about to fail, as printf() does: qblk_plugin_set_error_text().
 * errno is left alone. */
static inline void qblk_plugin_error(const char *format, ...) QBLK_PLUGIN_PRINTF_(1, 2);
/* Send a line to the log, as printf() does: qblk_plugin_debug_text(). Likewise. */
static inline void qblk_plugin_debug(const char *format, ...) QBLK_PLUGIN_PRINTF_(1, 2);

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wformat-nonliteral"
#endif
static inline void qblk_plugin_format_(void (*tell)(const char *), const char *format, va_list args)
{
    char text[1024];
    int before = errno;
    if (vsnprintf(text, sizeof text, format, args) >= 0)
        tell(text);
    errno = before;
}

static inline void qblk_plugin_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    qblk_plugin_format_(qblk_plugin_set_error_text, format, args);
    va_end(args);
}

static inline void qblk_plugin_debug(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    qblk_plugin_format_(qblk_plugin_debug_text, format, args);
    va_end(args);
}
#if defined(__clang__)
#pragma clang diagnostic pop
#endif

/*
 * Functions instead of a struct: a shared object without QBLK_PLUGIN_REGISTER, of which the library finds
 * those of the following that are there. A function is there or it is not; there is no version. Those
 * with a 2 at the end are used where both are there. Define QBLK_PLUGIN_FUNCTIONS before this header to
 * have the compiler look at their types. Needed are qblk_plugin_open, qblk_plugin_get_size, and one of
 * qblk_plugin_pread and qblk_plugin_pread2.
 */
#ifdef QBLK_PLUGIN_FUNCTIONS
QBLK_PLUGIN_EXPORT_ const char *qblk_plugin_name(void); /* else the file's name */
QBLK_PLUGIN_EXPORT_ const char *qblk_plugin_version(void);
QBLK_PLUGIN_EXPORT_ const char *qblk_plugin_description(void);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_thread_model(void); /* else QBLK_THREAD_PROCESS */
QBLK_PLUGIN_EXPORT_ int qblk_plugin_errno_is_preserved(void);
QBLK_PLUGIN_EXPORT_ void *qblk_plugin_open(void *opaque, uint32_t flags);
QBLK_PLUGIN_EXPORT_ void *qblk_plugin_open_layer(void *opaque, qblk_source *source, uint32_t flags);
QBLK_PLUGIN_EXPORT_ uint64_t qblk_plugin_passes(void);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_config(void *handle, const char *key, const char *value);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_config_complete(void *handle);
QBLK_PLUGIN_EXPORT_ const char *qblk_plugin_config_help(void *opaque);
QBLK_PLUGIN_EXPORT_ int64_t qblk_plugin_dump(void *handle, char *buf, size_t size);
QBLK_PLUGIN_EXPORT_ void qblk_plugin_close(void *handle);
QBLK_PLUGIN_EXPORT_ int64_t qblk_plugin_get_size(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_write(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_flush(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_trim(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_zero(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_is_rotational(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_fua(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_fast_zero(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_cache(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_extents(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_can_multi_conn(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_block_size(void *handle, uint32_t *minimum, uint32_t *preferred,
                                               uint64_t *maximum);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_pread2(void *handle, void *buf, uint64_t count, uint64_t offset,
                                           uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_pwrite(void *handle, const void *buf, uint32_t count,
                                           uint64_t offset);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_pwrite2(void *handle, const void *buf, uint64_t count,
                                            uint64_t offset, uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_flush(void *handle);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_flush2(void *handle, uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_trim(void *handle, uint32_t count, uint64_t offset);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_trim2(void *handle, uint64_t count, uint64_t offset,
                                          uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_zero(void *handle, uint32_t count, uint64_t offset, int may_trim);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_zero2(void *handle, uint64_t count, uint64_t offset,
                                          uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_cache(void *handle, uint64_t count, uint64_t offset,
                                          uint32_t flags);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_extents(void *handle, uint64_t count, uint64_t offset,
                                            uint32_t flags, qblk_extent_list *list);
QBLK_PLUGIN_EXPORT_ int qblk_plugin_list_exports(void *handle, qblk_export_list *list);
QBLK_PLUGIN_EXPORT_ const char *qblk_plugin_default_export(void *handle);
#endif

#ifdef __cplusplus
}
#endif

#endif /* QBLK_PLUGIN_H */
