/* Encrypted images: a key is asked for, checked, and given by option; without one the image is
 * still described. */
#include "test.h"

static void locked(const char *name, const char *format)
{
    qblk *dev = NULL;
    qblk_info info;
    char c = 0;
    FAILS(qblk_open(name, 0, &dev), QBLK_ENEEDKEY, name);
    CHECK_HAS(qblk_get_error(), "'key-file'");
    FAILS(open_opt(name, 0, &dev, options("key", "wrong", NULL)), QBLK_EBADKEY, name);
    dev = must_open(name, QBLK_OPEN_INFO_ONLY);
    OK(qblk_get_info(dev, &info));
    CHECK_STR(info.format, format);
    CHECK_INT(info.size, 1 << 20);
    CHECK_INT(info.state & QBLK_STATE_ENCRYPTED, QBLK_STATE_ENCRYPTED);
    FAILS(qblk_pread(dev, &c, 1, 0), -EBADF, "QBLK_OPEN_INFO_ONLY");
    OK(qblk_close(dev));
    OK(open_opt(name, QBLK_OPEN_RDWR, &dev, options("key", "secret", NULL)));
    OK(qblk_pwrite(dev, "hello", 5, 1000));
    OK(qblk_close(dev));
    make_file("key", "secret", 6, 6);
    OK(open_opt(name, 0, &dev, options("key-file", "key", NULL)));
    OK(qblk_pread(dev, &c, 1, 1004));
    CHECK_INT(c, 'o');
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    CHECK_INT(qblk_supports("format:luks"), 1);

    CHECK_SH("qemu-img create -q -f qcow2 --object secret,id=s,data=secret "
             "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 theirs 1M");
    locked("theirs", "qcow2");
    OK(create_opt("ours", "qcow2", 1 << 20,
                  options("encrypt.format", "luks", "encrypt.iter-time", "10", "key", "secret", NULL)));
    locked("ours", "qcow2");
    OK(create_opt("luks", "luks", 1 << 20, options("iter-time", "10", "key", "secret", NULL)));
    locked("luks", "luks");

    FAILS(create_opt("new", "luks", 1 << 20, NULL), QBLK_ENEEDKEY, "new");
    CHECK(!exists("new"));
    return 0;
}
