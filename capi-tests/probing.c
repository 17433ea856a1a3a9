/* A program that finds the library and its functions at run time. RUN: dlopen */
#include "test.h"
#include <dlfcn.h>

static void *lib;

/* dlsym answers a pointer to an object; ISO C wants the detour to a function's. */
#define FIND(var, name) \
    do { \
        void *p_ = dlsym(lib, name); \
        CHECK(sizeof var == sizeof p_); \
        memcpy(&var, &p_, sizeof p_); \
    } while (0)

int main(int argc, char **argv)
{
    int (*open_)(const char *, uint32_t, qblk **);
    int (*pwrite2_)(qblk *, const void *, size_t, uint64_t, uint32_t);
    int (*pread_)(qblk *, void *, size_t, uint64_t);
    int (*close_)(qblk *);
    int (*supports_)(const char *);
    uint32_t (*version_)(void);
    const char *(*get_error_)(void);
    static const char *const there[] = {
        "qblk_version", "qblk_version_string", "qblk_supports", "qblk_strerror", "qblk_get_error",
        "qblk_set_log", "qblk_options_new", "qblk_options_set", "qblk_options_free", "qblk_open",
        "qblk_open2", "qblk_open_fd", "qblk_close", "qblk_context_open", "qblk_reopen",
        "qblk_reopen2", "qblk_pread", "qblk_pread2", "qblk_pwrite", "qblk_pwrite2", "qblk_preadv",
        "qblk_pwritev", "qblk_flush", "qblk_zero", "qblk_trim", "qblk_cache", "qblk_get_info",
        "qblk_get_property", "qblk_extents", "qblk_create", "qblk_resize", "qblk_resize2",
        "qblk_write_compressed", "qblk_copy", "qblk_commit",
        "qblk_rebase",
    };
    /* Later ones, tests' own, and what a Rust library might let slip. */
    static const char *const absent[] = {
        "qblk_pwrite3", "qblk__test_panic", "rust_eh_personality", "rust_begin_unwind",
        "__rust_alloc", "__rdl_alloc", "ZSTD_decompress", "libdeflate_deflate_decompress",
    };
    char buf[4];
    qblk *dev;
    (void)argc;
    test_begin(argv);

    lib = dlopen("libqblk.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        FAIL_("%s", dlerror());
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++) {
        if (!dlsym(lib, there[i]) || !dlvsym(lib, there[i], "QBLK_1.0"))
            FAIL_("%s: not there, or not at QBLK_1.0", there[i]);
        CHECK(dlvsym(lib, there[i], "QBLK_0.9") == NULL);
    }
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        if (dlsym(lib, absent[i]))
            FAIL_("%s: should not be there", absent[i]);

    FIND(open_, "qblk_open");
    FIND(pwrite2_, "qblk_pwrite2");
    FIND(pread_, "qblk_pread");
    FIND(close_, "qblk_close");
    FIND(supports_, "qblk_supports");
    FIND(version_, "qblk_version");
    FIND(get_error_, "qblk_get_error");
#ifndef QBLK_HAVE_PWRITE2
#error "no macro tells of qblk_pwrite2"
#endif
    CHECK_INT(version_(), QBLK_VERSION);
    CHECK_INT(supports_("format:qcow2"), 1);
    CHECK_INT(open_("mem:1M", QBLK_OPEN_RDWR, &dev), 0);
    CHECK_INT(pwrite2_(dev, "data", 4, 1000, QBLK_REQ_FUA), 0);
    CHECK_INT(pread_(dev, buf, 4, 1000), 0);
    CHECK_MEM(buf, "data", 4);
    CHECK_INT(pread_(dev, buf, 4, 1 << 20), -EINVAL);
    CHECK_HAS(get_error_(), "qblk_pread: ");
    CHECK_INT(close_(dev), 0);
    CHECK_INT(dlclose(lib), 0);
    return 0;
}
