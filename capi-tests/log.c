/* Messages: to a function of the program's, at the level it wants, or to stderr by QBLK_LOG. */
#include "test.h"
#include <pthread.h>

static int count[6];
static void *seen_opaque;
static int bad, calls_back;
static char last[1024];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* C must be able to call it, so it has C's linkage. */
#ifdef __cplusplus
extern "C"
#endif
void sink(void *opaque, int level, const char *message);
void sink(void *opaque, int level, const char *message)
{
    pthread_mutex_lock(&lock);
    seen_opaque = opaque;
    if (level < QBLK_LOG_ERROR || level > QBLK_LOG_TRACE || !message[0] || strchr(message, '\n'))
        bad++;
    else
        count[level]++;
    snprintf(last, sizeof last, "%s", message);
    pthread_mutex_unlock(&lock);
    if (calls_back) {
        /* Calling back is allowed, but for qblk_set_log; it does not end in messages for ever. */
        qblk *dev;
        OK(qblk_open("mem:1M", 0, &dev));
        FAILS(qblk_pwrite(dev, "x", 1, 0), -EROFS, "read-only");
        OK(qblk_close(dev));
        FAILS(qblk_set_log(NULL, NULL, 0), -EDEADLK, "inside");
        FAILS(qblk_open("nowhere", 0, &dev), -ENOENT, "'nowhere'");
    }
}

static int messages(void)
{
    int sum = 0;
    for (int i = 0; i < 6; i++)
        sum += count[i];
    return sum;
}

static void use(void)
{
    char c;
    qblk *dev = new_device("qcow2", 1 << 20);
    OK(qblk_pwrite(dev, "x", 1, 0));
    OK(qblk_pread(dev, &c, 1, 0));
    OK(qblk_close(dev));
    remove("qcow2");
}

int main(int argc, char **argv)
{
    if (argc == 3) {
        CHECK_INT(chdir(argv[2]), 0);
        use();
        return 0;
    }
    test_begin(argv);
    for (int level = -1; level <= 7; level++)
        if (level < QBLK_LOG_ERROR || level > QBLK_LOG_TRACE)
            FAILS(qblk_set_log(sink, NULL, level), -EINVAL, "QBLK_LOG_");
    use();
    CHECK_INT(messages(), 0);

    OK(qblk_set_log(sink, &count, QBLK_LOG_TRACE));
    use();
    /* Created, opened, closed. */
    CHECK(count[QBLK_LOG_INFO] >= 3);
    CHECK(seen_opaque == &count);
    CHECK_INT(bad, 0);
    qblk *dev;
    FAILS(qblk_open("mis\nsing", 0, &dev), -ENOENT, "'mis\\nsing'");
    CHECK_STR(last, "qblk_open: 'mis\\nsing': open: No such file or directory");
    CHECK(count[QBLK_LOG_DEBUG] >= 1);

    calls_back = 1;
    memset(count, 0, sizeof count);
    FAILS(qblk_open("missing", 0, &dev), -ENOENT, "'missing'");
    CHECK_INT(messages(), 1);
    /* What the function's own calls left is not what this one failed with, nor is it a failure. */
    OK(qblk_open("mem:2M", 0, &dev));
    OK(qblk_close(dev));
    CHECK_INT(messages(), 3);
    calls_back = 0;

    /* Nothing is wrong, so whoever asks for errors only hears nothing. */
    memset(count, 0, sizeof count);
    OK(qblk_set_log(sink, NULL, QBLK_LOG_ERROR));
    use();
    CHECK_INT(messages(), 0);

    OK(qblk_set_log(NULL, NULL, 0));
    use();
    CHECK_INT(messages(), 0);

    /* By the environment, in a process of its own. */
    int to = open("stderr", O_RDWR | O_CREAT | O_CLOEXEC, 0644), saved = dup(2);
    CHECK(to >= 0 && saved >= 0);
    CHECK_INT(dup2(to, 2), 2);
    CHECK_INT(setenv("QBLK_LOG", "trace", 1), 0);
    int status = run_self("use", test_dir_);
    CHECK_INT(dup2(saved, 2), 2);
    CHECK_INT(status, 0);
    CHECK_SH("grep -q '^qblk: .*qcow2' stderr");
    return 0;
}
