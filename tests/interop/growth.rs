//! Tables that grow, offsets that are large, space that is taken beforehand.

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{Extent, Options};

#[test]
fn the_refcount_table_grows_when_the_file_does() {
    // A table cluster of 64 entries, each for a block of 64 counts: 2 MiB before it must grow.
    for (bits, by_qemu) in [("64", false), ("64", true), ("16", false)] {
        let dir = Tmp::in_memory("reftable");
        let path = dir.join("image");
        let size = 24 << 20;
        if by_qemu {
            let opts = format!("cluster_size=512,refcount_bits={bits}");
            qemu_img!("create", "-q", "-f", "qcow2", "-o", opts, path, size.to_string());
        } else {
            create(&path, "qcow2", size, &[("cluster-size", "512"), ("refcount-bits", bits)]);
        }
        let before = peek_u32(&path, 56);
        let mut rng = Rng::new(3);
        let mut model = vec![0; size as usize];
        let image = open(&path, RW);
        let mut at = 0;
        while at < 14 << 20 {
            let data = rng.bytes(rng.clone().range(1, 200_000) as usize);
            image.write_at(&data, at, NONE).unwrap();
            model[at as usize..][..data.len()].copy_from_slice(&data);
            at += data.len() as u64;
            if rng.one_in(20) {
                image.flush().unwrap();
            }
        }
        for _ in 0..2000 {
            let at = rng.below(size - 700);
            let data = rng.bytes(700);
            image.write_at(&data, at, NONE).unwrap();
            model[at as usize..][..700].copy_from_slice(&data);
        }
        image.close().unwrap();
        if bits == "64" {
            assert!(peek_u32(&path, 56) > before, "the table should have had to grow");
        }
        check_clean(&path);
        check_same(&path, "qcow2", &model, &dir.join("model"));
        let image = open(&path, RO);
        assert_same(&read_all(&image), &model, 0, "after growth");
    }
}

#[test]
fn the_l1_table_grows_with_the_image() {
    for compat in ["0.10", "1.1"] {
        let dir = Tmp::in_memory("l1");
        let path = dir.join("image");
        create(&path, "qcow2", 1 << 20, &[("cluster-size", "512"), ("compat", compat)]);
        let (entries, offset) = (peek_u32(&path, 36), peek_u64(&path, 40));
        let image = open(&path, RW);
        let first = Rng::new(4).bytes(1 << 20);
        image.write_at(&first, 0, NONE).unwrap();
        for size in [3 << 20, 1 << 30, 100 << 30] {
            image.resize(size, &Options::new(), false).unwrap();
            assert_eq!(image.size().unwrap(), size);
            image.write_at(&[0xc3; 3000], size - 3000, NONE).unwrap();
        }
        assert_eq!(read_range(&image, (100 << 30) - 3000, 3000), [0xc3; 3000]);
        image.close().unwrap();
        assert!(peek_u32(&path, 36) > entries && peek_u64(&path, 40) != offset);
        check_clean(&path);
        let reads = [(3 << 20) - 3000, (1 << 30) - 3000, (100u64 << 30) - 3000]
            .map(|at| format!("read -P 0xc3 {at} 3000"));
        let mut commands: Vec<&str> = reads.iter().map(String::as_str).collect();
        commands.push("read -P 0 2M 512k");
        qemu_io_verifies(&path, &commands);
        let image = open(&path, RO);
        assert_same(&read_range(&image, 0, 1 << 20), &first, 0, "the first MiB");
        // More than an L1 table of 32 MiB can do.
        drop(image);
        let image = open(&path, RW);
        let e = image.resize(200 << 30, &Options::new(), false).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EFBIG), "{e}");
        assert_eq!(image.size().unwrap(), 100 << 30);
        image.close().unwrap();
        check_clean(&path);
    }
}

/// qemu-io reads that verify a pattern.
fn qemu_io_verifies(path: &std::path::Path, commands: &[&str]) {
    let out = qemu_io(path, "qcow2", commands);
    assert!(!out.contains("verification"), "{out}");
}

