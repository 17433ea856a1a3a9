//! `swab`: the bytes of each word in the other order.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "swab",
    about: "swap the bytes of each word",
    keys: &[("bits", "bits of a word: 16, 32 or 64 (16)")],
    writes_below: always,
    open,
};

/// Bytes that are swapped at a time on their way down; a multiple of every word.
const CHUNK: usize = 1 << 20;

struct Swab {
    next: Device,
    /// Bytes of a word.
    word: u32,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let word = match settings.one_of("bits", &["16", "32", "64"])? {
        Some(1) => 4,
        Some(2) => 8,
        _ => 2,
    };
    Ok(Stacked::boxed(Swab { next: source.open(write)?, word }))
}

impl Swab {
    /// Swap whole words; what is left over stays.
    fn swap(&self, bytes: &mut [u8]) {
        // By words of a known size, which the compiler does many of at a time.
        match self.word {
            2 => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|w| w.reverse()),
            4 => bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|w| w.reverse()),
            _ => bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|w| w.reverse()),
        }
    }

    fn swap_all(&self, buf: Dst<'_>) {
        // Pieces are whole words, as caps() asks for.
        for (base, len) in buf.pieces() {
            // SAFETY: a piece is memory of so many bytes that a read fills, and was just filled.
            self.swap(unsafe { std::slice::from_raw_parts_mut(base, len) });
        }
    }
}

impl Layer for Swab {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        // Parts of words are read, changed and written back by the emulation. Where bytes lie in a file
        // is not asked of what is below: there they are others.
        Caps { align: self.word, extents: true, ..self.next.caps().clone() }
    }
    /// Whole words only.
    fn size(&self) -> u64 {
        let size = self.next.size();
        size - size % u64::from(self.word)
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.next.read(buf, offset)?;
        self.swap_all(buf);
        Ok(())
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let done = self.next.read_now(buf, offset)?;
        if done {
            self.swap_all(buf);
        }
        Ok(done)
    }
    fn write(&self, buf: Src<'_>, mut offset: u64, flags: ReqFlags) -> Result<()> {
        let mut swapped = vec![0; buf.len().min(CHUNK)];
        let mut rest = buf;
        while !rest.is_empty() {
            let part;
            (part, rest) = rest.split_at(CHUNK);
            let bytes = &mut swapped[..part.len()];
            part.copy_to(bytes);
            self.swap(bytes);
            self.next.write_slice(bytes, offset, flags)?;
            offset += part.len() as u64;
        }
        Ok(())
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let mut some = [Extent::default(); 32];
        let mut list = ExtentList::new(&mut some).without_host();
        self.next.driver().extents(offset, count, &mut list)?;
        let n = list.len();
        some[..n].iter().for_each(|e| out.push(*e));
        Ok(())
    }
}
