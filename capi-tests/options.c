/* Options: values are copied, an underscore is a hyphen, and the call that uses them judges them. */
#include "test.h"
#include <pthread.h>

static qblk_options *shared;

static void *hammer(void *arg)
{
    const char *keys[] = {"io", "cache.l2-size", "format"};
    const char *values[] = {"auto", "1M", "raw"};
    const int k = (int)(intptr_t)arg;
    qblk *dev;
    for (int i = 0; i < 500; i++) {
        OK(qblk_options_set(shared, keys[k], values[k]));
        OK(qblk_open2("mem:1M", shared, 0, &dev));
        OK(qblk_close(dev));
        OK(qblk_options_set(shared, keys[k], NULL));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    char value[8] = "raw", key[8] = "format";
    qblk *dev;
    qblk_options *o;
    qblk_info info;
    pthread_t t[3];
    (void)argc;
    test_begin(argv);
    OK(qblk_create("disk", "qcow2", 1 << 20, NULL));

    /* Key and value are the caller's again at once. */
    OK(qblk_options_new(&o));
    OK(qblk_options_set(o, key, value));
    strcpy(value, "qcow2");
    strcpy(key, "xxxxxx");
    OK(qblk_open2("disk", o, 0, &dev));
    OK(qblk_get_info(dev, &info));
    CHECK_STR(info.format, "raw");
    OK(qblk_close(dev));
    /* The same options serve many calls, and changing them changes no device. */
    OK(qblk_options_set(o, "format", "qcow2"));
    OK(qblk_open2("disk", o, 0, &dev));
    OK(qblk_options_set(o, "format", "nonsense"));
    OK(qblk_get_info(dev, &info));
    CHECK_STR(info.format, "qcow2");
    OK(qblk_close(dev));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "'nonsense'");
    /* NULL removes. */
    OK(qblk_options_set(o, "format", NULL));
    OK(qblk_open2("disk", o, 0, &dev));
    OK(qblk_close(dev));
    /* An underscore is a hyphen, in either place. */
    OK(qblk_options_set(o, "implicit_open", "deny"));
    OK(qblk_options_set(o, "implicit-open", NULL));
    OK(qblk_options_set(o, "cache.l2_size", "lots"));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "'cache.l2-size'");
    static const char *const sizes[] = {"0", "512", "64k", "64K", "2M", "1G", "1T"};
    for (size_t i = 0; i < 7; i++) {
        OK(qblk_options_set(o, "cache.l2-size", sizes[i]));
        OK(qblk_open2("disk", o, 0, &dev));
        OK(qblk_close(dev));
    }
    static const char *const no_sizes[] = {"", "-1", "1.5M", "64 k", "0x10", "99999999999999999999", "k"};
    for (size_t i = 0; i < 7; i++) {
        OK(qblk_options_set(o, "cache.l2-size", no_sizes[i]));
        FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "'cache.l2-size'");
    }
    OK(qblk_options_set(o, "cache.l2-size", NULL));
    /* Unknown keys: named, with the nearest that is known; upper case is not known. */
    static const char *const unknown[][2] = {
        {"fromat", "'format'"}, {"implicit-opne", "'implicit-open'"}, {"Format", "'format'"},
        {"backing-flie", "'backing-file'"}, {"backing.fromat", "'format'"}, {"", "unknown option ''"},
        {"a\nb", "'a\\nb'"}, {"\xff", "unknown option"},
    };
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        OK(qblk_options_set(o, unknown[i][0], "x"));
        FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, unknown[i][1]);
        OK(qblk_options_set(o, unknown[i][0], NULL));
    }
    /* Known, but not for this call. */
    OK(qblk_options_set(o, "refcount-bits", "16"));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "'refcount-bits'");
    OK(qblk_options_set(o, "refcount-bits", NULL));
    OK(qblk_options_set(o, "nbd.timeout", "1.5"));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "'nbd.timeout'");
    qblk_options_free(o);

    /* Any number of threads may use one at once. */
    OK(qblk_options_new(&shared));
    for (int i = 0; i < 3; i++)
        CHECK_INT(pthread_create(&t[i], NULL, hammer, (void *)(intptr_t)i), 0);
    for (int i = 0; i < 3; i++)
        CHECK_INT(pthread_join(t[i], NULL), 0);
    qblk_options_free(shared);
    return 0;
}
