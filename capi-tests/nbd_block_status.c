/* What meta contexts say: through qblk_extents as extents, through qblk_block_status in their own
 * numbers. */
#include "nbd.h"

enum { SIZE = 1 << 20, CLUSTER = 65536 };

int main(int argc, char **argv)
{
    qblk_status s[32];
    qblk_extent e[32];
    char c;
    (void)argc;
    test_begin(argv);
    alarm(120);
    /* A base of data and nothing; over it data, zeroes, and what is below. */
    qblk *base = new_device("raw", SIZE), *top = NULL, *nbd = NULL;
    OK(qblk_pwrite(base, "base", 4, 3 * CLUSTER));
    OK(qblk_close(base));
    OK(create_opt("top", "qcow2", SIZE, options("backing-file", "raw", "backing-fmt", "raw", NULL)));
    top = must_open("top", QBLK_OPEN_RDWR);
    OK(qblk_pwrite(top, "top", 3, 0));
    OK(qblk_zero(top, CLUSTER, CLUSTER, QBLK_REQ_MAY_TRIM));
    qblk_server *srv = new_server("", top, 0);
    OK(qblk_server_listen(srv, "nbd+unix:///?socket=sock"));
    nbd = must_open("nbd+unix:///?socket=sock", 0);

    int64_t n = qblk_block_status(nbd, "base:allocation", SIZE, 0, 0, s, 32);
    CHECK(n >= 3);
    CHECK_INT(s[0].length, CLUSTER);
    CHECK_INT(s[0].flags, 0);
    uint64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        CHECK(s[i].length > 0 && (s[i].flags & ~(uint64_t)3) == 0);
        if (at >= CLUSTER && at < 3 * CLUSTER)
            CHECK(s[i].flags & 2);
        at += s[i].length;
    }
    CHECK(at <= SIZE);
    n = qblk_block_status(nbd, "qemu:allocation-depth", SIZE, 0, 0, s, 32);
    CHECK(n >= 2);
    CHECK_INT(s[0].flags, 1);
    CHECK_INT(s[1].flags, 2);
    /* From the middle; as many as there is room for. */
    CHECK_INT(qblk_block_status(nbd, "base:allocation", 10, 3 * CLUSTER + 1, 0, s, 32), 1);
    CHECK(s[0].length >= 10 && s[0].flags == 0);
    CHECK_INT(qblk_block_status(nbd, "base:allocation", SIZE, 0, 0, s, 1), 1);
    CHECK_INT(qblk_block_status(nbd, "base:allocation", SIZE, 0, 0, NULL, 0), 0);
    /* As extents: both contexts together. */
    n = qblk_extents(nbd, 4 * CLUSTER, 0, 0, e, 32);
    CHECK(n >= 3);
    CHECK(e[0].length == CLUSTER && e[0].flags & QBLK_EXTENT_DATA && e[0].depth == 0);
    CHECK(e[1].offset == CLUSTER && e[1].flags & QBLK_EXTENT_ZERO);
    while (n > 0 && e[n - 1].offset > 3 * CLUSTER)
        n--;
    CHECK(n > 0 && e[n - 1].offset == 3 * CLUSTER && e[n - 1].flags & QBLK_EXTENT_DATA &&
          !(e[n - 1].flags & QBLK_EXTENT_ALLOCATED));

    FAILS(qblk_block_status(nbd, "base:allocation", SIZE, 1, 0, s, 32), -EINVAL, "leave the device");
    FAILS(qblk_block_status(nbd, "base:allocation", 1, 0, 1, s, 32), -EINVAL, "flags");
    FAILS(qblk_block_status(nbd, "x-unknown:context", 1, 0, 0, s, 32), -ENOTSUP, "");
    FAILS(qblk_block_status(nbd, "", 1, 0, 0, s, 32), -ENOTSUP, "");
    FAILS(qblk_block_status(top, "base:allocation", 1, 0, 0, s, 32), -ENOTSUP, "");
    OK(qblk_pread(nbd, &c, 1, 0));
    OK(qblk_close(nbd));
    qblk_server_free(srv);
    OK(qblk_close(top));
    return 0;
}
