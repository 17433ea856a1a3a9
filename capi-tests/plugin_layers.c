/* Layers written in C: on what they stand, what they let through and what never passes around them; with
 * threads and contexts of their own; in stacks; at the end of a program that closes nothing.
 * RUN: plugin */
#include "test.h"

#define QBLK_API_VERSION 2
#include <qblk-plugin.h>
#include <pthread.h>

static char list_[8 * PATH_MAX];

/* layers= with plugins that were built for the tests: %s stands for where they are. */
static const char *layers(const char *format)
{
    const char *dir = getenv("QBLK_TEST_PLUGINS");
    CHECK(dir != NULL);
    list_[0] = 0;
    for (const char *p = format; *p; p++) {
        size_t n = strlen(list_);
        if (*p == '@')
            snprintf(list_ + n, sizeof list_ - n, "%s/", dir);
        else
            snprintf(list_ + n, sizeof list_ - n, "%c", *p);
    }
    return list_;
}

static void has_property(qblk *dev, const char *key, const char *want)
{
    char buf[512];
    CHECK(qblk_get_property(dev, key, buf, sizeof buf) >= 0);
    CHECK_STR(buf, want);
}

/* What a layer makes of zeroes. */
static void key_stream(const char *list, unsigned char *out, size_t n, uint64_t at)
{
    static const unsigned char zeroes[100000] = {0};
    qblk *dev;
    OK(qblk_create("zeroes", "raw", 8 << 20, NULL));
    OK(open_opt("zeroes", QBLK_OPEN_RDWR, &dev, options("format", "raw", "layers", layers(list), NULL)));
    OK(qblk_pwrite(dev, zeroes, n, at));
    OK(qblk_close(dev));
    OK(open_opt("zeroes", 0, &dev, options("format", "raw", NULL)));
    OK(qblk_pread(dev, out, n, at));
    OK(qblk_close(dev));
    CHECK_INT(remove("zeroes"), 0);
}

