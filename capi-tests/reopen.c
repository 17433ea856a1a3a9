/* Reopening: from reading to writing and back beneath the same handle; a failure leaves the old. */
#include "test.h"

static void there_and_back(const char *kind)
{
    char buf[4];
    qblk *dev = new_device(kind, 1 << 20), *context;
    OK(qblk_pwrite(dev, "one ", 4, 0));
    OK(qblk_reopen(dev, 0));
    FAILS(qblk_pwrite(dev, "no", 2, 0), -EROFS, "read-only");
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "one ", 4);
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pwrite(dev, "two ", 4, 200000));
    OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
    OK(qblk_reopen(dev, 0));
    /* A context that would write finds the device closed to that. */
    FAILS(qblk_pwrite(context, "no", 2, 0), -EROFS, "read-only");
    OK(qblk_pread(context, buf, 4, 200000));
    CHECK_MEM(buf, "two ", 4);
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pwrite(context, "3", 1, 200000));
    OK(qblk_close(context));
    OK(qblk_pread(dev, buf, 4, 200000));
    CHECK_MEM(buf, "3wo ", 4);

    /* Bad arguments and a file that went away: all stays as it was. */
    FAILS(qblk_reopen(dev, 1u << 20), -EINVAL, "flags");
    qblk_options *o = options("formt", "raw", NULL);
    FAILS(qblk_reopen2(dev, o, QBLK_OPEN_RDWR), -EINVAL, "'formt'");
    qblk_options_free(o);
    if (strcmp(kind, "mem") == 0) {
        OK(qblk_close(dev));
        return;
    }
    CHECK_INT(rename(kind, "away"), 0);
    FAILS(qblk_reopen(dev, 0), -ENOENT, "No such file");
    OK(qblk_pwrite(dev, "4", 1, 200001));
    OK(qblk_pread(dev, buf, 4, 200000));
    CHECK_MEM(buf, "34o ", 4);
    CHECK_INT(rename("away", kind), 0);
    OK(qblk_reopen(dev, 0));
    OK(qblk_pread(dev, buf, 4, 200000));
    CHECK_MEM(buf, "34o ", 4);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    unsigned char buf[4];
    qblk *dev;
    (void)argc;
    test_begin(argv);
    there_and_back("raw");
    there_and_back("qcow2");
    there_and_back("mem");
    CHECK_SH("qemu-img check -q qcow2");

    /* Seen from another directory it is still the same file. */
    CHECK_INT(mkdir("elsewhere", 0755), 0);
    dev = must_open("qcow2", 0);
    CHECK_INT(chdir("elsewhere"), 0);
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "one ", 4);
    OK(qblk_close(dev));
    CHECK_INT(chdir(".."), 0);

    /* With options: the bytes of the qcow2 image itself, then its contents again. */
    dev = must_open("qcow2", 0);
    qblk_options *o = options("format", "raw", NULL);
    OK(qblk_reopen2(dev, o, 0));
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "QFI\xfb", 4);
    /* NULL, and qblk_reopen, keep the options that are in force. */
    OK(qblk_reopen2(dev, NULL, 0));
    OK(qblk_reopen(dev, 0));
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "QFI\xfb", 4);
    OK(qblk_options_set(o, "format", "qcow2"));
    OK(qblk_reopen2(dev, o, 0));
    OK(qblk_pread(dev, buf, 4, 0));
    CHECK_MEM(buf, "one ", 4);
    qblk_options_free(o);
    OK(qblk_close(dev));
    return 0;
}
