/* A NULL that a call needs is -EINVAL with a text, in every function and argument. */
#include "test.h"

static int each(void *opaque, const char *name, const char *description)
{
    (void)opaque, (void)name, (void)description;
    return 0;
}

static void nbd(void)
{
    char buf[8];
    qblk *dev = NULL;
    qblk_server *srv = NULL;
    qblk_status status;
    const char *text = "the server handle is NULL";
    OK(qblk_open("mem:1M", 0, &dev));
    FAILS(qblk_server_new(NULL), -EINVAL, "'out'");
    FAILS(qblk_server_set(NULL, "threads", "1"), -EINVAL, text);
    FAILS(qblk_server_add_export(NULL, "x", dev, 0), -EINVAL, text);
    FAILS(qblk_server_add_export2(NULL, "x", dev, NULL, 0), -EINVAL, text);
    FAILS(qblk_server_remove_export(NULL, "x"), -EINVAL, text);
    FAILS(qblk_server_listen(NULL, "nbd://127.0.0.1:0"), -EINVAL, text);
    FAILS(qblk_server_listen_fd(NULL, 0), -EINVAL, text);
    FAILS(qblk_server_serve_fd(NULL, 0), -EINVAL, text);
    FAILS(qblk_server_get_uri(NULL, buf, sizeof buf), -EINVAL, text);
    FAILS(qblk_server_wait(NULL, 0), -EINVAL, text);
    FAILS(qblk_server_stop(NULL, 0), -EINVAL, text);
    qblk_server_free(NULL);

    OK(qblk_server_new(&srv));
    FAILS(qblk_server_set(srv, NULL, "1"), -EINVAL, "key is NULL");
    FAILS(qblk_server_set(srv, "threads", NULL), -EINVAL, "value is NULL");
    FAILS(qblk_server_add_export(srv, NULL, dev, 0), -EINVAL, "name is NULL");
    FAILS(qblk_server_add_export(srv, "x", NULL, 0), -EINVAL, "device handle is NULL");
    FAILS(qblk_server_add_export2(srv, NULL, dev, NULL, 0), -EINVAL, "name is NULL");
    FAILS(qblk_server_add_export2(srv, "x", NULL, NULL, 0), -EINVAL, "device handle is NULL");
    FAILS(qblk_server_remove_export(srv, NULL), -EINVAL, "name is NULL");
    FAILS(qblk_server_listen(srv, NULL), -EINVAL, "URI is NULL");
    FAILS(qblk_server_get_uri(srv, NULL, 1), -EINVAL, "buffer is NULL");
    OK(qblk_server_add_export2(srv, "x", dev, NULL, 0));
    qblk_server_free(srv);

    FAILS(qblk_nbd_list(NULL, NULL, each, NULL), -EINVAL, "URI is NULL");
    FAILS(qblk_nbd_list("nbd+unix:///?socket=gone", NULL, NULL, NULL), -EINVAL, "function is NULL");
    FAILS(qblk_block_status(NULL, "base:allocation", 1, 0, 0, &status, 1), -EINVAL, "device handle is NULL");
    FAILS(qblk_block_status(dev, NULL, 1, 0, 0, &status, 1), -EINVAL, "context is NULL");
    FAILS(qblk_block_status(dev, "base:allocation", 1, 0, 0, NULL, 1), -EINVAL, "'out' is NULL");
    OK(qblk_close(dev));
}