static void cipher(const char *format)
{
    /* RFC 8439, appendix A.1, test vectors 1 and 2: the beginnings of two blocks. */
    static const unsigned char one[] = {0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90, 0x40, 0x5d, 0x6a, 0xe5,
                                        0x53, 0x86, 0xbd, 0x28};
    static const unsigned char two[] = {0x9f, 0x07, 0xe7, 0xbe, 0x55, 0x51, 0x38, 0x7a, 0x98, 0xba, 0x97, 0x7c,
                                        0x73, 0x2d, 0x08, 0x0d};
    enum { N = 100000 };
    static unsigned char a[N], b[N], k[N];
    qblk *dev;
    qblk_info info;
    qblk_extent e[4];
    key_stream("@layer-cipher.so", b, 80, 0);
    CHECK_MEM(b, one, sizeof one);
    CHECK_MEM(b + 64, two, sizeof two);
    OK(qblk_create("disk", format, 8 << 20, NULL));
    OK(open_opt("disk", QBLK_OPEN_RDWR, &dev, options("format", format, "layers", layers("@layer-cipher.so;key=5a"), NULL)));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.size, 8 << 20);
    /* Written zeroes are changed too; nothing is trimmed below, nothing is known to be a hole. */
    CHECK_INT(info.can_zero, QBLK_CAN_EMULATE);
    CHECK_INT(info.can_trim, QBLK_CAN_NOT);
    CHECK_INT(info.can_extents, QBLK_CAN_EMULATE);
    has_property(dev, "layers", "cipher");
    fill(a, N, 3);
    OK(qblk_pwrite(dev, a, N, 12345));
    OK(qblk_zero(dev, 5000, 20000, QBLK_REQ_MAY_TRIM));
    memset(a + 20000 - 12345, 0, 5000);
    OK(qblk_trim(dev, 50000, 30000, 0));
    OK(qblk_pwrite2(dev, "fua", 3, 15000, QBLK_REQ_FUA));
    memcpy(a + 15000 - 12345, "fua", 3);
    FAILS(qblk_zero(dev, 5000, 20000, QBLK_REQ_FAST_ZERO), -ENOTSUP, "fast");
    FAILS(qblk_write_compressed(dev, a, 65536, 0), -ENOTSUP, "");
    OK(qblk_cache(dev, 100000, 0, 0));
    OK(qblk_pread(dev, b, N, 12345));
    CHECK_MEM(b, a, N);
    CHECK(qblk_extents(dev, 8 << 20, 0, 0, e, 4) >= 1);
    CHECK_INT(e[0].length, 8 << 20);
    CHECK_INT(e[0].flags & (QBLK_EXTENT_ZERO | QBLK_EXTENT_HOST), 0);
    FAILS(qblk_pread(dev, b, 2, (8 << 20) - 1), -EINVAL, "leave");
    OK(qblk_close(dev));

    /* What is below is what was written, changed. */
    OK(open_opt("disk", 0, &dev, options("format", format, NULL)));
    OK(qblk_pread(dev, b, N, 12345));
    key_stream("@layer-cipher.so;key=5a", k, N, 12345);
    for (size_t i = 0; i < N; i++)
        b[i] ^= k[i];
    CHECK_MEM(b, a, N);
    OK(qblk_close(dev));
    /* Twice is other than once, and in a stack with layers of the library's own. */
    OK(open_opt("disk", QBLK_OPEN_RDWR, &dev, options("format", format, "layers", layers("@layer-cipher.so;key=1,offset;offset=1M,@layer-cipher.so;key=2"), NULL)));
    has_property(dev, "layers", "cipher,offset,cipher");
    OK(qblk_pwrite(dev, a, N, 1));
    OK(qblk_pread(dev, b, N, 1));
    CHECK_MEM(b, a, N);
    OK(qblk_close(dev));
    OK(open_opt("disk", 0, &dev, options("format", format, NULL)));
    OK(qblk_pread(dev, b, N, (1 << 20) + 1));
    key_stream("@layer-cipher.so;key=1", k, N, (1 << 20) + 1);
    for (size_t i = 0; i < N; i++)
        b[i] ^= k[i];
    key_stream("@layer-cipher.so;key=2", k, N, 1);
    for (size_t i = 0; i < N; i++)
        b[i] ^= k[i];
    CHECK_MEM(b, a, N);
    OK(qblk_close(dev));
    /* Read-only below is read-only above. */
    OK(open_opt("disk", 0, &dev, options("layers", layers("@layer-cipher.so"), NULL)));
    FAILS(qblk_pwrite(dev, "x", 1, 0), -EROFS, "read-only");
    OK(qblk_close(dev));
    FAILS(open_opt("disk", 0, &dev, options("layers", layers("@layer-cipher.so;colour=red"), NULL)), -EINVAL, "unknown setting");
    FAILS(open_opt("disk", 0, &dev, options("layers", layers("@memory1.so"), NULL)), -EINVAL, "open_layer");
    FAILS(open_opt("disk", 0, &dev, options("layers", "./gone.so", NULL)), -ENOENT, "gone.so");
    FAILS(open_opt("disk", 0, &dev, options("layers", "gone", NULL)), -EINVAL, "no layer 'gone'");
    snprintf(list_, sizeof list_, "plugin:%s/layer-cipher.so", getenv("QBLK_TEST_PLUGINS"));
    FAILS(qblk_open(list_, 0, &dev), -EINVAL, "is a layer");
}

static qblk *stack;

static void *writer(void *arg)
{
    unsigned char a[3000], b[3000];
    uint64_t base = *(const uint64_t *)arg;
    for (int i = 0; i < (quick() ? 50 : 400); i++) {
        uint64_t at = base + (uint64_t)(i * 77 % 5000);
        fill(a, sizeof a, base + (uint64_t)i);
        OK(qblk_pwrite2(stack, a, sizeof a, at, i % 16 == 0 ? QBLK_REQ_FUA : 0));
        OK(qblk_pread(stack, b, sizeof b, at));
        CHECK_MEM(b, a, sizeof a);
        if (i % 32 == 0)
            OK(qblk_flush(stack));
    }
    return NULL;
}

