//! Version × cluster size × refcount width × chain × compression.

use std::fs;
use std::path::Path;

use super::common::*;
use qblk::ReqFlags;

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    compat: &'static str,
    cluster: &'static str,
    bits: &'static str,
    chain: &'static str,
    compression: &'static str,
}

const SIZE: u64 = (5 << 20) + 3 * 512;

fn cells(compressions: &[&'static str]) -> Vec<Cell> {
    let mut all = Vec::new();
    for compat in ["0.10", "1.1"] {
        for cluster in ["512", "4096", "65536", "2097152"] {
            for bits in ["1", "2", "16", "64"] {
                for chain in ["none", "raw", "qcow2"] {
                    for &compression in compressions {
                        let v2 = compat == "0.10";
                        if v2 && (bits != "16" || compression == "zstd") {
                            continue;
                        }
                        // QEMU itself fails there: compressed clusters share a host cluster, which
                        // so narrow a count cannot say.
                        if !compression.is_empty() && bits.len() == 1 {
                            continue;
                        }
                        all.push(Cell { compat, cluster, bits, chain, compression });
                    }
                }
            }
        }
    }
    all
}

/// Data, text and holes.
fn content(rng: &mut Rng) -> Vec<u8> {
    let mut out = vec![0; SIZE as usize];
    for i in 0..24 {
        let at = rng.below(SIZE - 300_000) as usize;
        let mut data = rng.bytes(1 + rng.clone().below(200_000) as usize);
        if i % 2 == 0 {
            data.iter_mut().for_each(|b| *b &= 7);
        }
        out[at..at + data.len()].copy_from_slice(&data);
    }
    let last = out.len() - 1;
    out[last] = 0x77;
    out
}

/// Make the base of a chain: its format, and what it holds.
fn base(cell: &Cell, dir: &Tmp, rng: &mut Rng) -> Option<(&'static str, Vec<u8>)> {
    let raw = dir.join("base.raw");
    match cell.chain {
        "none" => None,
        kind => {
            let bytes = content(rng);
            fs::write(&raw, &bytes).unwrap();
            if kind == "raw" {
                fs::rename(&raw, dir.join("base")).unwrap();
                return Some(("raw", bytes));
            }
            qemu_img!("convert", "-f", "raw", "-O", "qcow2", raw, dir.join("base"));
            Some(("qcow2", bytes))
        }
    }
}

#[test]
fn images_made_by_qemu_are_read_to_the_byte() {
    let mut rng = Rng::new(1);
    for cell in cells(&["", "zlib", "zstd"]) {
        let dir = Tmp::in_memory("made-by-qemu");
        let (path, flat) = (dir.join("image"), dir.join("flat"));
        let base = base(&cell, &dir, &mut rng);
        // Mostly what the base has, so that much of it stays there.
        let mut bytes = base.as_ref().map_or_else(|| content(&mut rng), |b| b.1.clone());
        for _ in 0..8 {
            let at = rng.below(SIZE - 100_000) as usize;
            let n = rng.below(100_000) as usize;
            let data = if rng.one_in(3) { vec![0; n] } else { rng.bytes(n) };
            bytes[at..at + n].copy_from_slice(&data);
        }
        fs::write(&flat, &bytes).unwrap();
        let mut opts = format!(
            "compat={},cluster_size={},refcount_bits={}",
            cell.compat, cell.cluster, cell.bits
        );
        if !cell.compression.is_empty() {
            opts += &format!(",compression_type={}", cell.compression);
        }
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"convert", &"-f", &"raw", &"-O", &"qcow2", &"-o", &opts];
        if !cell.compression.is_empty() {
            args.push(&"-c");
        }
        let backing = dir.join("base");
        if let Some((format, _)) = &base {
            args.extend([&"-B" as &dyn AsRef<std::ffi::OsStr>, &backing, &"-F", format]);
        }
        args.extend([&flat as &dyn AsRef<std::ffi::OsStr>, &path]);
        run_ok("qemu-img", &args);

        let what = format!("{cell:?}");
        let image = open(&path, RO);
        let info = image.info().unwrap();
        assert_eq!(info.size, SIZE, "{what}");
        assert_eq!(info.cluster_size.to_string(), cell.cluster, "{what}");
        assert_eq!(info.backing_depth, u32::from(base.is_some()), "{what}");
        let property = |key| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
        assert_eq!(property("qcow2.compat"), cell.compat, "{what}");
        assert_eq!(property("qcow2.refcount-bits"), cell.bits, "{what}");
        assert_same(&read_all(&image), &bytes, 0, &what);
        for _ in 0..100 {
            let at = rng.below(SIZE);
            let n = rng.below(5000).min(SIZE - at);
            assert_same(&read_range(&image, at, n), &bytes[at as usize..][..n as usize], at, &what);
        }
        // A read-only open changes nothing; a writable one can write over all of it.
        drop(image);
        let image = open(&path, RW);
        for _ in 0..20 {
            let at = rng.below(SIZE);
            let data = rng.bytes(rng.clone().below(70_000).min(SIZE - at) as usize);
            image.write_at(&data, at, NONE).unwrap();
            bytes[at as usize..][..data.len()].copy_from_slice(&data);
        }
        image.close().unwrap();
        judge(&path, &bytes, &dir, &what);
    }
}

