/* A child of fork may close what it inherited, and nothing else; its end changes nothing for the
 * parent, and no lock that a thread of the parent held stops it. RUN: fork */
#include "test.h"
#include <pthread.h>

static qblk *dev, *context;
static qblk_options *opts;
static volatile int stop;

static void child_may_only_close(void)
{
    char c = 0;
    qblk *other = NULL;
    qblk_options *o = NULL;
    qblk_info info;
    qblk_extent e;
    struct iovec iov = {&c, 1};
    const char *text = "forked child";
    FAILS(qblk_pread(dev, &c, 1, 0), -ECHILD, text);
    FAILS(qblk_pread2(dev, &c, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_pwrite(dev, &c, 1, 0), -ECHILD, text);
    FAILS(qblk_pwrite2(dev, &c, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_preadv(dev, &iov, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_pwritev(dev, &iov, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_flush(dev), -ECHILD, text);
    FAILS(qblk_zero(dev, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_trim(dev, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_cache(dev, 1, 0, 0), -ECHILD, text);
    FAILS(qblk_get_info(dev, &info), -ECHILD, text);
    FAILS(qblk_get_property(dev, "filename", &c, 1), -ECHILD, text);
    FAILS(qblk_extents(dev, 1, 0, 0, &e, 1), -ECHILD, text);
    FAILS(qblk_resize(dev, 1, QBLK_RESIZE_SHRINK), -ECHILD, text);
    FAILS(qblk_resize2(dev, 1, opts, QBLK_RESIZE_SHRINK), -ECHILD, text);
    FAILS(qblk_write_compressed(dev, &c, 1, 0), -ECHILD, text);
    FAILS(qblk_copy(dev, dev, NULL, 0, NULL, NULL), -ECHILD, text);
    FAILS(qblk_commit(dev, 0, NULL, NULL), -ECHILD, text);
    FAILS(qblk_rebase(dev, NULL, NULL, 0, NULL, NULL), -ECHILD, text);
    FAILS(qblk_reopen(dev, 0), -ECHILD, text);
    FAILS(qblk_reopen2(dev, opts, 0), -ECHILD, text);
    FAILS(qblk_layer_push(dev, "readonly", NULL, 0), -ECHILD, text);
    FAILS(qblk_context_open(dev, NULL, 0, &other), -ECHILD, text);
    FAILS(qblk_open("mem:1M", 0, &other), -ECHILD, text);
    FAILS(qblk_open2("mem:1M", opts, 0, &other), -ECHILD, text);
    FAILS(qblk_open_fd(0, NULL, 0, &other), -ECHILD, text);
    FAILS(qblk_create("new", "raw", 1, NULL), -ECHILD, text);
    FAILS(qblk_options_new(&o), -ECHILD, text);
    FAILS(qblk_options_set(opts, "a", "b"), -ECHILD, text);
    FAILS(qblk_set_log(NULL, NULL, 0), -ECHILD, text);
    CHECK(!exists("new") && other == NULL && o == NULL);
    CHECK_INT(qblk_version(), QBLK_VERSION);
    CHECK_STR(qblk_strerror(0), "success");
    OK(qblk_close(context));
    OK(qblk_close(dev));
    OK(qblk_close(NULL));
    qblk_options_free(opts);
}

static int wait_for(pid_t pid)
{
    int status;
    CHECK(pid > 0);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    return status;
}

static void *busy(void *arg)
{
    unsigned char bytes[3000];
    uint64_t state = (uint64_t)(uintptr_t)arg;
    qblk *mine;
    for (int n = 0; !stop; n++) {
        fill(bytes, sizeof bytes, 5);
        OK(qblk_pwrite(dev, bytes, sizeof bytes, 1000000 + random_next(&state) % 30000000));
        if (n % 7 == 0)
            OK(qblk_flush(dev));
        if (n % 5 == 0) {
            OK(qblk_context_open(dev, NULL, 0, &mine));
            OK(qblk_close(mine));
        }
    }
    return NULL;
}

static void a_child_in_the_middle_of_calls(int children)
{
    pthread_t t[2];
    stop = 0;
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_create(&t[i], NULL, busy, (void *)(intptr_t)(i + 1)), 0);
    for (int i = 0; i < children; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            /* Ended by the signal if it hangs. */
            char c;
            alarm(20);
            CHECK_INT(qblk_pread(dev, &c, 1, 0), -ECHILD);
            CHECK_INT(qblk_close(context), 0);
            if (i % 2)
                CHECK_INT(qblk_close(dev), 0);
            /* Half of them forget it, and run the library's end. */
            exit(0);
        }
        CHECK_INT(wait_for(pid), 0);
    }
    stop = 1;
    for (int i = 0; i < 2; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
}

int main(int argc, char **argv)
{
    unsigned char want[5000], found[5000];
    (void)argc;
    test_begin(argv);
    dev = new_device("qcow2", 40000000);
    OK(qblk_context_open(dev, NULL, 0, &context));
    opts = options("format", "raw", NULL);
    fill(want, sizeof want, 1);
    OK(qblk_pwrite(dev, want, sizeof want, 500));

    pid_t pid = fork();
    if (pid == 0) {
        alarm(60);
        child_may_only_close();
        exit(0);
    }
    CHECK_INT(wait_for(pid), 0);
    a_child_in_the_middle_of_calls(quick() ? 6 : 60);

    /* The parent goes on as if nothing had been. */
    OK(qblk_pread(context, found, sizeof found, 500));
    CHECK_MEM(found, want, sizeof found);
    fill(want, sizeof want, 2);
    OK(qblk_pwrite(dev, want, sizeof want, 600000));
    OK(qblk_close(context));
    OK(qblk_close(dev));
    qblk_options_free(opts);
    dev = must_open("qcow2", 0);
    OK(qblk_pread(dev, found, sizeof found, 600000));
    CHECK_MEM(found, want, sizeof found);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
    return 0;
}