static void threads(const char *list, const char *names)
{
    static const uint64_t BASES[4] = {10000, 30000, 50000, 70000};
    pthread_t t[4];
    char buf[512];
    OK(open_opt("mem:1M", QBLK_OPEN_RDWR, &stack, options("layers", layers(list), NULL)));
    has_property(stack, "layers", names);
    OK(qblk_pwrite(stack, "seen from behind", 17, 0));
    for (int i = 0; i < 4; i++)
        CHECK_INT(pthread_create(&t[i], NULL, writer, (void *)(uintptr_t)&BASES[i]), 0);
    for (int i = 0; i < 4; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    for (int i = 0; i < 6000; i++) {
        if (strcmp(names, "thread") != 0)
            break;
        CHECK(qblk_get_property(stack, "plugin.dump", buf, sizeof buf) > 0);
        if (strcmp(buf, "looks=1 swaps=1 seen=seen from behind") == 0)
            break;
        CHECK(i < 5999);
        usleep(5000);
    }
    OK(qblk_close(stack));
}

/* --- in the program ----------------------------------------------------------------------- */

static qblk *next_;
static int set_next = 1, closes;
static qblk *pushed; /* the device that a layer is pushed on */

static void *own_open(void *opaque, qblk_source *source, uint32_t flags)
{
    qblk *wrong;
    CHECK(opaque == &set_next);
    FAILS(qblk_source_open(NULL, 0, &wrong), -EINVAL, "NULL");
    FAILS(qblk_source_open(source, QBLK_OPEN_DIRECT, &wrong), -EINVAL, "RDWR");
    if (!(flags & QBLK_OPEN_RDWR))
        FAILS(qblk_source_open(source, QBLK_OPEN_RDWR, &wrong), -EROFS, "read-only");
    FAILS(qblk_layer_set_next(NULL, NULL), -EINVAL, "NULL");
    OK(qblk_source_open(source, flags & QBLK_OPEN_RDWR, &next_));
    /* Methods would be passed in a circle; and while the layer is put on, that device waits for it. */
    if (pushed)
        FAILS(qblk_layer_set_next(source, pushed), -EINVAL, "no context of this source");
    if (set_next)
        OK(qblk_layer_set_next(source, next_));
    return next_;
}
static void own_close(void *handle)
{
    closes++;
    CHECK_INT(qblk_close((qblk *)handle), 0);
}
static int own_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    return qblk_pread2((qblk *)handle, buf, count, offset, flags);
}
static int own_pwrite(void *handle, const void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    return qblk_pwrite2((qblk *)handle, buf, count, offset, flags);
}

static qblk_plugin own(void)
{
    qblk_plugin p;
    memset(&p, 0, sizeof p);
    p.name = "own";
    p.open_layer = own_open;
    p.close = own_close;
    p.pread = own_pread;
    return p;
}

/* Two plugins that take one call at a time, one above the other here and below it there: two threads would
 * wait for each other. */
static void opposite(qblk_plugin p)
{
    qblk *one, *two;
    char buf[4];
    p.name = "other";
    OK(QBLK_REGISTER_PLUGIN(&p, &set_next));
    OK(open_opt("raw", 0, &one, options("layers", "own,other", NULL)));
    FAILS(open_opt("raw", 0, &two, options("layers", "other,own", NULL)), -EDEADLK, "plugin 'own' cannot be put above plugin 'other'");
    OK(open_opt("raw", 0, &two, options("layers", "other", NULL)));
    FAILS(qblk_layer_push(two, "own", NULL, 0), -EDEADLK, "cannot be put above");
    OK(qblk_pread(two, buf, 4, 1));
    CHECK_MEM(buf, "elow", 4);
    OK(qblk_close(one));
    OK(qblk_layer_push(two, "own", NULL, 0));
    OK(qblk_pread(two, buf, 4, 1));
    CHECK_MEM(buf, "elow", 4);
    OK(qblk_close(two));
    OK(qblk_unregister_plugin("other"));
}