int main(int argc, char **argv)
{
    static unsigned char buf[512];
    qblk *dev = NULL, *out = NULL;
    qblk_options *o = NULL;
    qblk_info info;
    qblk_extent e;
    struct iovec iov = {buf, 512}, hole = {NULL, 1}, none = {NULL, 0};
    (void)argc;
    test_begin(argv);

    /* Without a device. */
    const char *text = "the device handle is NULL";
    FAILS(qblk_pread(NULL, buf, 512, 0), -EINVAL, text);
    FAILS(qblk_pread2(NULL, buf, 512, 0, 0), -EINVAL, text);
    FAILS(qblk_pwrite(NULL, buf, 512, 0), -EINVAL, text);
    FAILS(qblk_pwrite2(NULL, buf, 512, 0, 0), -EINVAL, text);
    FAILS(qblk_preadv(NULL, &iov, 1, 0, 0), -EINVAL, text);
    FAILS(qblk_pwritev(NULL, &iov, 1, 0, 0), -EINVAL, text);
    FAILS(qblk_flush(NULL), -EINVAL, text);
    FAILS(qblk_zero(NULL, 1, 0, 0), -EINVAL, text);
    FAILS(qblk_trim(NULL, 1, 0, 0), -EINVAL, text);
    FAILS(qblk_cache(NULL, 1, 0, 0), -EINVAL, text);
    FAILS(qblk_get_info(NULL, &info), -EINVAL, text);
    FAILS(qblk_get_property(NULL, "filename", (char *)buf, 512), -EINVAL, text);
    FAILS(qblk_extents(NULL, 1, 0, 0, &e, 1), -EINVAL, text);
    FAILS(qblk_resize(NULL, 1, 0), -EINVAL, text);
    FAILS(qblk_resize2(NULL, 1, NULL, 0), -EINVAL, text);
    FAILS(qblk_write_compressed(NULL, buf, 1, 0), -EINVAL, text);
    FAILS(qblk_copy(NULL, NULL, NULL, 0, NULL, NULL), -EINVAL, text);
    FAILS(qblk_commit(NULL, 0, NULL, NULL), -EINVAL, text);
    FAILS(qblk_rebase(NULL, NULL, NULL, 0, NULL, NULL), -EINVAL, text);
    FAILS(qblk_reopen(NULL, 0), -EINVAL, text);
    FAILS(qblk_reopen2(NULL, NULL, 0), -EINVAL, text);
    FAILS(qblk_layer_push(NULL, "readonly", NULL, 0), -EINVAL, text);
    out = (qblk *)(uintptr_t)8;
    FAILS(qblk_context_open(NULL, NULL, 0, &out), -EINVAL, text);
    CHECK(out == NULL);
    OK(qblk_close(NULL));

    /* Without what a device needs. */
    OK(qblk_open("mem:1M", QBLK_OPEN_RDWR, &dev));
    FAILS(qblk_pread(dev, NULL, 1, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_pread2(dev, NULL, 1, 0, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_pwrite(dev, NULL, 1, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_pwrite2(dev, NULL, 1, 0, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_write_compressed(dev, NULL, 1, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_preadv(dev, NULL, 1, 0, 0), -EINVAL, "iov is NULL");
    FAILS(qblk_pwritev(dev, NULL, 1, 0, 0), -EINVAL, "iov is NULL");
    FAILS(qblk_preadv(dev, &hole, 1, 0, 0), -EINVAL, "buffer is NULL");
    FAILS(qblk_pwritev(dev, &hole, 1, 0, 0), -EINVAL, "buffer is NULL");
    OK(qblk_preadv(dev, &none, 1, 0, 0));
    OK(qblk_pwritev(dev, &none, 1, 0, 0));
    FAILS(qblk_get_info(dev, NULL), -EINVAL, "info is NULL");
    FAILS(qblk_get_property(dev, NULL, (char *)buf, 512), -EINVAL, "key is NULL");
    FAILS(qblk_get_property(dev, "filename", NULL, 1), -EINVAL, "buffer is NULL");
    CHECK(qblk_get_property(dev, "filename", NULL, 0) > 0);
    FAILS(qblk_extents(dev, 1, 0, 0, NULL, 1), -EINVAL, "'out' is NULL");
    OK(qblk_extents(dev, 1, 0, 0, NULL, 0));
    FAILS(qblk_context_open(dev, NULL, 0, NULL), -EINVAL, "'out'");
    OK(qblk_close(dev));

    /* Opening and making. */
    FAILS(qblk_open(NULL, 0, &out), -EINVAL, "name is NULL");
    FAILS(qblk_open("mem:1M", 0, NULL), -EINVAL, "'out'");
    FAILS(qblk_open2(NULL, NULL, 0, &out), -EINVAL, "name is NULL");
    FAILS(qblk_open2("mem:1M", NULL, 0, NULL), -EINVAL, "'out'");
    FAILS(qblk_open_fd(0, NULL, 0, NULL), -EINVAL, "'out'");
    FAILS(qblk_create(NULL, "raw", 1, NULL), -EINVAL, "name is NULL");
    FAILS(qblk_create("new", NULL, 1, NULL), -EINVAL, "format is NULL");
    CHECK(!exists("new"));

    /* Options. */
    FAILS(qblk_options_new(NULL), -EINVAL, "'out'");
    OK(qblk_options_new(&o));
    FAILS(qblk_options_set(NULL, "a", "b"), -EINVAL, "options are NULL");
    FAILS(qblk_options_set(o, NULL, "b"), -EINVAL, "key is NULL");
    OK(qblk_options_set(o, "format", NULL));
    qblk_options_free(o);
    qblk_options_free(NULL);

    /* What cannot fail. */
    CHECK_INT(qblk_supports(NULL), 0);
    OK(qblk_set_log(NULL, NULL, 0));
    nbd();
    return 0;
}