#[test]
fn large_offsets_work() {
    for (size, cluster) in [(64u64 << 40, "2097152"), (1 << 40, "65536"), (64 << 30, "4096")] {
        // Not in memory: the file's length is what matters.
        let dir = Tmp::new("large");
        let path = dir.join("image");
        create(&path, "qcow2", size, &[("cluster-size", cluster)]);
        let image = open(&path, RW);
        let data = Rng::new(5).bytes(300_000);
        let places = [0, size / 3 - 1000, (1 << 32) - 5, (1 << 35) + 77, size - 300_000];
        for (i, at) in places.iter().enumerate() {
            image.write_at(&data[i..], *at + i as u64, NONE).unwrap();
        }
        for (i, at) in places.iter().enumerate() {
            let found = read_range(&image, *at + i as u64, data.len() as u64 - i as u64);
            assert_same(&found, &data[i..], *at, "written");
        }
        image.flush().unwrap();
        let all = all_extents(&image, 0, size, 50);
        let allocated: u64 =
            all.iter().filter(|e| e.has(Extent::ALLOCATED)).map(|e| e.length).sum();
        assert!(allocated < 64 << 20, "{allocated}");
        image.close().unwrap();
        check_clean(&path);
        qemu_io(&path, "qcow2", &[&format!("write -P 0xa7 {} 512", size - 512)]);
        let image = open(&path, RO);
        assert_eq!(read_range(&image, size - 512, 512), [0xa7; 512]);
        let found = read_range(&image, size - 299_996, 299_996 - 512);
        assert_same(&found, &data[4..data.len() - 512], size, "written before QEMU did");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_and_leave_no_file() {
    let dir = Tmp::in_memory("too-big");
    let path = dir.join("image");
    for (size, cluster) in [(129u64 << 30, "512"), (1 << 62, "65536"), (u64::MAX, "2097152")] {
        let opts = options(&[("cluster-size", cluster)]);
        let e = qblk::image::create(path.as_os_str(), "qcow2", size, &opts).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EFBIG), "{e}");
        assert!(!path.exists());
    }
    // The largest that there may be can.
    create(&path, "qcow2", 128 << 30, &[("cluster-size", "512")]);
    check_clean(&path);
}

#[test]
fn preallocation_takes_the_space_that_it_says() {
    let size = (8 << 20) + 1000;
    for compat in ["0.10", "1.1"] {
        for cluster in ["4096", "65536", "2097152"] {
            for how in ["off", "metadata", "falloc", "full"] {
                let what = format!("{compat} {cluster} {how}");
                let dir = Tmp::new("prealloc");
                let path = dir.join("image");
                let pairs = [("compat", compat), ("cluster-size", cluster), ("preallocation", how)];
                create(&path, "qcow2", size, &pairs);
                check_clean(&path);
                judge(&path, size, how, cluster, &what);
                // The same for what a resize adds.
                let path = dir.join("grown");
                create(&path, "qcow2", 1000, &[("compat", compat), ("cluster-size", cluster)]);
                let image = open(&path, RW);
                image.write_at(&[1; 1000], 0, NONE).unwrap();
                image.resize(size, &options(&[("preallocation", how)]), false).unwrap();
                image.zero(0, 1000, NONE).unwrap();
                image.close().unwrap();
                check_clean(&path);
                judge(&path, size, how, cluster, &format!("{what}, resized"));
            }
        }
    }
}

fn judge(path: &std::path::Path, size: u64, how: &str, cluster: &str, what: &str) {
    // Header, refcounts, L1 and L2 tables.
    let tables = 6 * cluster.parse::<u64>().unwrap() + (1 << 20);
    let image = open(path, RW);
    assert!(read_all(&image).iter().all(|b| *b == 0), "{what}: not all zeroes");
    let all = all_extents(&image, 0, size, 100);
    let here: u64 = all.iter().filter(|e| e.has(Extent::HOST)).map(|e| e.length).sum();
    let disk = on_disk(path);
    match how {
        "off" => assert!(here <= 2 << 20 && disk < tables, "{what}: {here} {disk}"),
        "metadata" => assert!(here == size && disk < tables, "{what}: {here} {disk}"),
        _ => assert!(here == size && disk >= size, "{what}: {here} {disk}"),
    }
    let before = std::fs::metadata(path).unwrap().len();
    image.write_at(&vec![0x11; size as usize], 0, NONE).unwrap();
    image.close().unwrap();
    if how != "off" {
        let after = std::fs::metadata(path).unwrap().len();
        assert_eq!(before, after, "{what}: writing took more than was preallocated");
    }
    check_clean(path);
}
