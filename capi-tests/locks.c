/* Locks: two handles conflict, contexts do not; the text says who; waiting; reopening; the state. */
#include "test.h"

static int is_locked(qblk *dev)
{
    qblk_info info;
    OK(qblk_get_info(dev, &info));
    return (info.state & QBLK_STATE_LOCKED) != 0;
}

static void pairs(const char *name)
{
    qblk *dev = must_open(name, QBLK_OPEN_RDWR), *other, *context;
    char pid[32];
    snprintf(pid, sizeof pid, "this process, %d", (int)getpid());
    CHECK(is_locked(dev));
    FAILS(qblk_open(name, QBLK_OPEN_RDWR, &other), QBLK_ELOCKED, pid);
    CHECK(other == NULL);
    CHECK_HAS(qblk_get_error(), "permission \"");
    CHECK_HAS(qblk_get_error(), name);
    FAILS(qblk_open(name, 0, &other), QBLK_ELOCKED, "permission \"write\"");
    FAILS(qblk_create(name, "raw", 512, NULL), QBLK_ELOCKED, "not overwritten");

    /* Who asks for less gets in. */
    static const uint32_t less[] = { QBLK_OPEN_SHARED, QBLK_OPEN_INFO_ONLY, QBLK_OPEN_NO_LOCK };
    for (size_t i = 0; i < sizeof less / sizeof *less; i++) {
        OK(qblk_open(name, less[i], &other));
        CHECK_INT(is_locked(other), less[i] != QBLK_OPEN_NO_LOCK);
        OK(qblk_close(other));
    }
    OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
    OK(qblk_close(dev));
    FAILS(qblk_open(name, QBLK_OPEN_RDWR, &other), QBLK_ELOCKED, name);
    OK(qblk_close(context));

    /* Readers share; one of them cannot turn into a writer while the other is there. */
    OK(qblk_open(name, 0, &dev));
    OK(qblk_open(name, 0, &other));
    FAILS(qblk_reopen(dev, QBLK_OPEN_RDWR), QBLK_ELOCKED, name);
    OK(qblk_close(other));
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    FAILS(qblk_open(name, 0, &other), QBLK_ELOCKED, name);
    OK(qblk_reopen(dev, 0));
    OK(qblk_open(name, 0, &other));
    OK(qblk_close(other));
    OK(qblk_close(dev));
}

static void options_of_locks(const char *name)
{
    qblk *dev = must_open(name, QBLK_OPEN_RDWR), *other;
    qblk_options *o = options("lock-wait", "0.05", NULL);
    FAILS(qblk_open2(name, o, QBLK_OPEN_RDWR, &other), QBLK_ELOCKED, "waited 0.");
    OK(qblk_options_set(o, "lock-wait", "soon"));
    FAILS(qblk_open2(name, o, 0, &other), -EINVAL, "lock-wait");
    OK(qblk_options_set(o, "lock-wait", NULL));
    OK(qblk_options_set(o, "lock", "off"));
    OK(qblk_open2(name, o, QBLK_OPEN_RDWR, &other));
    CHECK(!is_locked(other));
    OK(qblk_close(other));
    OK(qblk_close(dev));
    OK(qblk_options_set(o, "lock", "on"));
    OK(qblk_options_set(o, "lock_exclusive", "on"));
    OK(qblk_open2(name, o, QBLK_OPEN_RDWR, &dev));
    FAILS(qblk_open(name, QBLK_OPEN_SHARED, &other), QBLK_ELOCKED, "consistent read");
    OK(qblk_close(dev));
    qblk_options_free(o);
}

int main(int argc, char **argv)
{
    qblk *dev;
    (void)argc;
    test_begin(argv);
    OK(qblk_create("raw", "raw", 1 << 20, NULL));
    OK(qblk_create("qcow2", "qcow2", 1 << 20, NULL));
    pairs("raw");
    pairs("qcow2");
    options_of_locks("raw");
    options_of_locks("qcow2");

    /* QEMU's programs keep out, and say so. */
    dev = must_open("qcow2", QBLK_OPEN_RDWR);
    CHECK(sh("qemu-io -f qcow2 -c 'read 0 512' qcow2 2>&1 | grep -q 'Failed to get \"write\" lock'") == 0);
    CHECK_SH("qemu-io -r -U -f qcow2 -c 'read 0 512' qcow2 >/dev/null");
    OK(qblk_close(dev));
    CHECK_SH("qemu-io -f qcow2 -c 'write 0 512' qcow2 >/dev/null");
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    CHECK(!is_locked(dev));
    OK(qblk_close(dev));
    return 0;
}