static qblk_source *stuck_source;
static qblk *stuck_next[2], *to_close;
static int stuck_count;

static void *stuck_open(void *opaque, qblk_source *source, uint32_t flags)
{
    (void)opaque, (void)flags;
    stuck_source = source;
    OK(qblk_source_open(source, 0, &stuck_next[stuck_count]));
    OK(qblk_layer_set_next(source, stuck_next[stuck_count]));
    return stuck_next[stuck_count++];
}
static int stuck_pread(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    if (to_close) {
        qblk *dev = to_close;
        to_close = NULL;
        OK(qblk_close(dev));
    }
    return qblk_pread2((qblk *)handle, buf, count, offset, flags);
}

/* A device is closed where its plugin cannot be called: the instance stays open, and its source stays there
 * for threads of its own, though what is below is closed. */
static void never_closed(void)
{
    qblk *one, *two, *more;
    char buf[4];
    qblk_plugin p = own();
    p.name = "stuck";
    p.open_layer = stuck_open;
    p.pread = stuck_pread;
    OK(QBLK_REGISTER_PLUGIN(&p, NULL));
    OK(open_opt("raw", 0, &one, options("layers", "stuck", NULL)));
    OK(open_opt("raw", 0, &two, options("layers", "stuck", NULL)));
    to_close = two;
    closes = 0;
    OK(qblk_pread(one, buf, 4, 1));
    CHECK_INT(closes, 0);
    OK(qblk_close(one));
    CHECK_INT(closes, 1);
    FAILS(qblk_unregister_plugin("stuck"), -EBUSY, "open");
    OK(qblk_source_open(stuck_source, 0, &more));
    FAILS(qblk_pread(more, buf, 4, 1), -EBADF, "closed");
    FAILS(qblk_close(more), -EBADF, "closed");
    FAILS(qblk_close(stuck_next[1]), -EBADF, "closed");
}

