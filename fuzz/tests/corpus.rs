//! The kept corpus runs through every target without a crash, and soon.

use std::path::Path;
use std::time::{Duration, Instant};

fn run(target: fn(&[u8]), corpus: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(corpus);
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        let begin = Instant::now();
        target(&std::fs::read(&path).unwrap());
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(10), "{}: took {took:?}", path.display());
        count += 1;
    }
    assert!(count > 0, "{} is empty", dir.display());
}

#[test]
fn luks_headers_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::luks_header, "luks_header");
}

#[test]
fn headers_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::qcow2_header, "qcow2_header");
}

#[test]
fn operations_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::qcow2_ops, "qcow2_ops");
}

#[test]
fn snapshots_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::qcow2_snapshots, "qcow2_snapshots");
}

#[test]
fn bitmaps_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::bitmaps::qcow2_bitmaps, "qcow2_bitmaps");
}

#[test]
fn partition_tables_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::partition::partition_table, "partition_table");
}

#[test]
fn negotiations_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::nbd::handshake, "nbd_server_handshake");
}

#[test]
fn requests_of_the_corpus_do_no_harm() {
    run(qblk_fuzz::nbd::transmission, "nbd_server_transmission");
}

#[test]
fn what_servers_say_of_the_corpus_does_no_harm_handshake() {
    run(qblk_fuzz::nbd_client::handshake, "nbd_client_handshake");
}

#[test]
fn what_servers_say_of_the_corpus_does_no_harm_transmission() {
    run(qblk_fuzz::nbd_client::transmission, "nbd_client_transmission");
}
