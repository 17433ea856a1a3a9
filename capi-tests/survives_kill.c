/* What was flushed, or written with FUA, is in the file: it is there after the process was killed,
 * which is what can be shown of a power cut without one. */
#include "test.h"
#include <signal.h>

enum { BLOCKS = 50 };

static uint64_t place(int i)
{
    return (uint64_t)i * 1000003;
}

static int child(const char *how, const char *file)
{
    unsigned char bytes[6000];
    qblk *dev = must_open(file, QBLK_OPEN_RDWR);
    const int fua = strcmp(how, "fua") == 0;
    for (int i = 0; i < BLOCKS; i++) {
        fill(bytes, sizeof bytes, (uint64_t)i + 1);
        OK(qblk_pwrite2(dev, bytes, sizeof bytes, place(i), fua ? QBLK_REQ_FUA : 0));
    }
    if (!fua)
        OK(qblk_flush(dev));
    kill(getpid(), SIGKILL);
    return 1;
}

int main(int argc, char **argv)
{
    static const char *const ways[] = {"flush", "fua"};
    unsigned char want[6000], found[6000];
    if (argc == 3)
        return child(argv[1], argv[2]);
    test_begin(argv);
    for (int w = 0; w < 2; w++)
        for (int k = 0; k < 2; k++) {
            const char *kind = KINDS[k];
            remove(kind);
            qblk *dev = new_device(kind, place(BLOCKS));
            OK(qblk_close(dev));
            const int status = run_self(ways[w], kind);
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
            dev = must_open(kind, 0);
            for (int i = 0; i < BLOCKS; i++) {
                fill(want, sizeof want, (uint64_t)i + 1);
                OK(qblk_pread(dev, found, sizeof found, place(i)));
                CHECK_MEM(found, want, sizeof found);
            }
            OK(qblk_close(dev));
        }
    /* Clusters that nothing points to (3) may be left, errors may not. */
    int status = sh("qemu-img check -q qcow2");
    CHECK(status == 0 || status == 3);
    return 0;
}
