/*
 * Serve a disk image by NBD until standard input closes.
 *
 *     cc serve.c $(pkg-config --cflags --libs qblk) -o serve
 *     ./serve disk.qcow2 'nbd+unix:///?socket=/tmp/disk.sock'
 *
 * and from elsewhere, while it runs:
 *
 *     qblk info 'nbd+unix:///?socket=/tmp/disk.sock'
 *     qemu-io -f raw -c 'read 0 4k' 'nbd+unix:///?socket=/tmp/disk.sock'
 *
 * Over a network use nbds:// and the settings tls=required, tls-certificates and tls-verify-peer: who
 * can reach a server without them can read and write the disk.
 */
#include <stdio.h>
#include <stdlib.h>

#include <qblk.h>

/* Calls answer 0, or a negative code; the text says what went wrong, with which file. */
static void must(int rc)
{
    if (rc < 0) {
        fprintf(stderr, "serve: %s\n", qblk_get_error());
        exit(1); /* closes and stops what is open */
    }
}

int main(int argc, char **argv)
{
    char uri[512];
    qblk *disk;
    qblk_server *server;

    if (argc < 3) {
        fprintf(stderr, "usage: %s IMAGE URI [KEY VALUE]...\n", argv[0]);
        return 2;
    }
    must(qblk_open(argv[1], QBLK_OPEN_RDWR, &disk));

    must(qblk_server_new(&server));
    for (int i = 3; i + 1 < argc; i += 2)
        must(qblk_server_set(server, argv[i], argv[i + 1]));
    /* "" is the export of clients that ask for none by name. */
    must(qblk_server_add_export(server, "", disk, 0));
    must(qblk_server_listen(server, argv[2]));

    /* Clients are served from here on, by threads of the server's own. */
    must(qblk_server_get_uri(server, uri, sizeof uri) < 0 ? -1 : 0);
    printf("serving %s at %s\n", argv[1], uri);
    fflush(stdout);
    while (getchar() != EOF)
        ;

    /* What is under way gets five seconds; what was written is flushed. */
    must(qblk_server_stop(server, 5000));
    qblk_server_free(server);
    must(qblk_close(disk));
    return 0;
}