static void in_the_program(void)
{
    qblk *dev;
    qblk_info info;
    qblk_extent e[4];
    char buf[4];
    qblk_plugin p = own();
    make_file("raw", "below", 5, 4 << 20);

    p.pread = NULL;
    FAILS(QBLK_REGISTER_PLUGIN(&p, &set_next), -EINVAL, "QBLK_METHOD_READ");

    /* All is passed on: as if it were not there, but for what has no name there. */
    p.passes = QBLK_METHOD_READ | QBLK_METHOD_WRITE | QBLK_METHOD_FLUSH | QBLK_METHOD_TRIM
               | QBLK_METHOD_ZERO | QBLK_METHOD_CACHE | QBLK_METHOD_EXTENTS | UINT64_C(1) << 60;
    OK(QBLK_REGISTER_PLUGIN(&p, &set_next));
    OK(open_opt("raw", QBLK_OPEN_RDWR, &dev, options("format", "raw", "layers", "own", NULL)));
    OK(qblk_get_info(dev, &info));
    CHECK_INT(info.can_fua, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_zero, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_trim, QBLK_CAN_NATIVE);
    CHECK_INT(info.can_extents, QBLK_CAN_NATIVE);
    OK(qblk_pread(dev, buf, 4, 1));
    CHECK_MEM(buf, "elow", 4);
    OK(qblk_pwrite2(dev, "B", 1, 0, QBLK_REQ_FUA));
    OK(qblk_zero(dev, 4096, 1 << 20, QBLK_REQ_MAY_TRIM | QBLK_REQ_FUA));
    OK(qblk_trim(dev, 4096, 2 << 20, QBLK_REQ_FUA));
    CHECK(qblk_extents(dev, 4 << 20, 0, 0, e, 4) >= 2);
    CHECK(e[1].flags & QBLK_EXTENT_ZERO);
    OK(qblk_flush(dev));
    FAILS(qblk_unregister_plugin("own"), -EBUSY, "open");
    OK(qblk_close(dev));
    CHECK_INT(closes, 1);
    OK(qblk_unregister_plugin("own"));

    /* Passed on to nothing. */
    set_next = 0;
    OK(QBLK_REGISTER_PLUGIN(&p, &set_next));
    FAILS(open_opt("raw", QBLK_OPEN_RDWR, &dev, options("layers", "own", NULL)), -EIO, "qblk_layer_set_next");
    CHECK_INT(closes, 2);
    OK(qblk_unregister_plugin("own"));
    set_next = 1;

    /* Written without a flush: nobody could make it last. Read-only it does. */
    p = own();
    p.pwrite = own_pwrite;
    OK(QBLK_REGISTER_PLUGIN(&p, &set_next));
    FAILS(open_opt("raw", QBLK_OPEN_RDWR, &dev, options("layers", "own", NULL)), -EIO, "flush, which a layer");
    OK(open_opt("raw", 0, &dev, options("layers", "own", NULL)));
    OK(qblk_pread(dev, buf, 4, 1));
    CHECK_MEM(buf, "elow", 4);
    OK(qblk_close(dev));
    /* One call at a time in the process: twice in a stack it would wait for itself. */
    FAILS(open_opt("raw", 0, &dev, options("layers", "own,own", NULL)), -EDEADLK, "in this stack already");
    FAILS(open_opt("raw", 0, &dev, options("layers", "own,offset,own", NULL)), -EDEADLK, "plugin 'own' takes one call");
    opposite(p);
    /* Pushed on what is open. */
    OK(open_opt("raw", 0, &dev, NULL));
    pushed = dev;
    OK(qblk_layer_push(dev, "own", NULL, 0));
    pushed = NULL;
    OK(qblk_pread(dev, buf, 4, 1));
    CHECK_MEM(buf, "elow", 4);
    FAILS(qblk_layer_push(dev, "own", NULL, 0), -EDEADLK, "in this stack already");
    OK(qblk_pread(dev, buf, 4, 1));
    OK(qblk_close(dev));
    OK(qblk_unregister_plugin("own"));

    /* What is below fails: its words come through, its code too. */
    p.thread_model = QBLK_THREAD_PARALLEL;
    OK(QBLK_REGISTER_PLUGIN(&p, &set_next));
    make_file("short", "x", 1, 1 << 20);
    OK(open_opt("short", 0, &dev, options("format", "raw", "layers", "own,own", NULL)));
    CHECK_INT(truncate("short", 0), 0);
    FAILS(qblk_pread(dev, buf, 4, 1), -EIO, "plugin 'own': pread of 4 bytes at offset 1: qblk_pread2: ");
    CHECK_HAS(qblk_get_error(), "short");
    OK(qblk_close(dev));
    OK(qblk_unregister_plugin("own"));
}

/* A layer that has what it stands on reopened, and a layer put on it, and then fails: the device is what it
 * was, as far as that goes. */
static void *failing_open(void *opaque, qblk_source *source, uint32_t flags)
{
    qblk *next;
    OK(qblk_source_open(source, flags & QBLK_OPEN_RDWR, &next));
    if (*(const int *)opaque > 0)
        OK(qblk_reopen(next, flags & QBLK_OPEN_RDWR));
    if (*(const int *)opaque > 1)
        OK(qblk_layer_push(next, "offset", NULL, 0));
    OK(qblk_close(next));
    qblk_plugin_error("no today");
    return NULL;
}

static void gives_back(const char *name)
{
    qblk *dev, *context;
    char buf[8];
    int how;
    qblk_plugin p = own();
    p.open_layer = failing_open;
    OK(QBLK_REGISTER_PLUGIN(&p, &how));
    OK(open_opt(name, QBLK_OPEN_RDWR, &dev, options("format", "raw", NULL)));
    OK(qblk_context_open(dev, NULL, QBLK_OPEN_RDWR, &context));
    for (how = 0; how < 3; how++) {
        OK(qblk_pwrite(context, "kept", 5, 100));
        FAILS(qblk_layer_push(dev, "own", NULL, 0), -EIO, "no today");
        OK(qblk_pread(dev, buf, 5, 100));
        CHECK_STR(buf, "kept");
        OK(qblk_flush(context));
    }
    OK(qblk_layer_push(context, "offset", NULL, 0));
    OK(qblk_pread(dev, buf, 5, 100));
    CHECK_STR(buf, "kept");
    OK(qblk_close(dev));
    OK(qblk_close(context));
    OK(qblk_unregister_plugin("own"));
}

