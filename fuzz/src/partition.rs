//! A disk, and one of its partitions.
//!
//! What the layer shows is judged by a second reading of the tables, which is slow and has no bounds of its
//! own: it lists everything that any table on the disk could mean by the number.

use std::fs::File;
use std::os::unix::fs::FileExt;

use qblk::{Extent, Image, OpenFlags, Options, ReqFlags};

use super::memory_file;

/// Bytes that follow the input on the disk are zeroes, as many times these.
const TAIL: usize = 4096;
/// Bytes of a read or a write.
const BLOCK: u64 = 4096;

/// The number of the partition, how to open (below), how much longer than the input the disk is, and the
/// disk.
///
/// How: 1 and 2: sectors of 512 and 4096 bytes are asked for (3, 0: found out); 4: the sums of a GPT are
/// made right, which no fuzzer finds; 8: for writing.
pub fn partition_table(data: &[u8]) {
    let Some((&[number, how, tail], bytes)) = data.split_first_chunk() else { return };
    let mut disk = bytes.to_vec();
    disk.resize(bytes.len() + usize::from(tail) * TAIL, 0);
    let asked = [None, Some(512), Some(4096), None][usize::from(how & 3)];
    let sectors = asked.map_or(vec![512, 4096], |one| vec![one]);
    if how & 4 != 0 {
        for sector in &sectors {
            mend_sums(&mut disk, *sector);
        }
    }
    let Some(file) = memory_file(&disk[..bytes.len()]).map(File::from) else { return };
    let (Ok(()), Ok(fd)) = (file.set_len(disk.len() as u64), file.try_clone()) else { return };
    let mut layer = format!("partition;partition={number}");
    if let Some(sector) = asked {
        layer += &format!(";sector-size={sector}");
    }
    let options = Options::new().with("format", "raw").with("layers", layer);
    let write = how & 8 != 0;
    let flags = if write { OpenFlags::RDWR } else { OpenFlags::default() };
    let Ok(image) = Image::open_fd(fd.into(), &options, flags) else { return };
    super::describe(&image);
    let size = image.size().unwrap();
    let parts = said(&disk, usize::from(number), &sectors);
    let fits = |(start, len): &(u64, u64)| {
        *len == size && start.checked_add(size).is_some_and(|end| end <= disk.len() as u64)
    };
    let mut parts: Vec<(u64, u64)> = parts.into_iter().filter(fits).collect();
    assert!(!parts.is_empty(), "no table has a partition {number} of {size} bytes on the disk");

    let ends = [0, size / 2 / 512 * 512, size.saturating_sub(BLOCK)];
    for at in ends {
        let mut buf = vec![0xa5; (size - at).min(BLOCK) as usize];
        image.read_at(&mut buf, at).unwrap();
        parts.retain(|(start, _)| disk[(start + at) as usize..][..buf.len()] == buf);
        assert!(!parts.is_empty(), "what is read at {at} is of no partition {number}");
    }
    for (at, n) in [(size, 1), (size.saturating_sub(1), 2), (u64::MAX, 1), (u64::MAX - 511, 512)] {
        assert!(image.read_at(&mut vec![0; n], at).is_err(), "read {n} bytes at {at} of {size}");
        if write {
            assert!(image.write_at(&vec![1; n], at, ReqFlags::NONE).is_err());
            assert!(image.zero(at, n as u64, ReqFlags::NONE).is_err());
            assert!(image.trim(at, n as u64, ReqFlags::NONE).is_err());
        }
    }
    let mut found = [Extent::default(); 8];
    let n = image.extents(0, size, &mut found).unwrap();
    let mut at = 0;
    for e in &found[..n] {
        assert!(e.offset == at && e.length > 0, "extents do not follow one another");
        at += e.length;
        if e.flags & Extent::HOST != 0 {
            let there = |(start, _): &(u64, u64)| e.host_offset == start + e.offset;
            assert!(parts.iter().any(there), "{e:?} is of no partition {number}");
        }
    }
    assert!(at <= size, "extents are longer than the partition");
    if write && size > 0 {
        for at in ends {
            let n = (size - at).min(BLOCK);
            image.write_at(&vec![0x5a; n as usize], at, ReqFlags::NONE).unwrap();
            image.zero(at, n / 2, ReqFlags::NONE).unwrap();
        }
        image.trim(0, size, ReqFlags::NONE).unwrap();
    }
    image.close().unwrap();
    let mut now = vec![0; disk.len()];
    file.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(file.metadata().unwrap().len(), disk.len() as u64, "the disk's size has changed");
    let same = |(start, len): &(u64, u64)| {
        let (from, to) = (*start as usize, (start + len) as usize);
        now[..from] == disk[..from] && now[to..] == disk[to..] && (write || now == disk)
    };
    assert!(parts.iter().any(same), "bytes outside of partition {number} were written");
}

