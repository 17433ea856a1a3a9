/* The codes: fixed numbers that never meet the system's, each with a text that lives for ever. */
#include "test.h"
#include <pthread.h>

static void *texts(void *arg)
{
    const char **out = (const char **)arg;
    for (int code = -5010; code <= 1; code++)
        out[code + 5010] = qblk_strerror(code);
    return NULL;
}

int main(int argc, char **argv)
{
    static const struct {
        int code, number;
    } own[] = {
        {QBLK_ECORRUPT, -5001}, {QBLK_EFORMAT, -5002}, {QBLK_EUNSUPPORTED, -5003},
        {QBLK_ELOCKED, -5004}, {QBLK_ENEEDKEY, -5005}, {QBLK_EBADKEY, -5006},
        {QBLK_EPROTO, -5007}, {QBLK_EPOLICY, -5008}, {QBLK_EINTERNAL, -5009},
    };
    static const char *first[5012], *second[5012];
    (void)argc;
    test_begin(argv);
    for (size_t i = 0; i < 9; i++) {
        CHECK_INT(own[i].code, own[i].number);
        CHECK(own[i].code < -4095);
        const char *text = qblk_strerror(own[i].code);
        CHECK(strlen(text) > 5 && !strstr(text, "nknown"));
        for (size_t j = 0; j < i; j++)
            CHECK(strcmp(text, qblk_strerror(own[j].code)) != 0);
    }
    CHECK_STR(qblk_strerror(0), "success");
    CHECK_STR(qblk_strerror(12345), "success");
    CHECK_STR(qblk_strerror(-ENOENT), "No such file or directory");
    CHECK_STR(qblk_strerror(-EINVAL), "Invalid argument");
    CHECK_STR(qblk_strerror(-ECHILD), "No child processes");
    CHECK_STR(qblk_strerror(-EIO), "Input/output error");
    CHECK_HAS(qblk_strerror(-4000), "nknown");
    CHECK_HAS(qblk_strerror(-5000), "nknown");
    CHECK_HAS(qblk_strerror(-6000), "nknown");
    CHECK_HAS(qblk_strerror(INT_MIN), "nknown");

    /* The same pointers from another thread, and after it has gone. */
    pthread_t t;
    texts(first);
    CHECK_INT(pthread_create(&t, NULL, texts, second), 0);
    CHECK_INT(pthread_join(t, NULL), 0);
    for (int i = 0; i < 5012; i++) {
        CHECK(first[i] && first[i] == second[i]);
        CHECK(first[i][0]);
    }
    /* It is no call that fails, so it clears nothing. */
    FAILS(qblk_options_new(NULL), -EINVAL, "NULL");
    qblk_strerror(-5);
    CHECK(qblk_get_error()[0]);
    return 0;
}
