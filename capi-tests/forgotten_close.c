/* A program that ends without qblk_close loses nothing that it wrote, however it ends.
 * RUN: static-exe */
#include "test.h"
#include <pthread.h>

enum { BLOCK = 5000, BLOCKS = 300 };

static void write_all(qblk *dev)
{
    unsigned char bytes[BLOCK];
    for (int i = 0; i < BLOCKS; i++) {
        fill(bytes, BLOCK, (uint64_t)i + 1);
        OK(qblk_pwrite(dev, bytes, BLOCK, (uint64_t)i * 70000));
    }
}

static void *exit_from_a_thread(void *arg)
{
    (void)arg;
    exit(0);
}

static void *write_for_ever(void *arg)
{
    qblk *dev = (qblk *)arg;
    unsigned char bytes[BLOCK];
    uint64_t state = (uint64_t)(uintptr_t)&bytes;
    /* The program ends meanwhile; from some moment on the device is closed. */
    for (;;) {
        fill(bytes, BLOCK, 999);
        int rc = qblk_pwrite(dev, bytes, BLOCK, 25000000 + random_next(&state) % 1000 * BLOCK);
        if (rc != 0) {
            CHECK_INT(rc, -EBADF);
            pause();
        }
    }
    return NULL;
}

static int child(const char *how, const char *file)
{
    pthread_t t;
    qblk *dev = must_open(file, QBLK_OPEN_RDWR), *context;
    write_all(dev);
    if (strcmp(how, "context") == 0) {
        OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
        OK(qblk_close(dev));
    } else if (strcmp(how, "exit") == 0) {
        exit(0);
    } else if (strcmp(how, "thread") == 0) {
        CHECK_INT(pthread_create(&t, NULL, exit_from_a_thread, NULL), 0);
        pause();
    } else if (strcmp(how, "busy") == 0) {
        CHECK_INT(pthread_create(&t, NULL, write_for_ever, dev), 0);
        CHECK_INT(pthread_create(&t, NULL, write_for_ever, dev), 0);
        usleep(20000);
    }
    return 0;
}

static void parent(const char *how)
{
    unsigned char want[BLOCK], found[BLOCK];
    qblk *dev = new_device("qcow2", 40000000);
    OK(qblk_close(dev));
    CHECK_INT(run_self(how, "qcow2"), 0);
    dev = must_open("qcow2", 0);
    for (int i = 0; i < BLOCKS; i++) {
        fill(want, BLOCK, (uint64_t)i + 1);
        OK(qblk_pread(dev, found, BLOCK, (uint64_t)i * 70000));
        CHECK_MEM(found, want, BLOCK);
    }
    OK(qblk_close(dev));
    int status = sh("qemu-img check -q qcow2");
    /* A write that the end of the program cut off may leave a cluster that nothing points to (3). */
    CHECK(status == 0 || (strcmp(how, "busy") == 0 && status == 3));
    remove("qcow2");
}

int main(int argc, char **argv)
{
    static const char *const ways[] = {"return", "exit", "thread", "context", "busy"};
    if (argc == 3)
        return child(argv[1], argv[2]);
    test_begin(argv);
    alarm(300);
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++)
        parent(ways[i]);
    return 0;
}
