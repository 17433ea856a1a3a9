//! An image with internal snapshots, and what is done to them.

use qblk::block::Progress;
use qblk::{Image, OneIov, OpenFlags, Options, ReqFlags, Result};

use super::{describe, open, split};

/// The input is a script, as for [`super::qcow2_ops`], and an image.
pub fn qcow2_snapshots(data: &[u8]) {
    let Some((how, script, bytes)) = split(data) else { return };
    let qcow2 = Options::new().with("format", "qcow2");
    // A snapshot by itself, first.
    let shown = qcow2.clone().with("snapshot", ["1", "2", "one", "two"][usize::from(how & 3)]);
    let hostile = if how & 4 != 0 { OpenFlags::UNTRUSTED } else { OpenFlags::default() };
    if let Some(image) = open(bytes, &shown, OpenFlags::NO_BACKING | hostile) {
        let n = image.size().unwrap_or(0).min(64 << 10);
        let _ = image.read_at(&mut vec![0; n as usize], 0);
        let _ = image.vm_state_read(OneIov::dst(&mut [0; 1000]).iov(), 0);
        let _ = image.close();
    }
    let flags = OpenFlags::NO_BACKING | OpenFlags::RDWR;
    let Some(image) = open(bytes, &qcow2, flags) else { return };
    describe(&image);
    for op in script.chunks_exact(super::OP_BYTES) {
        let _ = step(&image, op);
    }
    let _ = image.close();
}

/// One operation: command, which snapshot, three bytes of offset, a byte of length.
fn step(image: &Image, op: &[u8]) -> Result<()> {
    let &[command, which, o0, o1, o2, len] = op else { return Ok(()) };
    let name = ["one", "two", "1", "2", "3", "new"][usize::from(which) % 6].as_bytes();
    let offset = u64::from(u32::from_le_bytes([o0, o1, o2, 0]));
    let n = usize::from(len) * 64;
    let data = vec![which; n];
    let at = offset.min(image.size()?.saturating_sub(n as u64));
    match command % 12 {
        0 | 1 => image.snapshot_create(name, &Options::new()),
        2 | 3 => image.snapshot_apply(name),
        4 => image.snapshot_delete(name),
        5 => image.vm_state_write(OneIov::src(&data).iov(), offset),
        6 => image.vm_state_read(OneIov::dst(&mut data.clone()).iov(), offset),
        7 => image.zero(at, n as u64, ReqFlags::MAY_TRIM),
        8 => image.resize(offset, &Options::new(), true),
        9 => {
            let bits = (1u32 << (len % 7)).to_string();
            image.amend(&Options::new().with("refcount-bits", bits), Progress::NONE)
        }
        10 => {
            let compat = if len & 1 == 0 { "0.10" } else { "1.1" };
            image.amend(&Options::new().with("compat", compat), Progress::NONE)
        }
        _ => image.write_at(&data, at, ReqFlags::NONE),
    }
}
