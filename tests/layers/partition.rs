//! `partition`: on tables that sfdisk and sgdisk make, and on tables that nobody should believe.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use qblk::block::{Device, ErrorKind, Extent, ExtentList};
use qblk::{Image, OneIov};

use crate::common::*;
use crate::model;
use crate::recorder::*;

/// Partition a disk by a script of sfdisk's.
fn sfdisk(disk: &Path, args: &[&str], script: &str) {
    let mut command = Command::new("sfdisk");
    command.args(["--quiet", "--no-reread", "--no-tell-kernel"]).args(args).arg(disk);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            panic!("install fdisk (apt-get install fdisk)")
        }
        Err(e) => panic!("sfdisk: {e}"),
    };
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "sfdisk: {}", String::from_utf8_lossy(&out.stderr));
}

fn sgdisk(disk: &Path, args: &[&str]) -> String {
    let mut all: Vec<&dyn AsRef<OsStr>> = args.iter().map(|a| a as &dyn AsRef<OsStr>).collect();
    all.push(&disk);
    run_ok("sgdisk", &all)
}

/// First sector and number of sectors of each partition, as sfdisk sees them.
fn dump(disk: &Path) -> BTreeMap<u32, (u64, u64)> {
    let text = run_ok("sfdisk", &[&"--dump", &disk]);
    let mut all = BTreeMap::new();
    for line in text.lines().filter(|l| l.contains("start=")) {
        let (name, rest) = line.split_once(" : ").unwrap();
        let number = name.strip_prefix(disk.to_str().unwrap()).unwrap().trim().parse().unwrap();
        let value = |key: &str| {
            let from = rest.split_once(key).unwrap().1;
            from.split(',').next().unwrap().trim().parse().unwrap()
        };
        all.insert(number, (value("start="), value("size=")));
    }
    assert!(!all.is_empty(), "{text}");
    all
}

fn empty_disk(tmp: &Tmp, size: u64) -> std::path::PathBuf {
    let path = tmp.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn opened(disk: &Path, settings: &str, flags: qblk::OpenFlags) -> Result<Image, qblk::Error> {
    let layers = format!("partition;{settings}");
    Image::open(disk.as_os_str(), &options(&[("format", "raw"), ("layers", &layers)]), flags)
}

/// Each partition is where sfdisk says.
fn same_as_sfdisk(disk: &Path, not: &[u32]) {
    for (number, (start, count)) in dump(disk) {
        if not.contains(&number) {
            continue;
        }
        let mark = format!("partition {number}").into_bytes();
        poke(disk, start * 512, &mark);
        poke(disk, (start + count) * 512 - 16, &mark);
        let image = opened(disk, &format!("partition={number}"), RO).unwrap();
        let size = image.size().unwrap();
        assert_eq!(size, count * 512, "partition {number}");
        assert_eq!(read_range(&image, 0, mark.len() as u64), mark);
        assert_eq!(read_range(&image, size - 16, mark.len() as u64), mark);
    }
}

#[test]
fn primary_and_logical_partitions_of_sfdisk() {
    let tmp = Tmp::new("partition-mbr");
    let disk = empty_disk(&tmp, 64 << 20);
    let script = "label: dos\n\
                  start=2048, size=4096, type=83\n\
                  start=8192, size=2048, type=c\n\
                  start=16384, size=100000, type=f\n\
                  start=120000, size=1, type=82\n\
                  start=18432, size=2048, type=83\n\
                  start=22528, size=10001, type=83\n\
                  start=40960, size=4096, type=83\n\
                  start=51200, size=64000, type=83\n";
    sfdisk(&disk, &[], script);
    assert_eq!(dump(&disk).len(), 8);
    same_as_sfdisk(&disk, &[3]);
    // What is left of the chain when one is deleted from its middle has new numbers.
    sfdisk(&disk, &["--delete"], "");
    sfdisk(&disk, &[], &script.replace("start=22528, size=10001, type=83\n", ""));
    same_as_sfdisk(&disk, &[3]);
    let image = opened(&disk, "partition=7", RO).unwrap();
    assert_eq!(image.property("partition.table").unwrap().unwrap(), b"mbr");
    assert_eq!(image.property("partition.type").unwrap().unwrap(), b"0x83");
    let e = opened(&disk, "partition=3", RO).err().unwrap();
    assert!(e.to_string().contains("an extended one"), "{e}");
    let e = opened(&disk, "partition=9", RO).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Format);
    assert!(
        e.to_string().contains("no partition 9: its table (MBR) has 1, 2, 3, 4, 5, 6, 7"),
        "{e}"
    );
    // A disk that was cut off behind the table.
    std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(9000 * 512).unwrap();
    opened(&disk, "partition=1", RO).unwrap();
    let e = opened(&disk, "partition=2", RO).err().unwrap().to_string();
    assert!(e.contains("partition 2 is not on the disk") && e.contains("2048 sectors"), "{e}");
    let e = opened(&disk, "partition=5", RO).err().unwrap().to_string();
    assert!(e.contains("leads to sector 16384"), "{e}");
}

