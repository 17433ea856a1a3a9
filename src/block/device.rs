//! A driver behind its emulation: the one place that does what a driver cannot do by itself.
//!
//! FUA becomes write then flush, zero becomes writing zeroes, what is not aligned is bounced (reads)
//! or read, changed and written back (writes), and requests are cut to the driver's largest. Every
//! kind of driver, files, formats and peers alike, gets the same emulation from here.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::*};

use libc::iovec;

use super::range_lock::RangeGuard;
use super::*;

/// Zeroes in one emulated write, bytes.
const ZERO_CHUNK: u64 = 4 << 20;
/// Bytes bounced at a time.
const BOUNCE_CHUNK: u64 = 1 << 20;

/// A block device: a driver, and the emulation of what it lacks.
pub struct Device {
    driver: Box<dyn Driver>,
    caps: Caps,
    /// Whether any request can be passed on as it is.
    plain: bool,
    /// Whether any that is not too long can.
    only_length: bool,
    blocks: RangeLock,
    /// What a flush that failed is the end of, if it is: see [`Device::flush_fails_for_good`].
    for_good: AtomicBool,
    /// The error number of that flush; 0 = none failed.
    failed: AtomicI32,
}

/// Memory for bouncing, aligned as direct I/O wants it.
struct Aligned {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize, align: usize) -> Result<Self> {
        let layout = Layout::from_size_align(len.max(1), align.max(1))
            .map_err(|_| Error::invalid(format!("cannot align {len} bytes to {align}")))?;
        // SAFETY: the layout's size is not 0.
        let ptr = unsafe { alloc(layout) };
        Ok(Self { ptr: NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout)), layout })
    }

    fn iovec(&self, len: usize) -> [iovec; 1] {
        [iovec { iov_base: self.ptr.as_ptr().cast(), iov_len: len.min(self.layout.size()) }]
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the memory is ours alone; it was written by a full read before it is looked at.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

impl Device {
    /// Put a driver behind the emulation.
    pub fn new(driver: Box<dyn Driver>) -> Self {
        let caps = driver.caps();
        let only_length = caps.align <= 1 && caps.mem_align <= 1;
        let plain = only_length && caps.max_transfer == 0;
        Self {
            driver,
            caps,
            plain,
            only_length,
            blocks: RangeLock::default(),
            for_good: false.into(),
            failed: 0.into(),
        }
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// What the driver can do by itself.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// What the bytes are kept in, for people.
    pub fn name(&self) -> &Name {
        self.driver.name()
    }

    /// Size in bytes, now.
    #[inline]
    pub fn size(&self) -> u64 {
        self.driver.size()
    }

    /// How well zeroing works without writing.
    pub fn can_zero(&self) -> Can {
        match () {
            _ if self.caps.read_only => Can::Not,
            _ if self.caps.zero => Can::Native,
            _ if self.caps.zero_by_write => Can::Emulate,
            _ => Can::Not,
        }
    }

    /// How well FUA works.
    pub fn can_fua(&self) -> Can {
        match () {
            _ if self.caps.read_only => Can::Not,
            _ if self.caps.fua => Can::Native,
            _ if self.caps.flush && self.caps.fua_by_flush => Can::Emulate,
            _ => Can::Not,
        }
    }

    /// How well zeroing without writing, or failing at once, works.
    pub fn can_fast_zero(&self) -> Can {
        match (self.caps.read_only, self.caps.zero && self.caps.fast_zero) {
            (true, _) => Can::Not,
            (_, true) => Can::Native,
            // Failing at once is always possible.
            _ => Can::Emulate,
        }
    }

    /// How well bringing near works.
    pub fn can_cache(&self) -> Can {
        match (self.caps.cache, self.caps.cache_by_read) {
            (true, _) => Can::Native,
            (_, true) => Can::Emulate,
            _ => Can::Not,
        }
    }

    /// Read as [`Driver::read`] does, any offset, length and memory.
    #[inline]
    pub fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        if self.plain || self.fits(buf.len()) {
            self.driver.read(buf, offset)
        } else {
            self.read_emulated(buf, offset)
        }
    }

    /// Read if nothing has to be waited for, as [`Driver::read_now`] does; what would need emulation
    /// is not done so.
    #[inline]
    pub fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let align = u64::from(self.caps.align.max(1));
        let fits = || {
            self.caps.max_transfer == 0
                && offset.is_multiple_of(align)
                && buf.is_aligned(self.mem_align(), align as usize)
        };
        if self.plain || fits() { self.driver.read_now(buf, offset) } else { Ok(false) }
    }

    /// Read into one slice.
    pub fn read_slice(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(OneIov::dst(buf).iov(), offset)
    }

    /// Write as [`Driver::write`] does, any offset, length and memory, FUA kept.
    #[inline]
    pub fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        if self.caps.read_only {
            return Err(Error::ReadOnly(self.name().clone()));
        }
        let flush_after = flags.has(ReqFlags::FUA) && !self.caps.fua;
        if flush_after && self.can_fua() == Can::Not {
            return Err(Error::NotSupported("FUA"));
        }
        if !buf.is_empty() {
            let pass = if self.caps.fua { flags } else { ReqFlags::NONE };
            if self.plain || self.fits(buf.len()) {
                self.driver.write(buf, offset, pass)?;
            } else {
                self.write_emulated(buf, offset, pass)?;
            }
        }
        if flush_after { self.flush() } else { Ok(()) }
    }

    /// Whether a write of `count` bytes, without FUA, waits for nobody as a rule.
    pub fn writes_at_once(&self, count: usize) -> bool {
        self.caps.cached || self.driver.writes_at_once(count)
    }

    /// Write one slice.
    pub fn write_slice(&self, buf: &[u8], offset: u64, flags: ReqFlags) -> Result<()> {
        self.write(OneIov::src(buf).iov(), offset, flags)
    }

    /// Make everything that was written survive a power cut.
    pub fn flush(&self) -> Result<()> {
        self.flush_once(|driver| driver.flush())
    }

    /// No flush succeeds any more once one has failed, whoever asked for it: what it was to keep may be
    /// lost, and a later one would vouch for that.
    pub fn flush_fails_for_good(&self) {
        self.for_good.store(true, Relaxed);
    }

    fn flush_once(&self, flush: impl FnOnce(&dyn Driver) -> Result<()>) -> Result<()> {
        if !self.caps.flush {
            return Ok(());
        }
        match self.failed.load(Acquire) {
            0 => {}
            errno => return Err(Error::Failed { file: self.name().clone(), errno }),
        }
        let done = flush(self.driver());
        if let (Err(e), true) = (&done, self.for_good.load(Relaxed)) {
            // What was said before stays.
            let _ = self.failed.compare_exchange(0, e.errno(), AcqRel, Acquire);
        }
        done
    }

    /// The same for a handle that is closed, as [`Driver::flush_to_close`] does.
    pub fn flush_to_close(&self) -> Result<()> {
        self.flush_once(|driver| driver.flush_to_close())
    }

    /// Make a range read as zeroes: by the driver where it can, by writing them where it must.
    pub fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        if self.caps.read_only {
            return Err(Error::ReadOnly(self.name().clone()));
        }
        if count == 0 {
            return Ok(());
        }
        let end = offset.checked_add(count).ok_or_else(|| Error::invalid("range overflows"))?;
        let fua = flags.has(ReqFlags::FUA);
        if fua && self.can_fua() == Can::Not {
            return Err(Error::NotSupported("FUA"));
        }
        let fast = flags.has(ReqFlags::FAST_ZERO);
        let align = u64::from(self.caps.align.max(1));
        let (from, to) = (offset.next_multiple_of(align), end - end % align);
        if fast && (from, to) != (offset, end) {
            return Err(Error::NotSupported("fast zeroing of parts of blocks"));
        }
        // What neither carries FUA nor can be flushed behind is left alone: written zeroes can carry it.
        let by_driver = self.caps.zero
            && (!fast || self.caps.fast_zero)
            && from < to
            && (!fua || self.caps.zero_fua || self.flush_does());
        if fast && !by_driver {
            return Err(Error::NotSupported("fast zeroing here"));
        }
        if !by_driver && !self.caps.zero_by_write {
            return Err(Error::NotSupported("zeroing"));
        }
        // Either all pieces carry FUA, or none and one flush follows them all.
        let carried = self.caps.fua && (!by_driver || self.caps.zero_fua);
        let pass = if carried { flags } else { flags.without(ReqFlags::FUA) };
        let write = ReqFlags(pass.0 & ReqFlags::FUA.0);
        if by_driver {
            let mut at = from;
            while at < to {
                let n = (to - at).min(self.range_chunk());
                let zeroed = {
                    let _whole = self.whole_blocks(at, at + n);
                    self.driver.zero(at, n, pass)
                };
                match zeroed {
                    Ok(()) => at += n,
                    Err(Error::NotSupported(_)) if fast => {
                        return Err(Error::NotSupported("fast zeroing here"));
                    }
                    Err(Error::NotSupported(_)) if self.caps.zero_by_write => break,
                    Err(e) => return Err(e),
                }
            }
            self.write_zeroes(offset, from.min(end), write)?;
            // From where the driver gave up, the rest of the blocks and what follows them.
            self.write_zeroes(at.max(offset), end, write)?;
        } else {
            self.write_zeroes(offset, end, write)?;
        }
        if fua && !carried { self.flush() } else { Ok(()) }
    }

    /// Write zeroes; of the flags only FUA, and only if the driver honours it.
    fn write_zeroes(&self, mut offset: u64, end: u64, flags: ReqFlags) -> Result<()> {
        let mut vecs = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 64];
        while offset < end {
            let (n, bytes) = zero_iovecs(&mut vecs, (end - offset).min(ZERO_CHUNK));
            // SAFETY: the pieces lie in the static zeroes, which are only read.
            let zeroes = unsafe { Src::from_raw(&vecs[..n], bytes) };
            self.write(zeroes, offset, flags)?;
            offset += bytes as u64;
        }
        Ok(())
    }

    /// Give a range back, whole blocks of the driver's only. The rest stays as it is.
    pub fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        if self.caps.read_only {
            return Err(Error::ReadOnly(self.name().clone()));
        }
        let end = offset.checked_add(count).ok_or_else(|| Error::invalid("range overflows"))?;
        let fua = flags.has(ReqFlags::FUA);
        if fua && self.can_fua() == Can::Not {
            return Err(Error::NotSupported("FUA"));
        }
        let carried = fua && self.caps.trim_fua;
        // A trim that could not be made to last is not made: that is as good an answer.
        if !self.caps.trim || (fua && !carried && !self.flush_does()) {
            return if fua && self.flush_does() { self.flush() } else { Ok(()) };
        }
        let pass = if carried { ReqFlags::FUA } else { ReqFlags::NONE };
        let align = u64::from(self.caps.align.max(1));
        let (mut at, to) = (offset.next_multiple_of(align), end - end % align);
        while at < to {
            let n = (to - at).min(self.range_chunk());
            let _whole = self.whole_blocks(at, at + n);
            self.driver.trim(at, n, pass)?;
            at += n;
        }
        if fua && !carried { self.flush() } else { Ok(()) }
    }

    /// Bring a range near: by the driver, or by reading it.
    pub fn cache(&self, mut offset: u64, count: u64) -> Result<()> {
        let end = offset.checked_add(count).ok_or_else(|| Error::invalid("range overflows"))?;
        if self.caps.cache {
            while offset < end {
                let n = (end - offset).min(self.range_chunk());
                self.driver.cache(offset, n)?;
                offset += n;
            }
            return Ok(());
        }
        if !self.caps.cache_by_read {
            return Err(Error::NotSupported("bringing bytes near"));
        }
        let mut scratch = vec![0; count.min(BOUNCE_CHUNK) as usize];
        while offset < end {
            let n = (end - offset).min(BOUNCE_CHUNK) as usize;
            self.read_slice(&mut scratch[..n], offset)?;
            offset += n as u64;
        }
        Ok(())
    }

    /// Keep whole blocks that are about to be changed from those that read and write back parts of them:
    /// what these have read would come back.
    fn whole_blocks(&self, from: u64, to: u64) -> Option<RangeGuard<'_>> {
        (self.caps.align > 1).then(|| self.blocks.lock(from, to, false))
    }

    /// Whether a flush makes what was changed last.
    fn flush_does(&self) -> bool {
        self.caps.flush && self.caps.fua_by_flush
    }

    /// Whether `len` bytes anywhere are one request, where only its length matters.
    #[inline]
    fn fits(&self, len: usize) -> bool {
        self.only_length && len as u64 <= self.caps.max_transfer
    }

    /// Bytes of one zero, trim or cache.
    fn range_chunk(&self) -> u64 {
        let align = u64::from(self.caps.align.max(1));
        match self.caps.max_range {
            0 => u64::MAX,
            max => (max - max % align).max(align),
        }
    }

    fn chunk(&self) -> u64 {
        let align = u64::from(self.caps.align.max(1));
        match self.caps.max_transfer {
            0 => u64::MAX,
            max => (max - max % align).max(align),
        }
    }

    fn read_emulated(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<()> {
        let align = u64::from(self.caps.align.max(1));
        while !buf.is_empty() {
            let n = (buf.len() as u64).min(self.chunk());
            let whole = n - n % align;
            let (part, rest);
            if offset.is_multiple_of(align)
                && whole > 0
                && buf.sub(0, whole as usize).is_aligned(self.mem_align(), align as usize)
            {
                (part, rest) = buf.split_at(whole as usize);
                self.driver.read(part, offset)?;
            } else {
                let from = offset - offset % align;
                let to = self.bounce_end(buf, offset, n, align);
                let mut bounce =
                    Aligned::new((to - from) as usize, self.mem_align().max(align as usize))?;
                let vecs = bounce.iovec((to - from) as usize);
                // SAFETY: the memory is `bounce`'s, which outlives the call.
                self.driver.read(unsafe { Dst::from_raw(&vecs, (to - from) as usize) }, from)?;
                let len = (to - offset).min(n) as usize;
                (part, rest) = buf.split_at(len);
                part.copy_from(&bounce.bytes()[(offset - from) as usize..]);
            }
            offset += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Where the bounced piece of a request of `buf` at `offset` ends, aligned. Where only an edge is
    /// at fault that is the end of its block; where memory is, as much as bounces at a time.
    fn bounce_end<D>(&self, buf: Iov<'_, D>, offset: u64, n: u64, align: u64) -> u64 {
        let from = offset - offset % align;
        let edge = from + align - offset;
        if offset != from && edge < n {
            let next = buf.sub(edge as usize, align as usize);
            if next.is_aligned(self.mem_align(), 1) {
                return from + align;
            }
        }
        let limit = BOUNCE_CHUNK.min(self.chunk()).max(align);
        (offset + n).next_multiple_of(align).min(from + limit)
    }

    fn mem_align(&self) -> usize {
        self.caps.mem_align.max(1) as usize
    }

    fn write_emulated(&self, mut buf: Src<'_>, mut offset: u64, flags: ReqFlags) -> Result<()> {
        let align = u64::from(self.caps.align.max(1));
        while !buf.is_empty() {
            let n = (buf.len() as u64).min(self.chunk());
            let whole = n - n % align;
            let (part, rest);
            if offset.is_multiple_of(align)
                && whole > 0
                && buf.sub(0, whole as usize).is_aligned(self.mem_align(), align as usize)
            {
                (part, rest) = buf.split_at(whole as usize);
                let _shared = self.blocks.lock(offset, offset + whole, false);
                self.driver.write(part, offset, flags)?;
            } else {
                let from = offset - offset % align;
                let to = self.bounce_end(buf, offset, n, align);
                let len = (to - offset).min(n) as usize;
                (part, rest) = buf.split_at(len);
                self.write_bounced(part, offset, from, to, flags)?;
            }
            offset += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Write `part` at `offset` by whole blocks `from..to`, keeping the bytes around it.
    fn write_bounced(
        &self,
        part: Src<'_>,
        offset: u64,
        from: u64,
        to: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        let align = u64::from(self.caps.align.max(1));
        let end = offset + part.len() as u64;
        let mut bounce = Aligned::new((to - from) as usize, self.mem_align().max(align as usize))?;
        let edges = offset != from || end != to;
        let _blocks = self.blocks.lock(from, to, edges);
        // The device must not come out longer than it is to be.
        if to > self.size().max(end) {
            return self.driver.write_edge(part, offset, flags);
        }
        if offset != from {
            self.read_block(&bounce, from, 0)?;
        }
        let last = to - align;
        if end != to && (last != from || offset == from) {
            self.read_block(&bounce, last, (last - from) as usize)?;
        }
        let at = (offset - from) as usize;
        part.copy_to(&mut bounce.bytes()[at..]);
        let vecs = bounce.iovec((to - from) as usize);
        // SAFETY: the memory is `bounce`'s, which outlives the call.
        self.driver.write(unsafe { Src::from_raw(&vecs, (to - from) as usize) }, from, flags)
    }

    fn read_block(&self, bounce: &Aligned, offset: u64, at: usize) -> Result<()> {
        let align = self.caps.align.max(1) as usize;
        // SAFETY: `at` is a block inside the bounce memory.
        let base = unsafe { bounce.ptr.as_ptr().add(at) };
        let vecs = [iovec { iov_base: base.cast(), iov_len: align }];
        // SAFETY: as above; the memory outlives the call.
        self.driver.read(unsafe { Dst::from_raw(&vecs, align) }, offset)
    }
}
