/* Names are bytes: spaces, colons, quotes, new lines, not UTF-8, as long as the system has them;
 * for images and for what they are backed by. */
#include "test.h"

static void use(const char *name, const char *file)
{
    char buf[600], overlay[] = "overlay";
    unsigned char bytes[4];
    qblk *dev;
    OK(qblk_create(name, "raw", 100000, NULL));
    if (!exists(file))
        FAIL_("\"%s\" was not made as \"%s\"", name, file);
    OK(qblk_open(name, QBLK_OPEN_RDWR, &dev));
    OK(qblk_pwrite(dev, "data", 4, 50000));
    CHECK_INT(qblk_get_property(dev, "filename", buf, sizeof buf), strlen(name));
    CHECK_STR(buf, name);
    OK(qblk_close(dev));

    OK(create_opt(overlay, "qcow2", 100000, options("backing-file", name, "backing-fmt", "raw", NULL)));
    dev = must_open(overlay, QBLK_OPEN_RDWR);
    OK(qblk_pread(dev, bytes, 4, 50000));
    CHECK_MEM(bytes, "data", 4);
    CHECK_INT(qblk_get_property(dev, "backing-filename", buf, sizeof buf), strlen(name));
    CHECK_STR(buf, name);
    OK(qblk_close(dev));
    remove(file);
    remove(overlay);
}

int main(int argc, char **argv)
{
    char longest[256];
    (void)argc;
    test_begin(argv);
    use("plain", "plain");
    use("with space", "with space");
    use("\xff\xfe not utf-8 \x80", "\xff\xfe not utf-8 \x80");
    use("new\nline and \t tab", "new\nline and \t tab");
    use("quo'te\"s and \\", "quo'te\"s and \\");
    use("%s%n%d", "%s%n%d");
    use("\xc3\xa4\xe2\x82\xac", "\xc3\xa4\xe2\x82\xac");
    use("./co:lon", "co:lon");
    use("file:co:lon", "co:lon");
    use("file:nbd:x", "nbd:x");
    use("file:mem:5", "mem:5");
    use("file:file:x", "file:x");
    CHECK_INT(mkdir("dir:a", 0755), 0);
    use("file:dir:a/b", "dir:a/b");
    memset(longest, 'l', 255);
    longest[255] = 0;
    use(longest, longest);

    /* A backing file's name is seen from the image's directory, not from ours. */
    qblk *dev;
    CHECK_INT(mkdir("sub", 0755), 0);
    OK(qblk_create("sub/base", "raw", 1000, NULL));
    OK(create_opt("sub/top", "qcow2", 1000, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    dev = must_open("sub/top", 0);
    OK(qblk_close(dev));
    dev = must_open("file:sub/top", 0);
    OK(qblk_close(dev));
    CHECK_INT(chdir("sub"), 0);
    dev = must_open("top", 0);
    OK(qblk_close(dev));
    CHECK_INT(chdir(".."), 0);
    return 0;
}
