/* Contexts: several ways into one source, with one truth about every byte. */
#include "test.h"

static void sharing(const char *kind)
{
    char buf[4];
    qblk *a = new_device(kind, 1 << 20), *b, *c, *d;
    OK(qblk_context_open(a, NULL, QBLK_OPEN_RDWR, &b));
    OK(qblk_context_open(b, NULL, 0, &c));
    OK(qblk_pwrite(a, "from", 4, 100));
    OK(qblk_pread(b, buf, 4, 100));
    CHECK_MEM(buf, "from", 4);
    OK(qblk_pwrite(b, "back", 4, 300000));
    OK(qblk_pread(a, buf, 4, 300000));
    CHECK_MEM(buf, "back", 4);
    OK(qblk_pread(c, buf, 4, 300000));
    CHECK_MEM(buf, "back", 4);

    /* Each has its own flags. */
    FAILS(qblk_pwrite(c, "none", 4, 0), -EROFS, "read-only");
    FAILS(qblk_zero(c, 4, 0, 0), -EROFS, "read-only");
    qblk_info info;
    OK(qblk_get_info(c, &info));
    CHECK(info.state & QBLK_STATE_READ_ONLY);
    OK(qblk_get_info(b, &info));
    CHECK(!(info.state & QBLK_STATE_READ_ONLY));

    /* What one does to the size, all see. */
    OK(qblk_resize(b, 2 << 20, 0));
    CHECK_INT(device_size(a), 2 << 20);
    OK(qblk_pread(c, buf, 4, (2 << 20) - 4));

    d = (qblk *)(uintptr_t)8;
    FAILS(qblk_context_open(a, NULL, QBLK_OPEN_DIRECT, &d), -EINVAL, "context");
    CHECK(d == NULL);
    FAILS(qblk_context_open(a, NULL, 1u << 30, &d), -EINVAL, "context");
    qblk_options *o = options("format", "raw", NULL);
    FAILS(qblk_context_open(a, o, 0, &d), -EINVAL, "'format'");
    qblk_options_free(o);

    /* The first may go first; the device lives as long as its last. */
    OK(qblk_close(a));
    OK(qblk_pwrite(b, "more", 4, 700000));
    OK(qblk_pread(c, buf, 4, 700000));
    CHECK_MEM(buf, "more", 4);
    OK(qblk_close(b));
    OK(qblk_pread(c, buf, 4, 700000));
    CHECK_MEM(buf, "more", 4);
    OK(qblk_close(c));
}

int main(int argc, char **argv)
{
    char buf[4];
    qblk *a, *b = NULL;
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    sharing(kind);
    CHECK_SH("qemu-img check -q qcow2");
    /* All was in the file when the last one had gone. */
    a = must_open("qcow2", 0);
    OK(qblk_pread(a, buf, 4, 700000));
    CHECK_MEM(buf, "more", 4);
    /* A device that is open for reading has no writing contexts. */
    FAILS(qblk_context_open(a, NULL, QBLK_OPEN_RDWR, &b), -EROFS, "read-only");
    CHECK(b == NULL);
    OK(qblk_close(a));
    return 0;
}
