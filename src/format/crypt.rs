//! Data that lies encrypted on another device: decrypted where the caller wants it, encrypted in
//! memory of this room's own on its way out, since the caller's bytes are not ours to change.
//!
//! Offsets and counts are whole sectors; [`Device`]'s emulation sees to that for whoever asks through
//! one whose driver says so in its caps.

use std::slice;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::block::*;
use crate::crypto::{SECTOR, SectorCipher};

/// Caps::align of whatever is encrypted by sectors.
pub const ALIGN: u32 = SECTOR as u32;
/// Bytes read at a time from what is in memory anyway: they are decrypted while the processor's cache
/// still has them.
const READ_STEP: usize = 128 << 10;
/// Bytes encrypted at a time, and buffers for that which are kept.
const ROOM: usize = 256 << 10;
const ROOMS: usize = 4;

/// Memory aligned as direct I/O wants it.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// A cipher with its key, and what encrypting needs of memory.
pub struct Crypt {
    cipher: SectorCipher,
    /// What is left in these is encrypted.
    rooms: Mutex<Vec<Box<[Page]>>>,
}

impl Crypt {
    /// The sectors that `cipher` encrypts.
    pub fn new(cipher: SectorCipher) -> Self {
        Self { cipher, rooms: Mutex::default() }
    }

    /// Fill `buf` from `host` of `dev`; the first of its sectors has the number `sector`.
    pub fn read(
        &self,
        dev: &Device,
        mut buf: Dst<'_>,
        mut host: u64,
        mut sector: u64,
    ) -> Result<()> {
        if !buf.is_aligned(1, SECTOR) {
            return Err(Error::Internal("a part of a sector to be decrypted".into()));
        }
        let step = if dev.caps().cached { READ_STEP } else { usize::MAX };
        while !buf.is_empty() {
            let (part, rest) = buf.split_at(step);
            dev.read(part, host)?;
            self.decrypt(part, sector);
            host += part.len() as u64;
            sector += (part.len() / SECTOR) as u64;
            buf = rest;
        }
        Ok(())
    }

    /// [`Crypt::read`] if nothing has to be waited for.
    pub fn read_now(&self, dev: &Device, buf: Dst<'_>, host: u64, sector: u64) -> Result<bool> {
        let done = dev.read_now(buf, host)?;
        if done {
            self.decrypt(buf, sector);
        }
        Ok(done)
    }

    fn decrypt(&self, buf: Dst<'_>, mut sector: u64) {
        for (p, n) in buf.pieces() {
            // SAFETY: a piece of a Dst is writable memory of n bytes, and it was just filled.
            self.cipher.decrypt(unsafe { slice::from_raw_parts_mut(p, n) }, sector);
            sector += (n / SECTOR) as u64;
        }
    }

    /// Write `buf` to `host` of `dev`, as [`Crypt::read`] reads it. FUA is kept.
    pub fn write(
        &self,
        dev: &Device,
        mut buf: Src<'_>,
        mut host: u64,
        mut sector: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        if !buf.len().is_multiple_of(SECTOR) {
            return Err(Error::Internal("a part of a sector to be encrypted".into()));
        }
        // One sync for all of it, not one for each part.
        let sync = flags.has(ReqFlags::FUA) && buf.len() > ROOM;
        let each = if sync { flags.without(ReqFlags::FUA) } else { flags };
        let spare = self.rooms.lock().pop();
        let mut room = spare.unwrap_or_else(|| vec![Page([0; 4096]); ROOM / 4096].into());
        // SAFETY: the pages are bytes without gaps between them, and borrowed for as long as this is.
        let bytes = unsafe { slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), ROOM) };
        while !buf.is_empty() {
            let (part, rest) = buf.split_at(ROOM);
            let n = part.copy_to(bytes);
            self.cipher.encrypt(&mut bytes[..n], sector);
            dev.write_slice(&bytes[..n], host, each)?;
            host += n as u64;
            sector += (n / SECTOR) as u64;
            buf = rest;
        }
        let mut rooms = self.rooms.lock();
        if rooms.len() < ROOMS {
            rooms.push(room);
        }
        drop(rooms);
        if sync { dev.flush() } else { Ok(()) }
    }
}

/// A device seen through a cipher, at the same offsets: sectors have the numbers that they have there.
pub struct Veiled {
    dev: Arc<Device>,
    crypt: Crypt,
}

impl Veiled {
    /// See `dev` through `crypt`.
    pub fn new(dev: Arc<Device>, crypt: Crypt) -> Self {
        Self { dev, crypt }
    }
}

impl Driver for Veiled {
    fn name(&self) -> &Name {
        self.dev.name()
    }
    fn kind(&self) -> &'static str {
        // What a format asks of the device below it is the same with and without encryption.
        self.dev.driver().kind()
    }
    fn caps(&self) -> Caps {
        caps(&self.dev)
    }
    fn size(&self) -> u64 {
        self.dev.size()
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.crypt.read(&self.dev, buf, offset, offset / SECTOR as u64)
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.crypt.read_now(&self.dev, buf, offset, offset / SECTOR as u64)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.crypt.write(&self.dev, buf, offset, offset / SECTOR as u64, flags)
    }
    fn flush(&self) -> Result<()> {
        self.dev.flush()
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.dev.cache(offset, count)
    }
    fn map(&self, offset: u64, count: u64) -> Result<Run<'_>> {
        Ok(Run { len: count, place: Place::Encrypted { dev: &self.dev, offset } })
    }
}

/// What can be done to `dev` through a cipher. Neither trim nor zero: what is not written reads as
/// noise, neither as before nor as zeroes.
pub fn caps(dev: &Device) -> Caps {
    let below = dev.caps();
    Caps {
        align: ALIGN,
        optimal_io: below.optimal_io.max(ALIGN),
        read_only: below.read_only,
        flush: below.flush,
        fua: dev.can_fua() != Can::Not,
        cache: below.cache,
        rotational: below.rotational,
        cached: below.cached,
        ..Caps::default()
    }
}
