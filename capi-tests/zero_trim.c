/* Zeroing and trimming: any range, what is around it stays, space comes back when it may. */
#include "test.h"

enum { SIZE = 8 << 20 };
static unsigned char model[SIZE], found[SIZE];

static void compare(qblk *dev)
{
    OK(qblk_pread(dev, found, SIZE, 0));
    CHECK_MEM(found, model, SIZE);
}

static void ranges(qblk *dev)
{
    static const uint32_t flags[] = {
        0, QBLK_REQ_MAY_TRIM, QBLK_REQ_FUA, QBLK_REQ_FUA | QBLK_REQ_MAY_TRIM,
        QBLK_REQ_FAST_ZERO, QBLK_REQ_FAST_ZERO | QBLK_REQ_MAY_TRIM,
        QBLK_REQ_FAST_ZERO | QBLK_REQ_FUA | QBLK_REQ_MAY_TRIM,
    };
    uint64_t state = 5;
    fill(model, SIZE, 5);
    OK(qblk_pwrite(dev, model, SIZE, 0));
    for (int i = 0; i < (quick() ? 20 : 70); i++) {
        uint64_t at = random_next(&state) % SIZE, n = random_next(&state) % (i % 2 ? 500000 : 3000);
        if (i % 7 == 0)
            at &= ~UINT64_C(0xffff), n = 65536;
        if (n > SIZE - at)
            n = SIZE - at;
        const uint32_t f = flags[random_next(&state) % 7];
        const int rc = qblk_zero(dev, n, at, f);
        if (f & QBLK_REQ_FAST_ZERO && rc == -ENOTSUP) {
            /* Refused at once: nothing may have changed. */
            CHECK_HAS(qblk_get_error(), "fast");
        } else {
            CHECK_INT(rc, 0);
            memset(model + at, 0, n);
        }
        if (i % 10 == 9)
            compare(dev);
    }
    compare(dev);
}

/* Each byte as before or zero, and the same at every read. */
static void trims(qblk *dev)
{
    uint64_t state = 6;
    fill(model, SIZE, 6);
    OK(qblk_pwrite(dev, model, SIZE, 0));
    for (int i = 0; i < (quick() ? 6 : 30); i++) {
        uint64_t at = random_next(&state) % SIZE, n = random_next(&state) % 700000;
        if (n > SIZE - at)
            n = SIZE - at;
        OK(qblk_trim(dev, n, at, i % 3 == 0 ? QBLK_REQ_FUA : 0));
        OK(qblk_pread(dev, found, SIZE, 0));
        for (uint64_t b = 0; b < SIZE; b++) {
            const int in = b >= at && b < at + n;
            if (found[b] != model[b] && !(in && found[b] == 0))
                FAIL_("byte %llu: neither as before nor zero", (unsigned long long)b);
        }
        memcpy(model, found, SIZE);
        compare(dev);
    }
    OK(qblk_pwrite(dev, "again", 5, 12345));
    memcpy(model + 12345, "again", 5);
    compare(dev);
}

int main(int argc, char **argv)
{
    qblk_info info;
    (void)argc;
    test_begin(argv);
    EACH_KIND(kind)
    {
        qblk *dev = new_device(kind, SIZE);
        OK(qblk_get_info(dev, &info));
        CHECK(info.can_zero != QBLK_CAN_NOT && info.can_fua != QBLK_CAN_NOT);
        ranges(dev);
        trims(dev);
        OK(qblk_close(dev));
        if (strcmp(kind, "mem") != 0) {
            dev = must_open(kind, QBLK_OPEN_RDWR);
            compare(dev);
            OK(qblk_close(dev));
        }
    }
    CHECK_SH("qemu-img check -q qcow2");

    /* Holes are real: the space of what may be trimmed comes back. */
    for (int i = 0; i < 2; i++) {
        qblk *dev = must_open(KINDS[i], QBLK_OPEN_RDWR);
        fill(model, SIZE, 7);
        OK(qblk_pwrite(dev, model, SIZE, 0));
        OK(qblk_flush(dev));
        CHECK(file_blocks(KINDS[i]) >= SIZE / 512);
        OK(qblk_zero(dev, SIZE, 0, QBLK_REQ_MAY_TRIM));
        OK(qblk_close(dev));
        CHECK(file_blocks(KINDS[i]) < SIZE / 512 / 4);
    }

    /* Zeroes of an overlay hide what is below, and so does what it trims, or else all stays. */
    OK(qblk_create("base", "raw", SIZE, NULL));
    qblk *dev = must_open("base", QBLK_OPEN_RDWR);
    fill(model, SIZE, 8);
    OK(qblk_pwrite(dev, model, SIZE, 0));
    OK(qblk_close(dev));
    OK(create_opt("over", "qcow2", SIZE, options("backing-file", "base", "backing-fmt", "raw", NULL)));
    dev = must_open("over", QBLK_OPEN_RDWR);
    ranges(dev);
    trims(dev);
    OK(qblk_close(dev));
    dev = must_open("over", 0);
    compare(dev);
    OK(qblk_close(dev));
    CHECK_SH("qemu-img check -q over");
    return 0;
}