#[test]
fn partitions_of_sgdisk_and_the_backup_of_their_table() {
    let tmp = Tmp::new("partition-gpt");
    let disk = empty_disk(&tmp, 32 << 20);
    sgdisk(
        &disk,
        &["-n", "1:2048:+1M", "-c", "1:tête", "-n", "3:8192:+3M", "-n", "128:40960:50961"],
    );
    same_as_sfdisk(&disk, &[]);
    assert_eq!(dump(&disk).into_keys().collect::<Vec<_>>(), [1, 3, 128]);
    let told = sgdisk(&disk, &["-i", "1"]).to_lowercase();
    let image = opened(&disk, "partition=1", RO).unwrap();
    let property = |key| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
    assert_eq!(property("partition.name"), "tête");
    assert_eq!(property("partition.table"), "gpt");
    for key in ["partition.uuid", "partition.type"] {
        let value = property(key);
        assert!(value.len() == 36 && told.contains(&value), "{key} {value}: {told}");
    }
    let e = opened(&disk, "partition=2", RO).err().unwrap().to_string();
    assert!(e.contains("(GPT) has 1, 3, 128"), "{e}");
    let e = opened(&disk, "partition=129", RO).err().unwrap().to_string();
    assert!(e.contains("no partition 129"), "{e}");
    // The first header, or one of the first entries, is destroyed.
    for at in [512 + 60, 1024 + 3] {
        let before = peek(&disk, at, 1)[0];
        poke(&disk, at, &[before ^ 1]);
        same_as_sfdisk(&disk, &[]);
        let size = opened(&disk, "partition=128", RO).unwrap().size().unwrap();
        assert_eq!(size, 10002 * 512);
        poke(&disk, at, &[before]);
    }
    // Both.
    poke(&disk, 512 + 60, b"x");
    poke(&disk, (32 << 20) - 512, b"x");
    let e = opened(&disk, "partition=1", RO).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Format);
    let e = e.to_string();
    assert!(e.contains("none is whole") && e.contains("CRC-32"), "{e}");
    assert!(e.contains("backup GPT header in sector 65535: found 'xFI PART'"), "{e}");
}

#[test]
fn a_partition_is_a_device_and_its_neighbours_are_out_of_reach() {
    let tmp = Tmp::new("partition-model");
    let disk = empty_disk(&tmp, 8 << 20);
    sgdisk(&disk, &["-a", "1", "-n", "1:100:2222", "-n", "2:2223:9999", "-n", "3:10000:0"]);
    let around = |bytes: &[u8]| [&bytes[..2223 * 512], &bytes[10000 * 512..]].concat();
    let before = std::fs::read(&disk).unwrap();
    let image = opened(&disk, "partition=2", RW).unwrap();
    let mut model = vec![0; 7777 * 512];
    model::run(&image, &mut model, 1500, &mut Rng::new(seed("partition")), Default::default());
    image.close().unwrap();
    let after = std::fs::read(&disk).unwrap();
    assert!(after[2223 * 512..10000 * 512] == model);
    assert!(around(&before) == around(&after));
}

// Tables by hand.

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(
            crc ^ u32::from(*b),
            |c, _| if c & 1 != 0 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 },
        )
    })
}

