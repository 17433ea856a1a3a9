/* What cannot be opened: its code, and a text that names the file and what is wrong. */
#include "test.h"

static const unsigned char QCOW2_MAGIC[4] = {'Q', 'F', 'I', 0xfb};

/* The handle's place is NULL after each failure. */
#define OPEN_FAILS(name, flags, opts, code, part) \
    do { \
        qblk *dev_ = (qblk *)(uintptr_t)8; \
        FAILS(open_opt((name), (flags), &dev_, (opts)), (code), (part)); \
        CHECK(dev_ == NULL); \
    } while (0)

static void files(void)
{
    OPEN_FAILS("missing", 0, NULL, -ENOENT, "'missing': open: No such file or directory");
    OPEN_FAILS("missing", QBLK_OPEN_RDWR, NULL, -ENOENT, "'missing'");
    CHECK(!exists("missing"));
    OPEN_FAILS("no/such/dir", 0, NULL, -ENOENT, "'no/such/dir'");
    OPEN_FAILS("", 0, NULL, -EINVAL, "name is empty");
    OPEN_FAILS("file:", 0, NULL, -EINVAL, "file:");
    CHECK_INT(mkdir("dir", 0755), 0);
    OPEN_FAILS("dir", 0, NULL, -EISDIR, "'dir'");
    OPEN_FAILS("dir", QBLK_OPEN_RDWR, NULL, -EISDIR, "'dir'");
    make_file("plain", "x", 1, 1);
    OPEN_FAILS("plain/below", 0, NULL, -ENOTDIR, "'plain/below'");
    CHECK_INT(symlink("loop", "loop"), 0);
    OPEN_FAILS("loop", 0, NULL, -ELOOP, "'loop'");
    OPEN_FAILS("mem:", 0, NULL, -EINVAL, "mem:SIZE");
    OPEN_FAILS("mem:lots", 0, NULL, -EINVAL, "'mem:lots'");
    OPEN_FAILS("mem:16E", 0, NULL, -EINVAL, "mem:SIZE");
    OPEN_FAILS("nbd:localhost:1", 0, NULL, -EINVAL, "nbd://localhost:1");
    OPEN_FAILS("nbd+unix:///x?socket=missing", 0, NULL, -ENOENT, "missing");
    OPEN_FAILS("nbd+unix:///x?socket=missing", QBLK_OPEN_RDWR, NULL, -ENOENT, "missing");
    OPEN_FAILS("nbd+unix:///x?socket=missing", QBLK_OPEN_UNTRUSTED, NULL, -EINVAL, "'format'");

    /* A name that the system finds too long. */
    static char name[6000];
    memset(name, 'n', sizeof name - 1);
    OPEN_FAILS(name, 0, NULL, -ENAMETOOLONG, "'nnn");
    CHECK(strlen(qblk_get_error()) < 1024);
}

static void permission(void)
{
    qblk *dev;
    make_file("mine", "x", 1, 4096);
    make_file("readable", "x", 1, 4096);
    CHECK_INT(chmod("mine", 0), 0);
    CHECK_INT(chmod("readable", 0444), 0);
    /* Root may do all, so ask as somebody else. */
    int root = geteuid() == 0;
    if (root)
        CHECK_INT(seteuid(65534), 0);
    OPEN_FAILS("mine", 0, NULL, -EACCES, "'mine': open: Permission denied");
    OPEN_FAILS("mine", QBLK_OPEN_RDWR, NULL, -EACCES, "'mine'");
    OPEN_FAILS("readable", QBLK_OPEN_RDWR, NULL, -EACCES, "'readable'");
    OK(qblk_open("readable", 0, &dev));
    OK(qblk_close(dev));
    if (root)
        CHECK_INT(seteuid(0), 0);
}

static void images(void)
{
    unsigned char header[512] = {0};
    make_file("empty", "", 0, 0);
    OPEN_FAILS("empty", 0, options("format", "qcow2", NULL), QBLK_EFORMAT, "'empty'");
    make_file("text", "hello", 5, 5);
    OPEN_FAILS("text", 0, options("format", "qcow2", NULL), QBLK_EFORMAT, "'text'");
    make_file("zeroes", "", 0, 1 << 20);
    OPEN_FAILS("zeroes", 0, options("format", "qcow2", NULL), QBLK_EFORMAT, "'zeroes'");
    /* Cut off behind the magic number. */
    make_file("cut", QCOW2_MAGIC, 4, 4);
    qblk *dev = NULL;
    int rc = qblk_open("cut", 0, &dev);
    CHECK(rc == QBLK_EFORMAT || rc == QBLK_ECORRUPT);
    CHECK_HAS(qblk_get_error(), "'cut'");
    /* Cut off behind the header, where the tables should be. */
    OK(qblk_create("whole.qcow2", "qcow2", 1 << 20, NULL));
    CHECK_SH("head -c 600 whole.qcow2 > cut.qcow2");
    rc = qblk_open("cut.qcow2", 0, &dev);
    CHECK(rc == QBLK_ECORRUPT || rc == -EIO);
    CHECK_HAS(qblk_get_error(), "'cut.qcow2'");
    /* A version that nobody knows. */
    memcpy(header, QCOW2_MAGIC, 4);
    header[7] = 9;
    make_file("v9", header, sizeof header, sizeof header);
    OPEN_FAILS("v9", 0, NULL, QBLK_EUNSUPPORTED, "9");
}

static void arguments(void)
{
    make_file("disk", "x", 1, 4096);
    OPEN_FAILS("disk", 256, NULL, -EINVAL, "0x100");
    OPEN_FAILS("disk", UINT32_MAX, NULL, -EINVAL, "flags");
    OPEN_FAILS("disk", QBLK_OPEN_RDWR | QBLK_OPEN_SHARED, NULL, -EINVAL, "QBLK_OPEN_SHARED");
    OPEN_FAILS("disk", QBLK_OPEN_UNTRUSTED, NULL, -EINVAL, "'format'");
    OPEN_FAILS("disk", 0, options("format", "qcow9", NULL), -EINVAL, "'qcow9'");
    OPEN_FAILS("disk", 0, options("formt", "raw", NULL), -EINVAL, "'format'");
    OPEN_FAILS("disk", 0, options("cluster-size", "64k", NULL), -EINVAL, "'cluster-size'");
    OPEN_FAILS("disk", 0, options("io", "fast", NULL), -EINVAL, "'io'");
    OPEN_FAILS("disk", 0, options("cache.l2-size", "many", NULL), -EINVAL, "'cache.l2-size'");
    OPEN_FAILS("disk", 0, options("implicit-open", "yes", NULL), -EINVAL, "'implicit-open'");
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    files();
    permission();
    images();
    arguments();
    return 0;
}
