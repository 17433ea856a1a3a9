/*
 * A disk image in a C program: make one, write to it, read from it, look at it.
 *
 * Build against an installed libqblk:  cc demo.c $(pkg-config --cflags --libs qblk)
 * Or, without installing anything:     make demo
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <qblk.h>

/* Calls answer 0, or a negative code; the text says what went wrong, with which file. */
static void must(int rc)
{
    if (rc < 0) {
        fprintf(stderr, "demo: %s\n", qblk_get_error());
        exit(1);
    }
}

static void show(const char *name)
{
    qblk *disk;
    qblk_info info;
    qblk_extent extents[8];
    must(qblk_open(name, 0, &disk));
    must(qblk_get_info(disk, &info));
    printf("   %s: format %s, %" PRIu64 " MiB to its user, %" PRIu64 " KiB on the host,"
           " %u image(s) below it\n",
           name, info.format, info.size >> 20, info.allocated >> 10, info.backing_depth);

    /* Which bytes live where: in this image, in one below, or nowhere because they are zero. */
    int64_t n = qblk_extents(disk, info.size, 0, 0, extents, 8);
    must(n < 0 ? (int)n : 0);
    for (int64_t i = 0; i < n; i++)
        printf("     bytes %10" PRIu64 " to %10" PRIu64 "  %s\n", extents[i].offset,
               extents[i].offset + extents[i].length - 1,
               extents[i].flags & QBLK_EXTENT_ZERO ? "zeroes, kept nowhere"
               : extents[i].depth == 0             ? "in this image"
                                                   : "in the image below");
    must(qblk_close(disk));
}

int main(void)
{
    const uint64_t size = UINT64_C(64) << 20;
    const char hello[] = "Hello from the base image.";
    const char change[] = "Howdy";
    char buf[sizeof hello];
    char dir[] = "/tmp/qblk-demo-XXXXXX";
    qblk *disk;
    qblk_options *options;

    if (!mkdtemp(dir) || chdir(dir) != 0) {
        perror(dir);
        return 1;
    }
    printf("libqblk %s, working in %s\n\n", qblk_version_string(), dir);

    printf("1. A base disk: base.raw, a plain file of 64 MiB with one sentence at byte 1048576.\n");
    must(qblk_create("base.raw", "raw", size, NULL));
    must(qblk_open("base.raw", QBLK_OPEN_RDWR, &disk));
    must(qblk_pwrite(disk, hello, sizeof hello, 1048576));
    must(qblk_close(disk)); /* flushes */
    show("base.raw");

    printf("\n2. A qcow2 image over it: disk.qcow2. It is empty, so it reads as its base does.\n");
    must(qblk_options_new(&options));
    must(qblk_options_set(options, "backing-file", "base.raw"));
    must(qblk_options_set(options, "backing-fmt", "raw"));
    must(qblk_create("disk.qcow2", "qcow2", size, options));
    qblk_options_free(options);
    must(qblk_open("disk.qcow2", QBLK_OPEN_RDWR, &disk));
    must(qblk_pread(disk, buf, sizeof buf, 1048576));
    printf("   read at byte 1048576: \"%s\"\n", buf);

    printf("\n3. Five bytes are written to disk.qcow2. Any offset and any length work.\n");
    must(qblk_pwrite(disk, change, strlen(change), 1048576));
    must(qblk_pread(disk, buf, sizeof buf, 1048576));
    printf("   read again:           \"%s\"\n", buf);
    must(qblk_flush(disk)); /* from here on they survive a power cut */
    must(qblk_close(disk));
    show("disk.qcow2");

    printf("\n4. The base was not touched:\n");
    must(qblk_open("base.raw", 0, &disk));
    must(qblk_pread(disk, buf, sizeof buf, 1048576));
    printf("   base.raw still reads: \"%s\"\n", buf);

    printf("\n5. What cannot be done is answered, not guessed:\n");
    int rc = qblk_pwrite(disk, change, 1, 0);
    printf("   code %d (%s)\n   %s\n", rc, qblk_strerror(rc), qblk_get_error());
    must(qblk_close(disk));

    printf("\nDone. The images are in %s; the program is examples/demo.c.\n", dir);
    return 0;
}
