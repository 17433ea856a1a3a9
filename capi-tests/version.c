/* The version of header and library agree, and both say what they can do. */
#include "test.h"
#include <stddef.h>

#if !defined QBLK_HAVE_VERSION || !defined QBLK_HAVE_PREAD || !defined QBLK_HAVE_CONTEXT_OPEN
#error "functions without their macros"
#endif
#if defined QBLK_HAVE_PWRITE3
#error "a macro for a function that is not there"
#endif
#if QBLK_VERSION != (QBLK_VERSION_MAJOR << 24 | QBLK_VERSION_MINOR << 16 | QBLK_VERSION_MICRO)
#error "the version is not made of its parts"
#endif

int main(int argc, char **argv)
{
    static const char *const can[] = {"format:raw", "format:qcow2", "compress:zlib", "compress:deflate",
                                      "compress:zstd", "io:mmap", "mem", "file",
                                      "nbd", "nbd:client", "nbd:server", "nbd:tls", "plugins", "layers"};
    static const char *const cannot[] = {"", "format:", "format:qcow3", "FORMAT:RAW", "format:raw ", "nbd:", "nbd:psk", "\xff"};
    char text[32];
    (void)argc;
    test_begin(argv);
    CHECK_INT(qblk_version(), QBLK_VERSION);
    snprintf(text, sizeof text, "%d.%d.%d", QBLK_VERSION_MAJOR, QBLK_VERSION_MINOR, QBLK_VERSION_MICRO);
    CHECK_STR(qblk_version_string(), text);
    /* What pkg-config says; the runner tells. */
    const char *installed = getenv("QBLK_TEST_VERSION");
    if (!installed)
        FAIL_("run.sh sets QBLK_TEST_VERSION to: pkg-config --modversion qblk");
    CHECK_STR(installed, text);
    for (size_t i = 0; i < sizeof can / sizeof can[0]; i++)
        if (qblk_supports(can[i]) != 1)
            FAIL_("%s is not supported", can[i]);
    for (size_t i = 0; i < sizeof cannot / sizeof cannot[0]; i++)
        CHECK_INT(qblk_supports(cannot[i]), 0);

    CHECK_INT(sizeof(qblk_info), 256);
    CHECK_INT(offsetof(qblk_info, state), 40);
    CHECK_INT(offsetof(qblk_info, format), 52);
    CHECK_INT(offsetof(qblk_info, reserved) + sizeof(((qblk_info *)0)->reserved), 256);
    CHECK_INT(sizeof(qblk_extent), 48);
    CHECK_INT(offsetof(qblk_extent, depth), 28);
    CHECK_INT(sizeof(qblk_status), 16);
    CHECK_INT(offsetof(qblk_status, flags), 8);
    /* The values that programs are compiled with. */
    CHECK_INT(QBLK_OPEN_RDWR | QBLK_OPEN_NO_BACKING | QBLK_OPEN_INFO_ONLY | QBLK_OPEN_UNTRUSTED |
                  QBLK_OPEN_SHARED | QBLK_OPEN_NO_LOCK | QBLK_OPEN_DIRECT, 127);
    CHECK(QBLK_REQ_FUA == 1 && QBLK_REQ_MAY_TRIM == 2 && QBLK_REQ_FAST_ZERO == 4);
    CHECK(QBLK_RESIZE_SHRINK == 1 && QBLK_STATE_ROTATIONAL == 256 && QBLK_EXTENT_HOST == 16);
    CHECK(QBLK_EXPORT_RDONLY == 1);
    CHECK(QBLK_LOG_ERROR == 1 && QBLK_LOG_TRACE == 5);
    return 0;
}
