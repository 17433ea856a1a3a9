//! Bitmaps over NBD: our server asked by QEMU and by our client, QEMU's server asked by our client.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::common::*;
use super::peers::*;
use qblk::block::{BitmapChange, ErrorKind};
use qblk::nbd::server::{Export, Server};
use qblk::{Extent, Image};

const K: u64 = 1024;

fn served(image: &Image, socket: &Path, bitmap: Option<&[u8]>) -> Server {
    let server = Server::new().unwrap();
    let own = image.own_context().unwrap();
    let mut export = Export::new(Vec::new(), Vec::new(), own, Arc::default(), false).unwrap();
    if let Some(bitmap) = bitmap {
        export.show_bitmap(bitmap).unwrap();
    }
    server.add(export).unwrap();
    server.listen(uri(socket).as_bytes()).unwrap();
    server
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// An image with bitmaps: a and b that have different parts dirty, an inconsistent one.
fn scene(path: &Path) -> (Image, Runs, Runs) {
    create(path, "qcow2", 64 * K * K, &[]);
    let image = open(path, RW);
    add(&image, "lost", 0, false);
    image.write_at(&[1; 10], 0, NONE).unwrap();
    drop(image);
    let image = open(path, RW);
    add(&image, "a", 0, false);
    image.write_at(&[1; 100_000], 5 * K * K, NONE).unwrap();
    add(&image, "b", 512, false);
    image.write_at(&[1; 600], 64 * K * K - 600, NONE).unwrap();
    image.zero(K * K, 64 * K, NONE).unwrap();
    let a = dirty(&image, "a");
    let b = vec![(K * K, 64 * K), (64 * K * K - 1024, 1024)];
    assert_eq!(dirty(&image, "b"), b);
    (image, a, b)
}

#[test]
fn our_server_tells_qemu_of_bitmaps() {
    let dir = Tmp::in_memory("bitmaps");
    let (image, a, b) = scene(&dir.join("image.qcow2"));
    let socket = dir.join("s");
    let server = served(&image, &socket, None);
    assert_eq!(map_over_nbd(&socket, "a"), a);
    assert_eq!(map_over_nbd(&socket, "b"), b);
    // As it is now, and not as it was.
    image.write_at(&[1; 10], 20 * K * K, NONE).unwrap();
    image.change_bitmap(&BitmapChange::Clear(b"a")).unwrap();
    assert_eq!(map_over_nbd(&socket, "a"), []);
    assert!(map_over_nbd(&socket, "b").contains(&(20 * K * K, 512)));
    drop(server);
}

#[test]
fn our_server_lists_the_bitmaps_that_it_tells_of() {
    let dir = Tmp::in_memory("bitmaps");
    let (image, ..) = scene(&dir.join("image.qcow2"));
    for (shown, names) in
        [(None, vec!["a", "b"]), (Some(&b"b"[..]), vec!["b"]), (Some(b""), vec![])]
    {
        let socket = dir.join("s");
        let server = served(&image, &socket, shown);
        let text = run_ok("nbdinfo", &[&"--list", &uri(&socket)]);
        let found: Vec<_> =
            text.lines().filter_map(|l| l.trim().strip_prefix("qemu:dirty-bitmap:")).collect();
        assert_eq!(found, names, "{text}");
        assert!(text.contains("qemu:allocation-depth"), "{text}");
        drop(server);
    }
    let server = Server::new().unwrap();
    let own = image.own_context().unwrap();
    let mut export = Export::new(Vec::new(), Vec::new(), own, Arc::default(), false).unwrap();
    let e = export.show_bitmap(b"none").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let e = export.show_bitmap(b"lost").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ESTALE), "{e}");
    drop((export, server));
}

#[test]
fn our_client_asks_our_server_and_qemus() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    let (image, a, b) = scene(&path);
    let socket = dir.join("s");
    let asked = options(&[
        ("format", "raw"),
        ("nbd.contexts", "qemu:dirty-bitmap:a,qemu:dirty-bitmap:b,qemu:dirty-bitmap:none"),
    ]);
    let look = |bitmaps: &[(&str, &Runs)]| {
        let image = Image::open(uri(&socket).as_ref(), &asked, RO).unwrap();
        for (name, want) in bitmaps {
            assert_eq!(dirty(&image, name), **want, "{name}");
        }
        let e = try_dirty(&image, "none").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP), "{e}");
        // With what else there is to know.
        let mut some = [Extent::default(); 16];
        let n = image.dirty_extents(b"a", false, 5 * K * K, 128 * K, &mut some).unwrap();
        assert_eq!(n, 1);
        assert!(some[0].has(Extent::DIRTY) && some[0].has(Extent::DATA), "{some:?}");
        image.close().unwrap();
    };
    let server = served(&image, &socket, None);
    look(&[("a", &a), ("b", &b)]);
    drop(server);
    image.close().unwrap();
    let _ = std::fs::remove_file(&socket);
    let args = ["-r", "-t", "-f", "qcow2", "-e", "9", "-A", "-B", "a", "-B", "b", "-k"];
    let mut command = Command::new("qemu-nbd");
    command.args(args).arg(&socket).arg(&path).stderr(Stdio::null());
    let server = Peer(command.spawn().expect("install qemu-utils (apt-get install qemu-utils)"));
    wait_for(&socket);
    look(&[("a", &a), ("b", &b)]);
    drop(server);
}

#[test]
fn many_small_runs_are_told_in_many_replies() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 32 * K * K, &[]);
    let image = open(&path, RW);
    add(&image, "b", 512, false);
    let mut want = Runs::new();
    for i in 0..20_000 {
        image.write_at(&[1], i * 1024, NONE).unwrap();
        want.push((i * 1024, 512));
    }
    let socket = dir.join("s");
    let server = served(&image, &socket, None);
    assert_eq!(map_over_nbd(&socket, "b"), want);
    let asked = options(&[("format", "raw"), ("nbd.contexts", "qemu:dirty-bitmap:b")]);
    let client = Image::open(uri(&socket).as_ref(), &asked, RO).unwrap();
    assert_eq!(dirty(&client, "b"), want);
    drop((client, server));
}

#[test]
fn a_client_may_choose_more_bitmaps_than_fit_into_a_reply() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 4 * K * K, &[]);
    let image = open(&path, RW);
    let names: Vec<_> = (0..100).map(|i| format!("b{i:02}")).collect();
    for name in &names {
        add(&image, name, 512, false);
    }
    for i in 0..4000 {
        image.write_at(&[1], i * 1024, NONE).unwrap();
    }
    let socket = dir.join("s");
    let server = served(&image, &socket, None);
    let text = run_ok("nbdinfo", &[&"--list", &uri(&socket)]);
    assert_eq!(text.matches("qemu:dirty-bitmap:").count(), 100);
    // (Our client asks for 64 at most, and the two of its own.)
    let all: Vec<_> = names[..64].iter().map(|n| format!("qemu:dirty-bitmap:{n}")).collect();
    let asked = options(&[("format", "raw"), ("nbd.contexts", &all.join(","))]);
    let client = Image::open(uri(&socket).as_ref(), &asked, RO).unwrap();
    let want: Runs = (0..4000).map(|i| (i * 1024, 512)).collect();
    for name in [&names[0], &names[61]] {
        assert_eq!(dirty(&client, name), want, "{name}");
    }
    drop((client, server));
}
