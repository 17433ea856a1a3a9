//! Our server, with fio's nbd engine: much at a time, and verified.

use super::common::*;
use super::peers::*;

const SIZE: u64 = 16 << 20;

fn fio(dir: &Tmp, uri: &str, more: &[&str]) -> String {
    let uri = format!("--uri={uri}");
    let mut args = vec![
        "--name=job",
        "--ioengine=nbd",
        &uri,
        "--size=16M",
        "--verify_state_save=0",
        "--thread",
        "--randrepeat=1",
        "--group_reporting",
    ];
    args.extend(more);
    let args: Vec<&dyn AsRef<std::ffi::OsStr>> =
        args.iter().map(|a| a as &dyn AsRef<std::ffi::OsStr>).collect();
    let told = run_peer_in(dir.path(), "fio", &args).ok();
    assert!(told.contains("err= 0"), "{told}");
    told
}

#[test]
fn fio_verifies_what_it_wrote() {
    let dir = Tmp::new("nbd-fio");
    let raw = raw_file(&dir.join("raw"), SIZE);
    create(&dir.join("q.qcow2"), "qcow2", SIZE, &[]);
    let qcow2 = open(&dir.join("q.qcow2"), RW);
    let served = Served::new(&dir, &[("raw", &raw), ("q", &qcow2)], &[]);
    for name in ["raw", "q"] {
        for uri in served.both(name) {
            fio(&dir, &uri, &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--verify=crc32c"]);
            // Blocks of any length, mixed with reads, trims and flushes.
            fio(
                &dir,
                &uri,
                &[
                    "--rw=randrw",
                    "--bsrange=512-256k",
                    "--bs_unaligned",
                    "--iodepth=16",
                    "--verify=crc32c",
                    "--fsync=20",
                    "--io_size=24M",
                ],
            );
            fio(&dir, &uri, &["--rw=randtrim", "--bs=64k", "--iodepth=8", "--io_size=4M"]);
            // Several connections at the same time, each in its own part.
            fio(
                &dir,
                &uri,
                &[
                    "--rw=randwrite",
                    "--bs=16k",
                    "--iodepth=8",
                    "--numjobs=4",
                    "--size=4M",
                    "--offset_increment=4M",
                    "--verify=md5",
                ],
            );
        }
    }
    let stats = served.server.stats();
    assert_eq!(stats.errors, 0, "{stats:?}");
    served.stop();
    qcow2.close().unwrap();
    check_clean(&dir.join("q.qcow2"));
}