/* A stack of plugins behind a server, seen through the client. */
static void served(void)
{
    unsigned char a[9000], b[9000];
    qblk *dev, *remote;
    qblk_server *srv;
    char dir[PATH_MAX], name[2 * PATH_MAX];
    const char *plugins = getenv("QBLK_TEST_PLUGINS");
    CHECK(plugins != NULL && getcwd(dir, sizeof dir) != NULL);
    snprintf(name, sizeof name, "plugin:%s/memory2.so?export=b", plugins);
    OK(open_opt(name, QBLK_OPEN_RDWR, &dev, options("format", "raw", "layers", layers("@layer-cipher.so;key=3,@layer-thread.so"), NULL)));
    OK(qblk_server_new(&srv));
    OK(qblk_server_add_export(srv, "stack", dev, 0));
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=s"));
    OK(qblk_open("nbd+unix:///stack?socket=s", QBLK_OPEN_RDWR, &remote));
    fill(a, sizeof a, 17);
    OK(qblk_pwrite2(remote, a, sizeof a, 4321, QBLK_REQ_FUA));
    OK(qblk_zero(remote, 2000, 5000, QBLK_REQ_MAY_TRIM));
    memset(a + 5000 - 4321, 0, 2000);
    OK(qblk_flush(remote));
    OK(qblk_pread(remote, b, sizeof b, 4321));
    CHECK_MEM(b, a, sizeof a);
    OK(qblk_pread(dev, b, sizeof b, 4321));
    CHECK_MEM(b, a, sizeof a);
    OK(qblk_close(remote));
    OK(qblk_server_stop(srv, 1000));
    qblk_server_free(srv);
    OK(qblk_close(dev));
}

/* A program that ends with everything open: what it wrote is there, and everything was closed in order. */
static int forget(const char *what)
{
    qblk *dev;
    const char *list = strcmp(what, "deep") == 0 ? "@layer-cipher.so;key=1,@layer-thread.so,@layer-cipher.so;key=2"
                                                  : "@layer-thread.so";
    OK(open_opt("forgotten", QBLK_OPEN_RDWR, &dev, options("format", "qcow2", "layers", layers(list), NULL)));
    OK(qblk_pwrite(dev, "not lost", 8, 70000));
    return 7;
}

int main(int argc, char **argv)
{
    char buf[8];
    qblk *dev;
    if (argc == 3)
        return forget(argv[2]);
    test_begin(argv);
    cipher("raw");
    cipher("qcow2");
    threads("@layer-thread.so", "thread");
    threads("@layer-cipher.so;key=1,@layer-thread.so,@layer-cipher.so,@layer-cipher.so,@layer-thread.so,"
            "offset,@layer-cipher.so,@layer-thread.so,@layer-cipher.so;key=9,@layer-cipher.so",
            "cipher,thread,cipher,cipher,thread,offset,cipher,thread,cipher,cipher");
    in_the_program();
    gives_back("raw");
    gives_back("mem:1M");
    served();
    never_closed();
    for (int i = 0; i < 2; i++) {
        const char *what = i ? "deep" : "flat";
        OK(qblk_create("forgotten", "qcow2", 1 << 20, NULL));
        int status = run_self("forget", what);
        CHECK(WIFEXITED(status));
        CHECK_INT(WEXITSTATUS(status), 7);
        OK(open_opt("forgotten", 0, &dev, i ? options("layers", layers("@layer-cipher.so;key=1,@layer-cipher.so;key=2"), NULL) : NULL));
        OK(qblk_pread(dev, buf, 8, 70000));
        CHECK_MEM(buf, "not lost", 8);
        OK(qblk_close(dev));
        CHECK_INT(unlink("forgotten"), 0);
    }
    return 0;
}