fn put(bytes: &mut [u8], at: usize, value: u64, len: usize) {
    bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

fn mbr_entry(disk: &mut [u8], sector: usize, index: usize, kind: u8, start: u32, count: u32) {
    let at = sector * 512 + 446 + 16 * index;
    disk[at + 4] = kind;
    put(disk, at + 8, start.into(), 4);
    put(disk, at + 12, count.into(), 4);
    disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

/// Make the sums of the first GPT header right.
fn sum(disk: &mut [u8], sector: usize) {
    let n = |disk: &[u8], at: usize, len| {
        let mut b = [0; 8];
        b[..len].copy_from_slice(&disk[at..at + len]);
        u64::from_le_bytes(b) as usize
    };
    let h = sector;
    let (from, bytes) =
        (n(disk, h + 72, 8).wrapping_mul(sector), n(disk, h + 80, 4) * n(disk, h + 84, 4));
    if let Some(entries) = from.checked_add(bytes).and_then(|to| disk.get(from..to)) {
        let crc = crc32(entries);
        put(disk, h + 88, crc.into(), 4);
    }
    let length = n(disk, h + 12, 4).min(sector);
    put(disk, h + 16, 0, 4);
    let crc = crc32(&disk[h..h + length]);
    put(disk, h + 16, crc.into(), 4);
}

/// 400 sectors with partition 2 in sectors 50 to 59.
fn gpt(sector: usize) -> Vec<u8> {
    let mut disk = vec![0; 400 * sector];
    mbr_entry(&mut disk, 0, 0, 0xee, 1, 399);
    let h = sector;
    disk[h..h + 8].copy_from_slice(b"EFI PART");
    for (at, value, len) in
        [(8, 0x10000, 4), (12, 92, 4), (24, 1, 8), (32, 399, 8), (40, 40, 8), (48, 360, 8)]
    {
        put(&mut disk, h + at, value, len);
    }
    put(&mut disk, h + 72, 2, 8);
    put(&mut disk, h + 80, 8, 4);
    put(&mut disk, h + 84, 128, 4);
    let e = 2 * sector + 128;
    disk[e..e + 32].fill(0x11);
    put(&mut disk, e + 32, 50, 8);
    put(&mut disk, e + 40, 59, 8);
    sum(&mut disk, sector);
    disk
}

/// The layer on a disk of these bytes.
fn part(bytes: &[u8], settings: &[(&str, &str)]) -> Result<(Arc<Recorder>, Device), String> {
    let r = Recorder::new(bytes.len(), able());
    r.set_bytes(bytes);
    let dev = on(&r, "partition", settings, true).map_err(|e| e.to_string())?;
    Ok((r, dev))
}

#[test]
fn what_is_called_below() {
    let (r, dev) = part(&gpt(512), &[("partition", "2")]).unwrap();
    let table =
        ["open 1 rw", "1 read 0+512", "1 read 512+512", "1 read 1024+1024", "1 read 1152+128"];
    assert_eq!(r.log(), table);
    assert_eq!(dev.size(), 5120);
    dev.write_slice(&[1; 10], 5110, qblk::ReqFlags::FUA).unwrap();
    dev.zero(0, 5120, NONE).unwrap();
    dev.trim(1, 2, NONE).unwrap();
    dev.cache(0, 1).unwrap();
    dev.flush().unwrap();
    dev.driver().write(OneIov::src(&[1; 2]).iov(), 5119, NONE).unwrap_err();
    let mut some = [Extent::default(); 2];
    let mut list = ExtentList::new(&mut some);
    dev.driver().extents(0, 5120, &mut list).unwrap();
    assert_eq!((some[0].offset, some[0].length), (0, 5120));
    let expected = [
        "1 write 30710+10 FUA",
        "1 zero 25600+5120",
        "1 trim 25601+2",
        "1 cache 25600+1",
        "1 flush",
        "1 extents 25600+5120",
    ];
    assert_eq!(r.log(), expected);
    let r = Recorder::new(4096, able());
    r.fail("read 0", libc::EIO, 1);
    let e = on(&r, "partition", &[("partition", "1")], false).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EIO));
    assert_eq!(r.log(), ["open 1 ro", "1 read 0+512", "close 1"]);
    // Failing to read the first table is no reason to believe the other.
    let r = Recorder::new(400 * 512, able());
    r.set_bytes(&gpt(512));
    r.fail("read 1024", libc::EIO, 1);
    let e = on(&r, "partition", &[("partition", "2")], false).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EIO));
}

