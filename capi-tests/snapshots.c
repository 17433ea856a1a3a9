/* Internal snapshots: made, listed, applied, deleted, opened; and the machine's state that they keep. */
#include "test.h"

static qblk_snapshot list[4];

static void life(void)
{
    static unsigned char first[300000], second[300000], found[300000], state[70000];
    qblk *dev = new_device("qcow2", 1 << 20), *context;
    fill(first, sizeof first, 1);
    fill(second, sizeof second, 2);
    fill(state, sizeof state, 3);
    CHECK_INT(qblk_snapshot_list(dev, NULL, 0), 0);
    OK(qblk_pwrite(dev, first, sizeof first, 12345));
    OK(qblk_vmstate_write(dev, state, sizeof state, 0));
    OK(qblk_vmstate_read(dev, found, sizeof state, 0));
    CHECK_MEM(found, state, sizeof state);
    qblk_options *o = options("id", "a-1", "date", "1700000000.5", "vm-clock", "17", "icount", "4", NULL);
    OK(qblk_snapshot_create(dev, "first", o, 0));
    qblk_options_free(o);
    OK(qblk_pwrite(dev, second, sizeof second, 12345));
    OK(qblk_snapshot_create(dev, "second", NULL, 0));

    memset(list, 0xaa, sizeof list);
    CHECK_INT(qblk_snapshot_list(dev, list, 1), 2);
    CHECK_STR(list[0].id, "a-1");
    CHECK_STR(list[0].name, "first");
    CHECK_INT(list[0].vm_state_size, sizeof state);
    CHECK_INT(list[0].disk_size, 1 << 20);
    CHECK_INT(list[0].date_sec, 1700000000);
    CHECK_INT(list[0].date_nsec, 500000000);
    CHECK_INT(list[0].vm_clock_nsec, 17);
    CHECK_INT(list[0].icount, 4);
    CHECK_INT(list[0].reserved0, 0);
    CHECK(all_zero(list[0].reserved, sizeof list[0].reserved));
    CHECK_INT(list[1].id[0] & 0xff, 0xaa);
    CHECK_INT(qblk_snapshot_list(dev, list, 4), 2);
    CHECK_STR(list[1].id, "1");
    CHECK(list[1].icount == UINT64_MAX);
    CHECK_INT(list[1].vm_state_size, 0);

    /* What one context does all see. */
    OK(qblk_context_open(dev, NULL, 0, &context));
    OK(qblk_snapshot_apply(dev, "a-1", 0));
    OK(qblk_pread(context, found, sizeof found, 12345));
    CHECK_MEM(found, first, sizeof found);
    OK(qblk_vmstate_read(context, found, sizeof state, 0));
    CHECK_MEM(found, state, sizeof state);
    FAILS(qblk_snapshot_delete(context, "second", 0), -EROFS, "read-only");
    FAILS(qblk_vmstate_write(context, state, 1, 0), -EROFS, "read-only");
    OK(qblk_snapshot_apply(dev, "second", 0));
    OK(qblk_pread(context, found, sizeof found, 12345));
    CHECK_MEM(found, second, sizeof found);
    CHECK_INT(qblk_snapshot_list(context, NULL, 0), 2);
    OK(qblk_close(context));

    FAILS(qblk_snapshot_create(dev, "first", NULL, 0), -EEXIST, "'first'");
    FAILS(qblk_snapshot_create(dev, "", NULL, 0), -EINVAL, "name");
    FAILS(qblk_snapshot_create(dev, NULL, NULL, 0), -EINVAL, "NULL");
    FAILS(qblk_snapshot_create(dev, "third", NULL, 1), -EINVAL, "flags");
    FAILS(qblk_snapshot_apply(dev, "third", 0), -ENOENT, "'third'");
    FAILS(qblk_snapshot_apply(dev, NULL, 0), -EINVAL, "NULL");
    FAILS(qblk_snapshot_apply(dev, "first", 8), -EINVAL, "flags");
    FAILS(qblk_snapshot_delete(dev, "third", 0), -ENOENT, "'third'");
    FAILS(qblk_snapshot_delete(dev, NULL, 0), -EINVAL, "NULL");
    FAILS(qblk_snapshot_list(dev, NULL, 1), -EINVAL, "NULL");
    FAILS(qblk_snapshot_list(NULL, list, 1), -EINVAL, "NULL");
    FAILS(qblk_vmstate_write(dev, NULL, 1, 0), -EINVAL, "NULL");
    FAILS(qblk_vmstate_read(dev, NULL, 1, 0), -EINVAL, "NULL");
    FAILS(qblk_vmstate_write(dev, state, 1, UINT64_MAX), -EFBIG, "state");
    OK(qblk_vmstate_write(dev, NULL, 0, 0));
    o = options("compat", "1.1", NULL);
    FAILS(qblk_snapshot_create(dev, "third", o, 0), -EINVAL, "'compat'");
    qblk_options_free(o);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");

    /* One opened by itself. */
    o = options("snapshot", "first", NULL);
    OK(qblk_open2("qcow2", o, 0, &dev));
    OK(qblk_pread(dev, found, sizeof found, 12345));
    CHECK_MEM(found, first, sizeof found);
    OK(qblk_vmstate_read(dev, found, sizeof state, 0));
    CHECK_MEM(found, state, sizeof state);
    OK(qblk_close(dev));
    FAILS(qblk_open2("qcow2", o, QBLK_OPEN_RDWR, &dev), -EINVAL, "read-only");
    qblk_options_free(o);
    dev = must_open("qcow2", QBLK_OPEN_INFO_ONLY);
    CHECK_INT(qblk_snapshot_list(dev, list, 4), 2);
    FAILS(qblk_vmstate_read(dev, found, 1, 0), -EBADF, "description");
    OK(qblk_close(dev));

    dev = must_open("qcow2", QBLK_OPEN_RDWR);
    OK(qblk_snapshot_delete(dev, "first", 0));
    OK(qblk_snapshot_delete(dev, "1", 0));
    CHECK_INT(qblk_snapshot_list(dev, list, 4), 0);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
}

