//! Extended L2 entries: what small writes, zeroing and trimming do to subclusters, beside QEMU.

use super::common::*;
use qblk::{Extent, Options, ReqFlags};

/// Both words of the L2 entry of a cluster in the first table.
fn entry(path: &std::path::Path, cluster: u64) -> (u64, u64) {
    let l1 = peek_u64(path, 40);
    let l2 = peek_u64(path, l1) & 0x00ff_ffff_ffff_fe00;
    (peek_u64(path, l2 + 16 * cluster), peek_u64(path, l2 + 16 * cluster + 8))
}

fn on_base(dir: &Tmp, cluster: &str, size: u64) -> std::path::PathBuf {
    std::fs::write(dir.join("base"), vec![5; size as usize]).unwrap();
    let path = dir.join("top");
    create(
        &path,
        "qcow2",
        size,
        &[
            ("extended-l2", "on"),
            ("cluster-size", cluster),
            ("backing-file", "base"),
            ("backing-fmt", "raw"),
        ],
    );
    path
}

#[test]
fn the_same_requests_make_the_same_entries_as_in_qemu() {
    let size = 1 << 20;
    // In subclusters of 2 KiB. What QEMU keeps of a trimmed part of a cluster is not told here: it
    // leaves it as it is.
    let steps: &[(&str, u64, u64)] = &[
        ("write -P 1", 4096, 4096),
        ("write -P 2", 65536, 65536),
        ("write -P 3", 131_072, 65536),
        ("write -P 4", 196_608 + 512, 100),
        ("write -z", 131_072 + 2048, 4096),
        ("write -z -u", 4096, 2048),
        ("write -P 6", 262_144 - 1000, 5000),
        ("write -z -u", 65536, 65536),
        ("write -z", 327_680, 8192),
        ("write -P 8", 327_680 + 4096, 1024),
        ("write -z", 393_216, 65536),
        ("write -P 9", 393_216 + 63 * 1024, 1024),
        ("discard", 131_072, 65536),
        ("write -z", 458_752 + 700, 3000),
    ];
    let (ours, theirs) = (Tmp::in_memory("sub-ours"), Tmp::in_memory("sub-theirs"));
    let (path, other) = (on_base(&ours, "64k", size), on_base(&theirs, "64k", size));
    for (i, (command, offset, count)) in steps.iter().enumerate() {
        let image = open(&path, RW);
        let words: Vec<&str> = command.split(' ').collect();
        match words[..] {
            ["write", "-P", byte] => {
                let data = vec![byte.parse().unwrap(); *count as usize];
                image.write_at(&data, *offset, NONE).unwrap();
            }
            ["write", "-z"] => image.zero(*offset, *count, NONE).unwrap(),
            ["write", "-z", "-u"] => image.zero(*offset, *count, ReqFlags::MAY_TRIM).unwrap(),
            _ => image.trim(*offset, *count, NONE).unwrap(),
        }
        image.close().unwrap();
        qemu_io(&other, "qcow2", &[&format!("{command} {offset} {count}")]);
        check_clean(&path);
        for cluster in 0..size / 65536 {
            let (us, them) = (entry(&path, cluster), entry(&other, cluster));
            assert_eq!(us.1, them.1, "step {i}, {command} {offset}: bits of cluster {cluster}");
            assert_eq!(us.0 == 0, them.0 == 0, "step {i}: space of cluster {cluster}");
        }
    }
    let compared = run("qemu-img", &[&"compare", &"-s", &path, &other]);
    assert!(compared.status.success());
}

#[test]
fn a_small_write_fills_its_subcluster_and_no_more() {
    for (cluster, sub) in [("16k", 512u64), ("64k", 2048), ("2M", 65536)] {
        let dir = Tmp::new("sub-small");
        let size = 16 << 20;
        let path = on_base(&dir, cluster, size);
        let image = open(&path, RW);
        let at = (8 << 20) + 4 * sub;
        // The tables are there, and the file is long enough.
        image.write_at(&[9; 100], at + (1 << 20), NONE).unwrap();
        image.flush().unwrap();
        let before = on_disk(&path);
        image.write_at(&[9; 100], at + sub + 10, NONE).unwrap();
        image.flush().unwrap();
        // One subcluster (and perhaps a block of the file system), no cluster.
        let taken = on_disk(&path) - before;
        assert!(taken <= sub + 4096, "{cluster}: {taken}");
        let all = all_extents(&image, at, 4 * sub, 8);
        let told: Vec<_> = all.iter().map(|e| (e.offset, e.length, e.depth)).collect();
        let expected = [(at, sub, 1), (at + sub, sub, 0), (at + 2 * sub, 2 * sub, 1)];
        assert_eq!(told, expected, "{cluster}");
        let mut bytes = vec![5; 4 * sub as usize];
        bytes[(sub + 10) as usize..][..100].fill(9);
        assert_same(&read_range(&image, at, 4 * sub), &bytes, at, cluster);
        image.close().unwrap();
        check_clean(&path);
    }
}

