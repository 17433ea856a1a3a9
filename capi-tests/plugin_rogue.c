/* Plugins that do what no plugin may: each is an error that says so, and the program lives. Thread models
 * are kept to, nobody waits for itself, and what was opened is closed once. RUN: plugin */
#include "test.h"

#define QBLK_API_VERSION 2
#include <qblk-plugin.h>
#include <dlfcn.h>
#include <pthread.h>

static int opened, closed;
static int answer;         /* of the function under test */
static int64_t size_ = 65536;
static int (*reading)(void);
static int inside, most_inside, sleeping;
static unsigned int lots;

static void *p_open(void *opaque, uint32_t flags)
{
    (void)flags;
    if (opaque) {
        errno = ENXIO;
        qblk_plugin_error("%s", (const char *)opaque);
        return NULL;
    }
    __sync_add_and_fetch(&opened, 1);
    return QBLK_PLUGIN_NO_HANDLE;
}
static void p_close(void *h)
{
    CHECK(h == QBLK_PLUGIN_NO_HANDLE);
    __sync_add_and_fetch(&closed, 1);
}
static int64_t p_size(void *h) { (void)h; return size_; }
static int p_read(void *h, void *buf, uint64_t n, uint64_t at, uint32_t f)
{
    (void)h, (void)at, (void)f;
    int now = __sync_add_and_fetch(&inside, 1), rc = 0;
    for (int most = most_inside; now > most && !__sync_bool_compare_and_swap(&most_inside, most, now);)
        most = most_inside;
    if (sleeping)
        usleep(2000);
    memset(buf, 'p', n);
    if (reading)
        rc = reading();
    __sync_sub_and_fetch(&inside, 1);
    return rc;
}
static int p_write(void *h, const void *b, uint64_t n, uint64_t at, uint32_t f)
{
    (void)h, (void)b, (void)n, (void)at, (void)f;
    return 0;
}
static int p_answer(void *h) { (void)h; return answer; }
static int p_answer_config(void *h, const char *key, const char *value) { (void)h, (void)key, (void)value; return answer; }
static int least = 1, preferred = 4096, most = 0;
static int p_blocks(void *h, uint32_t *a, uint32_t *b, uint64_t *c)
{
    (void)h;
    *a = (uint32_t)least, *b = (uint32_t)preferred, *c = (uint64_t)most;
    return 0;
}
static int p_extents(void *h, uint64_t n, uint64_t at, uint32_t f, qblk_extent_list *list)
{
    (void)h, (void)n, (void)f;
    switch (answer) {
    case 0: return 0; /* nothing at all */
    case 1: return qblk_plugin_add_extent(list, at + 1, 5, QBLK_EXTENT_DATA);
    case 2: qblk_plugin_add_extent(list, at, 5, QBLK_EXTENT_DATA); qblk_plugin_add_extent(list, at, 5, QBLK_EXTENT_DATA); return 0;
    case 3: return qblk_plugin_add_extent(list, at, 0, 0);
    case 4: return qblk_plugin_add_extent(list, UINT64_MAX - 1, 5, QBLK_EXTENT_ZERO);
    case 5: return qblk_plugin_add_extent(NULL, at, 5, 0);
    case 7: return qblk_plugin_add_extent(list, at, 512, QBLK_EXTENT_ZERO);
    default: return qblk_plugin_add_extent(list, at, 5, 0x1000);
    }
}

static qblk_plugin good(void)
{
    qblk_plugin p;
    memset(&p, 0, sizeof p);
    p.name = "rogue";
    p.thread_model = QBLK_THREAD_PARALLEL;
    p.open = p_open;
    p.close = p_close;
    p.get_size = p_size;
    p.pread = p_read;
    p.pwrite = p_write;
    return p;
}

/* Opening it fails so, and leaves nothing behind. */
static void no_open(qblk_plugin p, void *opaque, const char *name, int rc, const char *text)
{
    qblk *dev;
    OK(QBLK_REGISTER_PLUGIN(&p, opaque));
    FAILS(qblk_open(name, QBLK_OPEN_RDWR, &dev), rc, text);
    CHECK(dev == NULL);
    CHECK_INT(opened, closed);
    OK(qblk_unregister_plugin("rogue"));
}