static int stops_after_three(void *opaque, uint64_t done, uint64_t total)
{
    CHECK(done <= total);
    return ++*(int *)opaque > 3;
}

static void amend(void)
{
    int calls = 0;
    qblk *dev = new_device("qcow2", 1 << 20);
    char text[64];
    OK(qblk_pwrite(dev, "bytes", 5, 100000));
    qblk_options *o = options("compat", "0.10", NULL);
    OK(qblk_amend(dev, o, 0, NULL, NULL));
    CHECK(qblk_get_property(dev, "qcow2.compat", text, sizeof text) == 4);
    CHECK_STR(text, "0.10");
    OK(qblk_pread(dev, text, 5, 100000));
    CHECK_MEM(text, "bytes", 5);
    OK(qblk_options_set(o, "compat", "1.1"));
    OK(qblk_options_set(o, "refcount-bits", "64"));
    FAILS(qblk_amend(dev, o, 0, stops_after_three, &calls), -ECANCELED, "stopped");
    CHECK_INT(calls, 4);
    calls = -1000000;
    OK(qblk_amend(dev, o, 0, stops_after_three, &calls));
    CHECK(calls > -1000000);
    CHECK(qblk_get_property(dev, "qcow2.refcount-bits", text, sizeof text) == 2);
    CHECK_STR(text, "64");
    FAILS(qblk_amend(dev, o, 1, NULL, NULL), -EINVAL, "flags");
    FAILS(qblk_amend(NULL, o, 0, NULL, NULL), -EINVAL, "NULL");
    OK(qblk_options_set(o, "cluster-size", "4k"));
    FAILS(qblk_amend(dev, o, 0, NULL, NULL), -EINVAL, "'cluster-size'");
    qblk_options_free(o);
    OK(qblk_pwrite(dev, "bytes", 5, 500000));
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q qcow2");
    dev = new_device("raw", 1 << 20);
    FAILS(qblk_amend(dev, NULL, 0, NULL, NULL), -ENOTSUP, "amending");
    FAILS(qblk_snapshot_create(dev, "s", NULL, 0), -ENOTSUP, "snapshots");
    FAILS(qblk_snapshot_list(dev, NULL, 0), -ENOTSUP, "snapshots");
    FAILS(qblk_vmstate_read(dev, NULL, 0, 0), -ENOTSUP, "state");
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    life();
    remove("qcow2");
    amend();
    return 0;
}