#[test]
fn images_made_here_are_sound_and_the_same_for_qemu() {
    let mut rng = Rng::new(2);
    for cell in cells(&[""]) {
        let dir = Tmp::in_memory("made-here");
        let path = dir.join("image");
        let base = base(&cell, &dir, &mut rng);
        let mut pairs = vec![
            ("compat", cell.compat),
            ("cluster-size", cell.cluster),
            ("refcount-bits", cell.bits),
        ];
        if let Some((format, _)) = &base {
            pairs.extend([("backing-file", "base"), ("backing-fmt", *format)]);
        }
        create(&path, "qcow2", SIZE, &pairs);
        let what = format!("{cell:?}");
        check_clean(&path);
        let mut bytes = base.map_or_else(|| vec![0; SIZE as usize], |b| b.1);
        judge(&path, &bytes, &dir, &what);

        let image = open(&path, RW);
        for i in 0..40 {
            let at = rng.below(SIZE);
            let n = rng.pick(&[1, 511, 4096, 65536, 300_000]).min(SIZE - at);
            let range = at as usize..(at + n) as usize;
            if i % 5 == 4 {
                image.zero(at, n, rng.pick(&[NONE, ReqFlags::MAY_TRIM])).unwrap();
                bytes[range].fill(0);
            } else {
                let data = rng.bytes(n as usize);
                image.write_at(&data, at, NONE).unwrap();
                bytes[range].copy_from_slice(&data);
            }
        }
        image.close().unwrap();
        judge(&path, &bytes, &dir, &what);

        // QEMU goes on with it, and then again this library.
        qemu_io(&path, "qcow2", &["write -P 0x5a 70000 200000", "write -z 1M 256k", "flush"]);
        bytes[70_000..270_000].fill(0x5a);
        bytes[1 << 20..(1 << 20) + (256 << 10)].fill(0);
        let image = open(&path, RW);
        assert_same(&read_all(&image), &bytes, 0, &what);
        image.write_at(&[9; 100_000], 100_000, NONE).unwrap();
        bytes[100_000..200_000].fill(9);
        image.close().unwrap();
        judge(&path, &bytes, &dir, &what);
    }
}

fn judge(path: &Path, bytes: &[u8], dir: &Tmp, what: &str) {
    eprintln!("{what}");
    check_clean(path);
    check_same(path, "qcow2", bytes, &dir.join("model"));
}

#[test]
fn an_image_whose_size_is_no_multiple_of_512_is_exact_to_the_byte() {
    let dir = Tmp::in_memory("odd-size");
    for compat in ["0.10", "1.1"] {
        for size in [1, 511, 513, 1000, 65537, 1_000_001] {
            let path = dir.join(format!("{compat}-{size}"));
            create(&path, "qcow2", size, &[("compat", compat)]);
            assert_eq!(peek_u64(&path, 24), size);
            let image = open(&path, RW);
            assert_eq!(image.size().unwrap(), size);
            let data = Rng::new(size).bytes(size as usize);
            image.write_at(&data, 0, NONE).unwrap();
            let e = image.write_at(&[1], size, NONE).unwrap_err();
            assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::EINVAL), "{e}");
            image.close().unwrap();
            check_clean(&path);
            let image = open(&path, RO);
            assert_same(&read_all(&image), &data, 0, "odd size");
            let e = image.read_at(&mut [0; 2], size - 1).unwrap_err();
            assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::EINVAL), "{e}");
        }
    }
}
