/* Many servers in one process, of one device and of many, and a server that exports another's export;
 * freeing one leaves the others serving. */
#include "nbd.h"
#include <dirent.h>

static int count(const char *dir)
{
    int n = 0;
    DIR *d = opendir(dir);
    CHECK(d != NULL);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Threads end a little after what they worked for. */
static void wait_for_count(const char *dir, int most)
{
    while (count(dir) > most)
        usleep(10000);
}

enum { MANY = 20 };

static void round_(void)
{
    qblk *shared = must_open("mem:1M", QBLK_OPEN_RDWR), *dev[MANY], *nbd[2 * MANY];
    qblk_server *srv[MANY];
    char sock[32], uri[64], want[64] = "", found[64];
    for (int i = 0; i < MANY; i++) {
        dev[i] = must_open("mem:1M", QBLK_OPEN_RDWR);
        srv[i] = new_server("own", dev[i], 0);
        OK(qblk_server_add_export(srv[i], "shared", shared, 0));
        snprintf(sock, sizeof sock, "sock-%d", i);
        snprintf(uri, sizeof uri, "nbd+unix:///?socket=%s", sock);
        OK(qblk_server_listen(srv[i], uri));
        nbd[i] = must_open(unix_uri(sock, "own"), QBLK_OPEN_RDWR);
        nbd[MANY + i] = must_open(unix_uri(sock, "shared"), QBLK_OPEN_RDWR);
        snprintf(want, sizeof want, "%d", i);
        OK(qblk_pwrite(nbd[i], want, sizeof want, 0));
        OK(qblk_pwrite(nbd[MANY + i], want, sizeof want, 0));
        OK(qblk_flush(nbd[i]));
    }
    /* One device has one truth, through whichever server. */
    snprintf(want, sizeof want, "%d", MANY - 1);
    for (int i = 0; i < MANY; i++) {
        OK(qblk_pread(nbd[MANY + i], found, sizeof found, 0));
        CHECK_STR(found, want);
    }
    for (int i = 0; i < MANY; i += 2) {
        OK(qblk_close(nbd[i]));
        OK(qblk_close(nbd[MANY + i]));
        qblk_server_free(srv[i]);
        OK(qblk_close(dev[i]));
    }
    for (int i = 1; i < MANY; i += 2) {
        snprintf(want, sizeof want, "%d", i);
        OK(qblk_pread(nbd[i], found, sizeof found, 0));
        CHECK_STR(found, want);
        OK(qblk_pread(dev[i], found, sizeof found, 0));
        CHECK_STR(found, want);
        OK(qblk_close(nbd[i]));
        OK(qblk_close(nbd[MANY + i]));
        OK(qblk_server_stop(srv[i], 1000));
        qblk_server_free(srv[i]);
        OK(qblk_close(dev[i]));
    }
    OK(qblk_close(shared));
}

/* Each serves what it has from the one before. */
static void a_chain(void)
{
    enum { LONG = 5 };
    qblk *dev[LONG + 1];
    qblk_server *srv[LONG];
    char sock[32], uri[64], found[5];
    dev[0] = must_open("mem:1M", QBLK_OPEN_RDWR);
    for (int i = 0; i < LONG; i++) {
        srv[i] = new_server("", dev[i], 0);
        snprintf(sock, sizeof sock, "link-%d", i);
        snprintf(uri, sizeof uri, "nbd+unix:///?socket=%s", sock);
        OK(qblk_server_listen(srv[i], uri));
        dev[i + 1] = must_open(uri, QBLK_OPEN_RDWR);
    }
    OK(qblk_pwrite2(dev[LONG], "Howdy", 5, 1000, QBLK_REQ_FUA));
    OK(qblk_pread(dev[0], found, 5, 1000));
    CHECK_MEM(found, "Howdy", 5);
    OK(qblk_pread(dev[LONG], found, 5, 1000));
    CHECK_MEM(found, "Howdy", 5);
    for (int i = LONG; i-- > 0;) {
        OK(qblk_close(dev[i + 1]));
        qblk_server_free(srv[i]);
    }
    OK(qblk_close(dev[0]));
}

int main(int argc, char **argv)
{
    (void)argc;
    test_begin(argv);
    alarm(300);
    round_();
    wait_for_count("/proc/self/task", 3);
    const int fds = count("/proc/self/fd");
    for (int i = 0; i < (quick() ? 1 : 5); i++)
        round_();
    a_chain();
    /* Nothing stays. */
    wait_for_count("/proc/self/task", 3);
    wait_for_count("/proc/self/fd", fds);
    return 0;
}