static void bad_answers(void)
{
    qblk_plugin p;
    static char no_mood[] = "no \033 mood";
    no_open(good(), no_mood, "plugin:rogue", -EIO, "open: 'no \\u{1b} mood': Input/output error");
    p = good(), p.errno_is_preserved = 1;
    no_open(p, no_mood, "plugin:rogue", -ENXIO, "no \\u{1b} mood");
    size_ = -1;
    no_open(good(), NULL, "plugin:rogue", -EIO, "get_size");
    size_ = INT64_MIN;
    no_open(good(), NULL, "plugin:rogue", -EIO, "get_size returned -9223372036854775808");
    size_ = -ENODEV;
    no_open(good(), NULL, "plugin:rogue", -ENODEV, "get_size");
    size_ = 65536;
    static const int CODES[][2] = {{1, -EIO}, {INT_MAX, -EIO}, {-1, -EIO}, {-5, -EIO}, {-4096, -EIO}, {-6000, -EIO},
        {INT_MIN, -EIO}, {-EACCES, -EACCES}, {QBLK_ELOCKED, QBLK_ELOCKED}, {QBLK_ENEEDKEY, QBLK_ENEEDKEY}};
    for (size_t i = 0; i < sizeof CODES / sizeof *CODES; i++) {
        answer = CODES[i][0];
        p = good(), p.config_complete = p_answer;
        no_open(p, NULL, "plugin:rogue", CODES[i][1], "config_complete");
        p = good(), p.config = p_answer_config;
        no_open(p, NULL, "plugin:rogue?a=b", CODES[i][1], "setting 'a'");
    }
    no_open(good(), NULL, "plugin:rogue?a=b", -EINVAL, "takes no settings");
    static const int CAN[] = {3, -7, 100, INT_MIN};
    for (size_t i = 0; i < sizeof CAN / sizeof *CAN; i++) {
        answer = CAN[i];
        char text[64];
        int rc = answer == -7 ? -E2BIG : -EIO;
        for (int slot = 0; slot < 9; slot++) {
            p = good();
            int (**slots[])(void *) = {&p.can_write, &p.can_flush, &p.can_trim, &p.can_zero, &p.is_rotational,
                &p.can_fua, &p.can_fast_zero, &p.can_cache, &p.can_extents, &p.can_multi_conn};
            *slots[slot] = p_answer;
            snprintf(text, sizeof text, "returned %d", answer);
            no_open(p, NULL, "plugin:rogue", rc, answer > 0 ? text : "plugin 'rogue'");
        }
    }
    /* What is claimed and not there. */
    answer = QBLK_CAN_NATIVE;
    p = good(), p.can_trim = p_answer;
    no_open(p, NULL, "plugin:rogue", -EIO, "lacks the function trim");
    p = good(), p.can_flush = p_answer;
    no_open(p, NULL, "plugin:rogue", -EIO, "lacks the function flush");
    p = good(), p.can_fast_zero = p_answer;
    no_open(p, NULL, "plugin:rogue", -EIO, "lacks a function zero");
    p = good(), p.can_cache = p_answer;
    no_open(p, NULL, "plugin:rogue", -EIO, "lacks the function cache");
    answer = QBLK_CAN_EMULATE;
    p = good(), p.can_fua = p_answer;
    no_open(p, NULL, "plugin:rogue", -EIO, "can not be flushed");
    answer = QBLK_CAN_NOT;
    p = good(), p.can_write = p_answer;
    no_open(p, NULL, "plugin:rogue", -EROFS, "read-only");
    /* Blocks. */
    static const int BLOCKS[][4] = {{3, 4096, 0, 0}, {131072, 131072, 0, 0}, {512, 256, 0, 0}, {512, 5000, 0, 0},
        {512, 4096, 100, 0}, {512, 4096, 700, 0}, {32768, 32768, 0, 1}};
    p = good(), p.block_size = p_blocks;
    for (size_t i = 0; i < sizeof BLOCKS / sizeof *BLOCKS; i++) {
        least = BLOCKS[i][0], preferred = BLOCKS[i][1], most = BLOCKS[i][2];
        size_ = BLOCKS[i][3] ? 65537 : 65536;
        no_open(p, NULL, "plugin:rogue", -EIO, "block_size gave");
    }
    size_ = 65536;
}

