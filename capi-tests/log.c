/* Messages: to a function of the program's, at the level it wants, or to stderr by QBLK_LOG. */
#include "test.h"
#include <pthread.h>

static int count[6];
static void *seen_opaque;
static int bad;
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
    pthread_mutex_unlock(&lock);
    /* Calling back is allowed, but for qblk_set_log. */
    qblk_supports("format:raw");
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
    CHECK(messages() > 0);
    CHECK(seen_opaque == &count);
    CHECK_INT(bad, 0);

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
    CHECK_SH("grep -q '^qblk: ' stderr");
    return 0;
}
