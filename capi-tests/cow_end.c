/* A program that ends while a call hangs on a device whose layer has changes to commit at close: they are
 * lost, and that is said. Where no call hangs they are committed. */
#include "test.h"
#include <pthread.h>

enum { CHANGED = 8192, SIZE = 1 << 20 };

static void *read_for_ever(void *arg)
{
    char byte;
    qblk_pread((qblk *)arg, &byte, 1, 65536);
    return NULL;
}

/* how: "hangs", "ends", or "dropped" (a call hangs, and nothing is to be committed). */
static int child(const char *how, const char *layers)
{
    unsigned char bytes[CHANGED];
    pthread_t t;
    qblk *dev;
    CHECK(freopen("said", "w", stderr) != NULL);
    CHECK(setenv("QBLK_LOG", "error", 1) == 0);
    OK(open_opt("raw", QBLK_OPEN_RDWR, &dev, options("format", "raw", "layers", layers, NULL)));
    fill(bytes, CHANGED, 7);
    OK(qblk_pwrite(dev, bytes, CHANGED, 4096));
    if (strcmp(how, "ends") != 0) {
        CHECK_INT(pthread_create(&t, NULL, read_for_ever, dev), 0);
        usleep(200000);
    }
    exit(0);
}

static void parent(const char *how, const char *layers)
{
    unsigned char want[CHANGED], found[CHANGED];
    char said[4096] = "";
    qblk *dev = new_device("raw", SIZE);
    OK(qblk_close(dev));
    CHECK_INT(run_self(how, layers), 0);
    FILE *f = fopen("said", "r");
    CHECK(f != NULL);
    said[fread(said, 1, sizeof said - 1, f)] = '\0';
    fclose(f);
    if (strcmp(how, "hangs") == 0) {
        CHECK_HAS(said, "'raw'");
        CHECK_HAS(said, "8192 bytes of changes that layer 'cow' was to commit are lost");
    } else {
        CHECK_STR(said, "");
    }
    fill(want, CHANGED, 7);
    if (strcmp(how, "ends") != 0)
        memset(want, 0, CHANGED);
    dev = must_open("raw", 0);
    OK(qblk_pread(dev, found, CHANGED, 4096));
    CHECK_MEM(found, want, CHANGED);
    OK(qblk_close(dev));
    remove("raw");
    remove("said");
}

int main(int argc, char **argv)
{
    if (argc == 3)
        return child(argv[1], argv[2]);
    test_begin(argv);
    alarm(300);
    parent("ends", "delay,cow;commit=on");
    parent("hangs", "delay;read=1000s,cow;commit=on");
    /* Also under others, which know nothing of it. */
    parent("hangs", "cow;commit=on;store=memory,stats,delay;read=1000s");
    parent("dropped", "delay;read=1000s,cow");
    return 0;
}
