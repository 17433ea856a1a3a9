/* What a device tells of itself: qblk_get_info and qblk_get_property. */
#include "test.h"

static void fields(const char *kind)
{
    qblk_info info;
    qblk *dev = new_device(kind, 1000001);
    memset(&info, 0xaa, sizeof info);
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 1000001);
    CHECK(info.allocated == UINT64_MAX || info.allocated < 1000001);
    CHECK(info.request_alignment >= 1);
    CHECK(info.optimal_io_size >= 1);
    CHECK_INT(info.cluster_size, strcmp(kind, "qcow2") == 0 ? 65536 : 0);
    CHECK_INT(info.backing_depth, 0);
    CHECK_INT(info.state & ~(uint32_t)(QBLK_STATE_PROBED | QBLK_STATE_LOCKED | QBLK_STATE_ROTATIONAL), 0);
    CHECK_STR(info.format, strcmp(kind, "mem") == 0 ? "raw" : kind);
    CHECK_STR(info.driver, strcmp(kind, "mem") == 0 ? "mem" : "file");
    const uint8_t cans[] = {info.can_flush, info.can_fua, info.can_trim, info.can_zero,
                            info.can_fast_zero, info.can_cache, info.can_extents, info.can_multi_conn};
    for (int i = 0; i < 8; i++)
        CHECK(cans[i] <= QBLK_CAN_NATIVE);
    CHECK(info.can_flush != QBLK_CAN_NOT && info.can_extents != QBLK_CAN_NOT);
    CHECK(all_zero(info.reserved, sizeof info.reserved));
    CHECK(memchr(info.format, 0, 32) && memchr(info.driver, 0, 32));
    /* Space in use follows what is written. */
    static unsigned char data[500000];
    fill(data, sizeof data, 1);
    OK(qblk_pwrite(dev, data, sizeof data, 0));
    OK(qblk_flush(dev));
    const uint64_t before = info.allocated;
    OK(qblk_get_info(dev, &info));
    CHECK(info.allocated == UINT64_MAX || info.allocated >= before + 400000);
    OK(qblk_close(dev));
}

static void properties(void)
{
    char buf[2048], value[256];
    OK(qblk_create("base", "raw", 1 << 20, NULL));
    OK(create_opt("top", "qcow2", 1 << 20, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    qblk *dev = must_open("top", 0);

    /* As snprintf: the length, whatever the room. */
    CHECK_INT(qblk_get_property(dev, "backing-filename", NULL, 0), 4);
    memset(buf, '#', sizeof buf);
    CHECK_INT(qblk_get_property(dev, "backing-filename", buf, 1), 4);
    CHECK(buf[0] == 0 && buf[1] == '#');
    CHECK_INT(qblk_get_property(dev, "backing-filename", buf, 4), 4);
    CHECK(memcmp(buf, "bas\0#", 5) == 0);
    CHECK_INT(qblk_get_property(dev, "backing-filename", buf, 5), 4);
    CHECK(memcmp(buf, "base\0#", 6) == 0);
    CHECK_STR(qblk_get_error(), "");
    CHECK_INT(qblk_get_property(dev, "filename", buf, sizeof buf), 3);
    CHECK_STR(buf, "top");
    CHECK_INT(qblk_get_property(dev, "backing-format", buf, sizeof buf), 3);
    CHECK_STR(buf, "raw");
    CHECK(qblk_get_property(dev, "qcow2.compat", buf, sizeof buf) > 0);
    CHECK_STR(buf, "1.1");

    FAILS(qblk_get_property(dev, "nonsense", buf, sizeof buf), -ENOENT, "'nonsense'");
    FAILS(qblk_get_property(dev, "", buf, sizeof buf), -ENOENT, "''");
    FAILS(qblk_get_property(dev, "\xff", buf, sizeof buf), -ENOENT, "'\\xff'");
    FAILS(qblk_get_property(dev, "Filename", buf, sizeof buf), -ENOENT, "properties");

    /* All of those that are listed are there. */
    const int64_t n = qblk_get_property(dev, "properties", buf, sizeof buf);
    CHECK(n > 0 && n < (int64_t)sizeof buf);
    CHECK_INT(strlen(buf), n);
    int lines = 0, seen = 0;
    for (char *key = strtok(buf, "\n"); key; key = strtok(NULL, "\n")) {
        CHECK(qblk_get_property(dev, key, value, sizeof value) >= 0);
        seen += strcmp(key, "filename") == 0 || strcmp(key, "backing-filename") == 0 ||
                strcmp(key, "qcow2.refcount-bits") == 0;
        lines++;
    }
    CHECK(lines >= 6);
    CHECK_INT(seen, 3);
    OK(qblk_close(dev));

    dev = must_open("base", 0);
    FAILS(qblk_get_property(dev, "qcow2.compat", buf, sizeof buf), -ENOENT, "'qcow2.compat'");
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    fields(kind);
    properties();
    return 0;
}
