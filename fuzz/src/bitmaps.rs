//! Bitmap directories, tables and data: an image, and what is done to its bitmaps.

use qblk::block::BitmapChange;
use qblk::{Extent, Image, OpenFlags, Options, ReqFlags, Result};

use super::{MAX_CALL, OP_BYTES, describe, open, split};

/// An image with bitmaps and what is done to it.
pub fn qcow2_bitmaps(data: &[u8]) {
    let Some((how, script, bytes)) = split(data) else { return };
    let options = Options::new().with("format", "qcow2");
    let mut flags = OpenFlags::NO_BACKING;
    flags = if how & 1 == 0 { flags | OpenFlags::RDWR } else { flags };
    flags = if how & 2 != 0 { flags | OpenFlags::UNTRUSTED } else { flags };
    let Some(image) = open(bytes, &options, flags) else { return };
    for op in script.chunks_exact(OP_BYTES) {
        let _ = step(&image, op);
    }
    describe(&image);
    let _ = image.bitmaps();
    let _ = image.close();
}

/// One operation: command, a bitmap, two bytes of offset in sectors, a byte of length, another bitmap.
fn step(image: &Image, op: &[u8]) -> Result<()> {
    let &[command, which, o0, o1, len, other] = op else { return Ok(()) };
    let (size, all) = (image.size()?, image.bitmaps()?);
    let name = |which: u8| match all.get(usize::from(which) % (all.len() + 1)) {
        Some(b) => b.name.clone(),
        None => b"new".to_vec(),
    };
    let (name, other) = (name(which), name(other));
    let offset = (u64::from(u16::from_le_bytes([o0, o1])) << 9).min(size);
    let count = (u64::from(len) << 9).min(size - offset);
    match command & 15 {
        0 => image.change_bitmap(&BitmapChange::Remove(&name)),
        1 => image.change_bitmap(&BitmapChange::Enable(&name)),
        2 => image.change_bitmap(&BitmapChange::Disable(&name)),
        3 => image.change_bitmap(&BitmapChange::Clear(&name)),
        4 => image.change_bitmap(&BitmapChange::Merge { target: &name, source: &other }),
        5 => {
            let granularity = 1u64.checked_shl(u32::from(len)).unwrap_or(0);
            let disabled = command & 16 != 0;
            image.change_bitmap(&BitmapChange::Add { name: &name, granularity, disabled })
        }
        6 => image.zero(offset, count, ReqFlags::MAY_TRIM),
        7 => image.trim(offset, count, ReqFlags::NONE),
        8 => image.resize((size + offset).min(1 << 41), &Options::new(), false),
        9 => image.resize(offset, &Options::new(), true),
        10 => image.flush(),
        11 => image.reopen(None, if len & 1 == 0 { OpenFlags::RDWR } else { OpenFlags(0) }),
        12 | 13 => {
            let only = command & 1 == 0;
            image.dirty_extents(
                &name,
                only,
                offset,
                size - offset,
                &mut [Extent::default(); 16],
            )?;
            Ok(())
        }
        _ => {
            let n = count.min(MAX_CALL) as usize;
            image.write_at(&vec![command; n], offset, ReqFlags::NONE)
        }
    }
}