#[test]
fn sectors_of_4096_bytes() {
    let disk = gpt(4096);
    let (_, dev) = part(&disk, &[("partition", "2")]).unwrap();
    assert_eq!(dev.size(), 40960);
    part(&disk, &[("partition", "2"), ("sector-size", "4096")]).unwrap();
    let e = part(&disk, &[("partition", "2"), ("sector-size", "512")]).err().unwrap();
    assert!(e.contains("with sectors of 512: GPT header in sector 1: found"), "{e}");
    let mut disk = vec![0; 64 << 12];
    mbr_entry(&mut disk, 0, 0, 0x83, 8, 16);
    let size = |settings: &[_]| part(&disk, settings).unwrap().1.size();
    assert_eq!(size(&[("partition", "1")]), 16 * 512);
    assert_eq!(size(&[("partition", "1"), ("sector-size", "4096")]), 16 * 4096);
}

#[test]
fn tables_that_lie_are_refused_with_what_was_found() {
    let refused = |disk: &[u8], number: &str, what: &str| {
        let e = part(disk, &[("partition", number)]).err().unwrap_or_else(|| panic!("{what}"));
        assert!(e.contains(what), "expected {what:?} in: {e}");
    };
    refused(&[0; 100], "1", "too small");
    refused(&[0; 4096], "1", "found 0000 at byte 510, expected 55aa");
    // A FAT file system without partitions.
    let mut fat = vec![0; 4096];
    fat[446..510].fill(0xeb);
    fat[510..512].copy_from_slice(&[0x55, 0xaa]);
    refused(&fat, "1", "a boot flag of 0xeb");
    let mut mbr = vec![0; 1 << 20];
    mbr_entry(&mut mbr, 0, 0, 0x83, u32::MAX, u32::MAX);
    mbr_entry(&mut mbr, 0, 1, 0x83, 1, 2048);
    mbr_entry(&mut mbr, 0, 2, 0x83, 1, 0);
    refused(&mbr, "1", "not on the disk: 4294967295 sectors");
    refused(&mbr, "2", "the disk has 1048576 bytes");
    refused(&mbr, "3", "no partition 3: its table (MBR) has 1, 2");
    refused(&mbr, "4294967295", "no partition 4294967295");
    // A chain of logical partitions that comes back.
    let mut ring = vec![0; 1 << 20];
    mbr_entry(&mut ring, 0, 0, 0x0f, 100, 1000);
    mbr_entry(&mut ring, 100, 0, 0x83, 1, 5);
    mbr_entry(&mut ring, 100, 1, 0x05, 200, 10);
    mbr_entry(&mut ring, 300, 0, 0x83, 1, 5);
    mbr_entry(&mut ring, 300, 1, 0x05, 0, 10);
    refused(&ring, "7", "comes to sector 100 a second time");
    part(&ring, &[("partition", "6")]).unwrap();
    mbr_entry(&mut ring, 300, 1, 0x05, 1000, 10);
    refused(&ring, "7", "a link to sector 1100, expected it before 1100");
    mbr_entry(&mut ring, 300, 0, 0x83, 700, 101);
    refused(&ring, "6", "leaves the extended one: found sectors 1000 to 1101");
    mbr_entry(&mut ring, 300, 0, 0x83, 0, 101);
    refused(&ring, "6", "expected them behind 300");
    ring[300 * 512 + 510] = 0;
    refused(&ring, "6", "in sector 300: found 00aa at byte 510");
    // One without an end.
    let mut endless = vec![0; 2048 * 512];
    mbr_entry(&mut endless, 0, 0, 0x05, 1, 2047);
    for at in 1..2047 {
        mbr_entry(&mut endless, at, 1, 0x05, at as u32, 1);
    }
    refused(&endless, "5", "more than 1024 logical partitions");
    // GPT: each field, with the sums right.
    let changed = |at: usize, value: u64, len: usize| {
        let mut disk = gpt(512);
        put(&mut disk, at, value, len);
        sum(&mut disk, 512);
        disk
    };
    let header = |at: usize, value: u64, len, what: &str| {
        refused(&changed(512 + at, value, len), "2", what);
    };
    header(0, 0, 1, "found '\\u{0}FI PART', expected 'EFI PART'");
    header(12, 91, 4, "its length: found 91 bytes, expected 92 to 512");
    header(12, 513, 4, "its length: found 513 bytes");
    header(24, 2, 8, "the sector that it says it is in: found 0x2, expected 0x1");
    header(80, 0, 4, "found 0 entries of 128 bytes");
    header(80, u32::MAX.into(), 4, "found 4294967295 entries");
    header(84, 64, 4, "of 64 bytes");
    header(84, 192, 4, "of 192 bytes, expected a power of two");
    header(84, 1 << 31, 4, "entries of 2147483648 bytes");
    header(72, u64::MAX, 8, "found its entries in 2 sectors from 18446744073709551615 on");
    header(72, 399, 8, "from 399 on");
    header(
        72,
        50,
        8,
        "from 50 on, expected them on the disk outside of the usable sectors 40 to 360",
    );
    header(72, 1, 8, "from 1 on");
    let entry = |at: usize, value: u64, what: &str| {
        refused(&changed(1024 + 128 + at, value, 8), "2", what);
    };
    entry(32, 60, "found sectors 60 to 59");
    entry(32, 39, "found sectors 39 to 59, expected some among the usable ones, 40 to 360");
    entry(40, 361, "found sectors 50 to 361");
    entry(40, u64::MAX, "found sectors 50 to 18446744073709551615");
    // Usable is what is said to be, the disk is what it is.
    let mut beyond = changed(512 + 48, u64::MAX, 8);
    put(&mut beyond, 1024 + 128 + 32, 0, 8);
    put(&mut beyond, 1024 + 128 + 40, u64::MAX, 8);
    put(&mut beyond, 512 + 40, 0, 8);
    sum(&mut beyond, 512);
    refused(&beyond, "2", "usable");
    let mut unsummed = gpt(512);
    unsummed[512 + 20] = 1;
    refused(&unsummed, "2", "its sum (CRC-32): found");
    let mut unsummed = gpt(512);
    unsummed[1024] = 1;
    refused(&unsummed, "2", "the sum of its entries (CRC-32): found");
    for (settings, what) in [
        (&[][..], "needs the setting 'partition'"),
        (&[("partition", "0")], "a number from 1"),
        (&[("partition", "1"), ("sector-size", "1024")], "expected 512, 4096"),
    ] {
        let e = part(&gpt(512), settings).err().unwrap();
        assert!(e.contains(what), "{e}");
    }
}