static int say(void) { return answer; }
static int say_all(void)
{
    qblk_plugin_set_error(ENOSPC);
    qblk_plugin_set_error(EDQUOT);
    qblk_plugin_error("first");
    qblk_plugin_error("%0*d and then too much: %02000d", 3, 7, 1);
    return -1;
}
static int say_errno(void) { errno = ENOLINK; return -1; }
static int say_least_errno(void) { errno = INT_MIN; return -1; }
static int dumps;
static int64_t p_dump(void *h, char *buf, size_t n)
{
    (void)h;
    return snprintf(buf, n, "%d", ++dumps);
}
static int say_inner(void)
{
    qblk *other;
    return qblk_open("/gone/too", 0, &other);
}
static int say_inner_briefly(void) { return say_inner() < 0 ? -1 : 0; }
static int say_at_random(void)
{
    static uint64_t state;
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    uint64_t x = random_next(&state);
    pthread_mutex_unlock(&lock);
    return x % 3 ? 0 : (int)(int32_t)(x >> 20);
}

static void what_it_says(void)
{
    qblk *dev;
    char buf[16];
    qblk_extent e[4];
    qblk_plugin p = good();
    p.errno_is_preserved = 1;
    p.extents = p_extents;
    p.dump = p_dump;
    OK(QBLK_REGISTER_PLUGIN(&p, NULL));
    OK(open_opt("plugin:rogue", QBLK_OPEN_RDWR, &dev, options("format", "raw", NULL)));
    reading = say_errno;
    FAILS(qblk_pread(dev, buf, 16, 7), -ENOLINK, "pread of 16 bytes at offset 7");
    reading = say_least_errno;
    FAILS(qblk_pread(dev, buf, 16, 7), -EIO, "pread of 16 bytes");
    reading = say_all;
    FAILS(qblk_pread(dev, buf, 16, 7), -EDQUOT, "'007 and then too much");
    CHECK(strlen(qblk_get_error()) < 1024);
    reading = say_inner;
    FAILS(qblk_pread(dev, buf, 16, 7), -ENOENT, "/gone/too");
    reading = say_inner_briefly;
    errno = 0;
    answer = qblk_pread(dev, buf, 16, 7);
    CHECK(answer < 0);
    reading = say;
    answer = 17;
    FAILS(qblk_pread(dev, buf, 16, 7), -EIO, "pread of 16 bytes at offset 7 returned 17, expected 0");
    answer = 0;
    OK(qblk_pread(dev, buf, 16, 7));
    reading = NULL;
    for (answer = 0; answer <= 6; answer++)
        FAILS(qblk_extents(dev, 65536, 0, 0, e, 4), answer == 0 || answer == 2 ? -EIO : -EINVAL, "extent");
    /* A dump is asked for by whoever wants to see it. */
    qblk_info info;
    dumps = 0;
    OK(qblk_get_info(dev, &info));
    CHECK(qblk_get_property(dev, "plugin.name", buf, sizeof buf) > 0);
    CHECK_INT(dumps, 0);
    CHECK(qblk_get_property(dev, "plugin.dump", buf, sizeof buf) > 0);
    CHECK_STR(buf, "1");
    /* At random, from threads: codes, never worse. */
    reading = say_at_random;
    for (int i = 0; i < 2000; i++)
        CHECK(qblk_pread(dev, buf, 16, 0) <= 0);
    reading = NULL;
    OK(qblk_pread(dev, buf, 16, 7));
    OK(qblk_close(dev));
    CHECK_INT(opened, closed);
    OK(qblk_unregister_plugin("rogue"));

    /* It is asked about whole blocks, and may describe less than lies before the range. */
    p.block_size = p_blocks;
    least = preferred = 4096, most = 0, answer = 7;
    OK(QBLK_REGISTER_PLUGIN(&p, NULL));
    OK(open_opt("plugin:rogue", 0, &dev, options("format", "raw", NULL)));
    CHECK(qblk_extents(dev, 1000, 600, 0, e, 4) >= 1);
    CHECK_INT(e[0].offset, 600);
    CHECK_INT(e[0].length, 1000);
    CHECK_INT(e[0].flags & QBLK_EXTENT_DATA, QBLK_EXTENT_DATA);
    OK(qblk_close(dev));
    OK(qblk_unregister_plugin("rogue"));

    /* A struct that ends within a slot. */
    p = good();
    p._struct_size = sizeof p + 4;
    p._api_version = 2;
    FAILS(qblk_register_plugin(&p, NULL), -EINVAL, "multiple of");
}