/// A little-endian number of the disk; 0 where the disk has none.
fn number(disk: &[u8], at: usize, len: usize) -> u64 {
    let some = at.checked_add(len).and_then(|end| disk.get(at..end)).unwrap_or_default();
    some.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Where headers of a GPT are: in sector 1 and in the last.
fn headers(disk: &[u8], sector: usize) -> Vec<usize> {
    let last = (disk.len() / sector).saturating_sub(1) * sector;
    let is_one =
        |at: &usize| disk.get(*at..*at + 92).is_some_and(|header| header.starts_with(b"EFI PART"));
    [sector, last].into_iter().filter(is_one).collect()
}

fn mend_sums(disk: &mut [u8], sector: usize) {
    for at in headers(disk, sector) {
        let (count, size) = (number(disk, at + 80, 4) as usize, number(disk, at + 84, 4) as usize);
        let from = usize::try_from(number(disk, at + 72, 8)).unwrap_or(usize::MAX);
        let entries = from.checked_mul(sector).and_then(|from| disk.get(from..));
        if let Some(entries) = entries.and_then(|all| all.get(..count * size)) {
            let sum = libdeflater::crc32(entries);
            disk[at + 88..at + 92].copy_from_slice(&sum.to_le_bytes());
        }
        let length = number(disk, at + 12, 4) as usize;
        if let Some(mut summed) = disk.get(at..at.saturating_add(length)).map(<[u8]>::to_vec)
            && length >= 92
        {
            summed[16..20].fill(0);
            disk[at + 16..at + 20].copy_from_slice(&libdeflater::crc32(&summed).to_le_bytes());
        }
    }
}

/// Byte and length of everything that could be the partition `wanted`.
fn said(disk: &[u8], wanted: usize, sectors: &[usize]) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    let entry = |at: usize, i: usize| {
        let at = at + 446 + 16 * i;
        (number(disk, at + 8, 4), number(disk, at + 12, 4), disk.get(at + 4).copied().unwrap_or(0))
    };
    let protective = (0..4).any(|i| entry(0, i).2 == 0xee);
    for sector in sectors.iter().copied() {
        let mut add = |first: u64, count: u64| {
            let start = first.checked_mul(sector as u64);
            all.extend(start.zip(count.checked_mul(sector as u64)));
        };
        if protective {
            for at in headers(disk, sector) {
                let size = number(disk, at + 84, 4);
                let entries = number(disk, at + 72, 8).checked_mul(sector as u64);
                let entry = size.checked_mul(wanted as u64 - 1).zip(entries);
                let Some(entry) = entry.and_then(|(a, b)| a.checked_add(b)) else { continue };
                let Ok(entry) = usize::try_from(entry) else { continue };
                let Some(words) = disk.get(entry..).filter(|e| e.len() >= 128) else { continue };
                let (first, last) = (number(words, 32, 8), number(words, 40, 8));
                if words[..16] != [0; 16] && first <= last && last < u64::MAX {
                    add(first, last - first + 1);
                }
            }
        } else if wanted <= 4 {
            let (first, count, kind) = entry(0, wanted - 1);
            if !matches!(kind, 0 | 0x05 | 0x0f | 0x85) {
                add(first, count);
            }
        } else {
            // In any boot record of an extended partition, and within that.
            for (base, len, kind) in (0..4).map(|i| entry(0, i)) {
                if !matches!(kind, 0x05 | 0x0f | 0x85) {
                    continue;
                }
                for at in base..(base + len).min((disk.len() / sector) as u64) {
                    let byte = at as usize * sector;
                    if number(disk, byte + 510, 2) != 0xaa55 {
                        continue;
                    }
                    for (first, count, kind) in [entry(byte, 0), entry(byte, 1)] {
                        if kind != 0 && first > 0 && at + first + count <= base + len {
                            add(at + first, count);
                        }
                    }
                }
            }
        }
        // Without a GPT nothing but the first size is tried.
        if !protective {
            break;
        }
    }
    all
}