#[test]
fn damaged_tables_lead_nowhere_else() {
    let mut rng = Rng::new(seed("partition-damaged"));
    let mut mbr = vec![0; 400 * 512];
    mbr_entry(&mut mbr, 0, 0, 0x83, 10, 20);
    mbr_entry(&mut mbr, 0, 1, 0x05, 100, 200);
    mbr_entry(&mut mbr, 100, 0, 0x83, 1, 50);
    mbr_entry(&mut mbr, 100, 1, 0x05, 60, 60);
    mbr_entry(&mut mbr, 160, 0, 0x83, 1, 50);
    let mut done = [0; 2];
    for round in 0..20_000 {
        let of_gpt = round % 2 == 0;
        let mut disk = if of_gpt { gpt(512) } else { mbr.clone() };
        for _ in 0..rng.range(1, 4) {
            let sector = if of_gpt { rng.range(0, 4) } else { rng.pick(&[0, 100, 160]) };
            let at = sector * 512 + if of_gpt { rng.below(512) } else { rng.range(446, 512) };
            disk[at as usize] = rng.pick(&[0, 1, 0x7f, 0x80, 0xff, rng.clone().next() as u8]);
        }
        if of_gpt {
            sum(&mut disk, 512);
        }
        let number = rng.pick(&["1", "2", "5", "6"]);
        let result = part(&disk, &[("partition", number)]);
        if let Ok((_, dev)) = &result {
            assert!(dev.size() <= disk.len() as u64);
            let mut last = [0];
            if dev.size() > 0 {
                dev.read_slice(&mut last, dev.size() - 1).unwrap();
            }
        }
        done[usize::from(result.is_ok())] += 1;
    }
    assert!(done.iter().all(|n| *n > 1000), "refused and opened: {done:?}");
}