/* --- threads ------------------------------------------------------------------------------ */

static qblk *devices[2];

static void *reader(void *arg)
{
    char buf[16];
    for (int i = 0; i < 20; i++)
        OK(qblk_pread((qblk *)arg, buf, 16, 0));
    return NULL;
}

static int most_at_once(int model)
{
    pthread_t t[6];
    qblk_plugin p = good();
    p.thread_model = model;
    OK(QBLK_REGISTER_PLUGIN(&p, NULL));
    for (int i = 0; i < 2; i++)
        OK(qblk_open("plugin:rogue", 0, &devices[i]));
    most_inside = 0, sleeping = 1;
    for (int i = 0; i < 6; i++)
        CHECK_INT(pthread_create(&t[i], NULL, reader, devices[i % 2]), 0);
    for (int i = 0; i < 6; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    sleeping = 0;
    for (int i = 0; i < 2; i++)
        OK(qblk_close(devices[i]));
    OK(qblk_unregister_plugin("rogue"));
    return most_inside;
}

static void thread_models(void)
{
    CHECK_INT(most_at_once(QBLK_THREAD_PROCESS), 1);
    CHECK_INT(most_at_once(42), 1); /* not known: as the next lower */
    CHECK_INT(most_at_once(QBLK_THREAD_INSTANCE), 2);
    CHECK_INT(most_at_once(QBLK_THREAD_INSTANCE + 50), 2);
    CHECK(most_at_once(QBLK_THREAD_PARALLEL) > 2);
}

/* --- from inside out ---------------------------------------------------------------------- */

static qblk *self, *friend_;

static int read_self(void)
{
    char buf[4];
    return qblk_pread(self, buf, 4, 0);
}
static int close_self(void) { return qblk_close(self); }
static int read_friend(void)
{
    char buf[4];
    return reading = NULL, qblk_pread(friend_, buf, 4, 0);
}
static int open_more(void)
{
    qblk *more;
    char buf[4];
    if (++lots > 1000)
        return 0;
    int rc = qblk_open("plugin:rogue", 0, &more);
    if (rc < 0)
        return rc;
    rc = qblk_pread(more, buf, 4, 0);
    return qblk_close(more) < 0 ? -EIO : rc;
}

static void inside_out(void)
{
    char buf[16];
    static const int MODELS[] = {QBLK_THREAD_PROCESS, QBLK_THREAD_INSTANCE, QBLK_THREAD_PARALLEL};
    for (int i = 0; i < 3; i++) {
        qblk_plugin p = good();
        p.thread_model = MODELS[i];
        OK(QBLK_REGISTER_PLUGIN(&p, NULL));
        OK(open_opt("plugin:rogue", QBLK_OPEN_RDWR, &self, options("format", "raw", NULL)));
        OK(open_opt("plugin:rogue", QBLK_OPEN_RDWR, &friend_, options("format", "raw", NULL)));
        reading = read_self;
        FAILS(qblk_pread(self, buf, 16, 0), -EDEADLK, "the very device");
        reading = close_self;
        FAILS(qblk_pread(self, buf, 16, 0), -EDEADLK, "the very device");
        reading = read_friend;
        if (MODELS[i] == QBLK_THREAD_PROCESS)
            FAILS(qblk_pread(self, buf, 16, 0), -EDEADLK, "one call at a time");
        else
            OK(qblk_pread(self, buf, 16, 0));
        reading = open_more, lots = 0;
        FAILS(qblk_pread(self, buf, 16, 0), MODELS[i] == QBLK_THREAD_PROCESS ? -EDEADLK : -ELOOP, "");
        CHECK(lots < 100);
        reading = NULL;
        OK(qblk_pread(self, buf, 16, 0));
        OK(qblk_close(self));
        OK(qblk_close(friend_));
        CHECK_INT(opened, closed);
        OK(qblk_unregister_plugin("rogue"));
    }
    /* Outside of a plugin's function they do nothing. */
    qblk_plugin_set_error(5);
    qblk_plugin_error("nobody hears");
    qblk_plugin_debug("%s", "perhaps somebody does");
}

static void helpers(void)
{
    uint64_t n;
    int on;
    char *path;
    OK(qblk_plugin_parse_size("k", "2M", &n));
    CHECK_INT(n, 2 << 20);
    FAILS(qblk_plugin_parse_size("k", "2 M", &n), -EINVAL, "'k': found '2 M'");
    FAILS(qblk_plugin_parse_size(NULL, NULL, &n), -EINVAL, "NULL");
    FAILS(qblk_plugin_parse_size("k", "1", NULL), -EINVAL, "NULL");
    OK(qblk_plugin_parse_uint64("k", "0xffffffffffffffff", &n));
    CHECK(n == UINT64_MAX);
    FAILS(qblk_plugin_parse_uint64("k", "18446744073709551616", &n), -EINVAL, "expected a whole number");
    FAILS(qblk_plugin_parse_uint64("k", "+1", &n), -EINVAL, "+1");
    FAILS(qblk_plugin_parse_uint64("k", "0x", &n), -EINVAL, "0x");
    FAILS(qblk_plugin_parse_uint64("k", "-1", &n), -EINVAL, "-1");
    OK(qblk_plugin_parse_bool("k", "Yes", &on));
    CHECK_INT(on, 1);
    OK(qblk_plugin_parse_bool("k", "off", &on));
    CHECK_INT(on, 0);
    FAILS(qblk_plugin_parse_bool("k", "maybe", &on), -EINVAL, "expected on or off");
    OK(qblk_plugin_absolute_path("a/b", &path));
    CHECK(path[0] == '/' && strcmp(path + strlen(path) - 4, "/a/b") == 0);
    free(path);
    FAILS(qblk_plugin_absolute_path("", &path), -EINVAL, "");
    FAILS(qblk_plugin_absolute_path(NULL, &path), -EINVAL, "NULL");
    FAILS(qblk_plugin_add_export(NULL, "a", NULL), -EINVAL, "NULL");
}

/* The program closes the object more often than it opened it, while it is in use. */
static void unloaded_while_in_use(void)
{
    char name[PATH_MAX + 64], buf[16];
    qblk *dev;
    const char *dir = getenv("QBLK_TEST_PLUGINS");
    CHECK(dir != NULL);
    snprintf(name, sizeof name, "plugin:%s/memory1.so?size=64k", dir);
    OK(qblk_open(name, QBLK_OPEN_RDWR, &dev));
    name[strlen(name) - strlen("?size=64k")] = 0;
    void *object = dlopen(name + strlen("plugin:"), RTLD_NOW | RTLD_LOCAL);
    CHECK(object != NULL);
    for (int i = 0; i < 8; i++)
        dlclose(object);
    OK(qblk_pwrite(dev, "still here", 10, 0));
    OK(qblk_pread(dev, buf, 10, 0));
    CHECK_MEM(buf, "still here", 10);
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    bad_answers();
    what_it_says();
    thread_models();
    inside_out();
    helpers();
    unloaded_while_in_use();
    CHECK_INT(opened, closed);
    return 0;
}