#[test]
fn parts_of_clusters_are_zeroed_and_trimmed_without_writing() {
    let dir = Tmp::new("sub-trim");
    let path = on_base(&dir, "2M", 16 << 20);
    let image = open(&path, RW);
    image.write_at(&vec![7; 4 << 20], 0, NONE).unwrap();
    image.flush().unwrap();
    let before = on_disk(&path);
    // Half a cluster, and then the rest of it: the space goes back in parts, then as a whole.
    image.trim(0, 1 << 20, NONE).unwrap();
    assert_eq!(on_disk(&path), before - (1 << 20));
    image.zero(2 << 20, 65536, NONE).unwrap();
    assert_eq!(on_disk(&path), before - (1 << 20), "kept");
    image.zero((2 << 20) + 65536, 65536, ReqFlags::FAST_ZERO).unwrap();
    image.zero((2 << 20) + 131_072, 131_072, ReqFlags::MAY_TRIM).unwrap();
    assert_eq!(on_disk(&path), before - (1 << 20) - 131_072);
    assert_eq!(read_range(&image, 0, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(read_range(&image, 1 << 20, 1 << 20), vec![7; 1 << 20]);
    assert_eq!(read_range(&image, 2 << 20, 262_145)[262_143..], [0, 7]);
    // Not here at all, but hidden where asked for.
    image.zero(8 << 20, 65536, ReqFlags::FAST_ZERO).unwrap();
    assert_eq!(read_range(&image, (8 << 20) + 65535, 2), [0, 5]);
    image.trim(1 << 20, 1 << 20, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(entry(&path, 0), (0, 0xffff_ffff << 32));
    // A part of a subcluster is no reason to fail, only to write.
    let image = open(&path, RW);
    image.zero(1, 100, NONE).unwrap();
    let e = image.zero((3 << 20) + 1, 100, ReqFlags::FAST_ZERO).unwrap_err();
    assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::ENOTSUP), "{e}");
    image.close().unwrap();
}

#[test]
fn compressed_clusters_are_whole_whatever_is_done_to_a_part() {
    let dir = Tmp::in_memory("sub-compressed");
    let path = on_base(&dir, "64k", 1 << 20);
    qemu_io(
        &path,
        "qcow2",
        &[
            "write -c -P 1 64k 64k",
            "write -c -P 2 128k 64k",
            "write -c -P 3 192k 64k",
            "write -c -P 4 256k 64k",
        ],
    );
    let image = open(&path, RW);
    let e = image.zero(65536 + 2048, 2048, ReqFlags::FAST_ZERO).unwrap_err();
    assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::ENOTSUP), "{e}");
    image.zero(65536 + 2048, 2048, NONE).unwrap();
    image.trim(131_072 + 2048, 2048, NONE).unwrap();
    image.write_at(&[9; 10], 196_608 + 100, NONE).unwrap();
    image.zero(262_144, 65536, ReqFlags::MAY_TRIM).unwrap();
    let mut model = vec![5; 1 << 20];
    for (i, byte) in [(1, 1), (2, 2), (3, 3), (4, 0)] {
        model[i << 16..(i + 1) << 16].fill(byte);
    }
    model[65536 + 2048..65536 + 4096].fill(0);
    model[196_608 + 100..196_608 + 110].fill(9);
    assert_same(&read_all(&image), &model, 0, "compressed and not");
    let compressed = all_extents(&image, 0, 1 << 20, 9);
    let compressed: Vec<_> =
        compressed.iter().filter(|e| e.has(Extent::COMPRESSED)).map(|e| e.offset).collect();
    assert_eq!(compressed, [131_072]);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &model, &dir.join("model"));
}

#[test]
fn space_can_be_reserved_over_a_backing_file_without_hiding_it() {
    for by_qemu in [false, true] {
        let dir = Tmp::new("sub-prealloc");
        let size = 4 << 20;
        std::fs::write(dir.join("base"), vec![5; size as usize]).unwrap();
        let path = dir.join("top");
        if by_qemu {
            let opts = "extended_l2=on,preallocation=metadata,backing_file=base,backing_fmt=raw";
            qemu_img!("create", "-q", "-f", "qcow2", "-o", opts, path, size.to_string());
        } else {
            let pairs = [
                ("extended-l2", "on"),
                ("preallocation", "metadata"),
                ("backing-file", "base"),
                ("backing-fmt", "raw"),
            ];
            create(&path, "qcow2", size, &pairs);
        }
        check_clean(&path);
        let (word, bits) = entry(&path, 3);
        assert!(word >> 63 == 1 && bits == 0, "{word:#x} {bits:#x}");
        let image = open(&path, RW);
        let mut model = vec![5; size as usize];
        assert_same(&read_all(&image), &model, 0, "reserved");
        image.write_at(&[6; 5000], 70_000, NONE).unwrap();
        model[70_000..75_000].fill(6);
        image.resize(size + 100_000, &Options::new(), false).unwrap();
        model.resize(size as usize + 100_000, 0);
        assert_same(&read_all(&image), &model, 0, "written");
        image.close().unwrap();
        check_clean(&path);
        assert_eq!(entry(&path, 1), (entry(&path, 1).0, 0x1c), "{:?}", entry(&path, 1));
        check_same(&path, "qcow2", &model[..model.len() / 512 * 512], &dir.join("model"));
    }
}
