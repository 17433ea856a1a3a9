/* Lock managers: loaded, set, named by options; what they refuse; a lease that is lost; freeing. */
#include "test.h"

#include <qblk-lockmgr.h>

typedef char resource_is_64[sizeof(qblk_lockmgr_resource) == 64 ? 1 : -1];
typedef char owner_is_64[sizeof(qblk_lockmgr_owner) == 64 ? 1 : -1];

/* A manager with one lock for all, which is lost when a file is there. */
static const char SOURCE[] =
    "#include <stddef.h>\n#include <stdint.h>\n#include <errno.h>\n#include <string.h>\n#include <unistd.h>\n"
    "static int taken;\n"
    "int qblk_lockmgr_acquire(const void *o, const void *r, size_t n, const char *const *s, void **l)\n"
    "{ (void)o, (void)r, (void)n;\n"
    "  for (; *s; s++) if (strcmp(*s, \"colour=red\") != 0) return -EINVAL;\n"
    "  if (__sync_lock_test_and_set(&taken, 1)) return -EBUSY;\n"
    "  *l = &taken; return 0; }\n"
    "int qblk_lockmgr_release(void *l) { (void)l; __sync_lock_release(&taken); return 0; }\n"
    "int qblk_lockmgr_renew(void *l, uint32_t *next, uint32_t *valid)\n"
    "{ (void)l; *next = 5; *valid = 60000; return access(\"lost\", F_OK) == 0 ? -ESTALE : 0; }\n";

int main(int argc, char **argv)
{
    qblk_lock_manager *mgr;
    qblk *dev, *other;
    qblk_info info;
    (void)argc;
    test_begin(argv);
    int fd = open("m.c", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    CHECK_INT(write(fd, SOURCE, sizeof SOURCE - 1), sizeof SOURCE - 1);
    close(fd);
    CHECK_SH("gcc -shared -fPIC -o m.so m.c && gcc -shared -fPIC -Dqblk_lockmgr_release=x -o half.so m.c");
    OK(qblk_create("disk", "qcow2", 1 << 20, NULL));

    FAILS(qblk_lock_manager_load(NULL, NULL, &mgr), -EINVAL, "NULL");
    FAILS(qblk_lock_manager_load("./m.so", NULL, NULL), -EINVAL, "NULL");
    FAILS(qblk_lock_manager_load("", NULL, &mgr), -EINVAL, "empty");
    FAILS(qblk_lock_manager_load("./gone.so", NULL, &mgr), -ENOENT, "gone.so");
    CHECK(mgr == NULL);
    FAILS(qblk_lock_manager_load("./half.so", NULL, &mgr), -ELIBBAD, "qblk_lockmgr_release");

    /* Loaded once, with settings for all leases; used by the options that it was set in. */
    qblk_options *settings = options("colour", "red", NULL), *o = options("lock", "off", NULL);
    OK(qblk_lock_manager_load("./m.so", settings, &mgr));
    qblk_options_free(settings);
    FAILS(qblk_options_set_lock_manager(NULL, mgr), -EINVAL, "NULL");
    OK(qblk_options_set_lock_manager(o, mgr));
    OK(qblk_open2("disk", o, QBLK_OPEN_RDWR, &dev));
    OK(qblk_get_info(dev, &info));
    CHECK(info.state & QBLK_STATE_LOCKED);
    FAILS(qblk_open2("disk", o, QBLK_OPEN_RDWR, &other), QBLK_ELOCKED, "m.so");
    OK(qblk_open2("disk", o, QBLK_OPEN_RDWR | QBLK_OPEN_NO_LOCK, &other));
    OK(qblk_close(other));
    OK(qblk_options_set_lock_manager(o, NULL));
    OK(qblk_open2("disk", o, QBLK_OPEN_RDWR, &other));
    OK(qblk_close(other));
    OK(qblk_options_set_lock_manager(o, mgr));

    /* Lost: writes fail, reading goes on, and closing says that there is something to say. */
    OK(qblk_pwrite(dev, "x", 1, 0));
    OK(qblk_flush(dev));
    make_file("lost", "", 0, 0);
    int rc = 0;
    for (int i = 0; i < 6000 && rc == 0; i++) {
        usleep(10000);
        rc = qblk_pwrite(dev, "y", 1, 0);
    }
    CHECK_INT(rc, QBLK_ELOCKED);
    CHECK_HAS(qblk_get_error(), "lost");
    FAILS(qblk_flush(dev), QBLK_ELOCKED, "m.so");
    char buf[1];
    OK(qblk_pread(dev, buf, 1, 0));
    CHECK_INT(unlink("lost"), 0);
    OK(qblk_reopen(dev, QBLK_OPEN_RDWR));
    OK(qblk_pwrite(dev, "z", 1, 0));

    /* The device keeps the manager; options that name it do not. */
    qblk_lock_manager_free(mgr);
    qblk_lock_manager_free(NULL);
    OK(qblk_pwrite(dev, "z", 1, 1));
    OK(qblk_close(dev));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "freed");

    /* By name; what it does not know, it refuses. */
    OK(qblk_options_set(o, "lock-manager", "./m.so"));
    OK(qblk_options_set(o, "lock-manager.colour", "blue"));
    FAILS(qblk_open2("disk", o, 0, &dev), -EINVAL, "m.so");
    OK(qblk_options_set(o, "lock-manager.colour", "red"));
    OK(qblk_open2("disk", o, 0, &dev));
    OK(qblk_close(dev));
    qblk_options_free(o);
    return 0;
}
