//! Files read by memory: mappings, and what keeps a file that shrinks from killing the host.
//!
//! A read through a mapping is a copy and no system call, which is what `io=mmap` is for. The price
//! is that the page behind an address can go away: when somebody cuts the file short, or the medium
//! cannot be read, the kernel answers the copy with SIGBUS, which ends the process. No check before
//! the copy helps, since the file can change between the two. So when the first such mapping is
//! made a handler for SIGBUS is installed, once and for good. It looks whether the address lies in
//! a mapping of this table; if so it marks the mapping as failed and puts pages of zeroes where
//! the file was, from the address to the mapping's end, so that the copy runs on; the reader looks
//! at the mark after its copy, drops what it got, and reads by `pread`, from then on for good,
//! which answers EIO for what is gone. Any other SIGBUS goes to whoever had it before, and does
//! what it would have done without us.
//!
//! Promises: a read through a [`Mapping`] never returns bytes that the file did not have, and never
//! ends the process. Relies on: nobody in the process replaces the handler without passing on what
//! is not theirs; the library's code stays loaded once a handler points into it.
//!
//! The table is read in the handler, possibly while another thread changes it, and changed in
//! forked children (where a lock might be held for ever): it is a list of slots that only grows,
//! of atomics only. A slot is reused, never freed. What a slot says holds together by its sequence
//! number, odd while it changes.

use std::fs::File;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, fence};

use libc::{c_int, c_void, siginfo_t};
use memmap2::{Mmap, MmapOptions};

use super::sys::{self, Errno};
use crate::block::Dst;

/// Pages of this file system come in sizes that the handler could not put zeroes over.
const HUGETLBFS: u64 = 0x958458f6;

/// A whole file in memory, for reading.
pub struct Mapping {
    map: Mmap,
    /// Its place in the table, if it may be read by the process itself.
    slot: Option<&'static Slot>,
}

impl Mapping {
    /// Memory that only the kernel is ever handed: a fault there is EFAULT, not a signal.
    pub fn for_kernel(file: &File, len: u64) -> Result<Self, Errno> {
        let len = usize::try_from(len).map_err(|_| libc::EOVERFLOW)?;
        // SAFETY: the bytes may change or go at any time, so they are never looked at through a
        // reference, only copied by address, and a fault is provided for.
        let map = unsafe { MmapOptions::new().len(len).map(file) }
            .map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))?;
        Ok(Self { map, slot: None })
    }

    /// Memory that [`Mapping::read`] reads.
    pub fn for_reading(file: &File, len: u64) -> Result<Self, Errno> {
        if sys::file_system(file) == HUGETLBFS {
            return Err(libc::EOPNOTSUPP);
        }
        install_handler()?;
        let mut map = Self::for_kernel(file, len)?;
        let start = map.map.as_ptr() as usize;
        map.slot = Some(Slot::take(start, start + map.map.len()));
        Ok(map)
    }

    /// Where `count` bytes at `offset` can be read, if they are mapped.
    pub fn at(&self, offset: u64, count: u64) -> Option<*const u8> {
        let end = offset.checked_add(count)?;
        // SAFETY: the place is inside the mapping.
        (end <= self.map.len() as u64).then(|| unsafe { self.map.as_ptr().add(offset as usize) })
    }

    /// Fill `buf` with what is at `offset`, or answer `false`: what `buf` has then means nothing.
    /// For a regular file, `file` is it.
    #[inline]
    pub fn read(&self, buf: Dst<'_>, offset: u64, file: Option<&File>) -> bool {
        let (Some(slot), Some(mut from)) = (self.slot, self.at(offset, buf.len() as u64)) else {
            return false;
        };
        if slot.failed.load(Relaxed) {
            return false;
        }
        let mut last = ptr::null();
        for (p, n) in buf.pieces() {
            // SAFETY: a piece is writable memory of n bytes, none of it ours; `from` has as many, by
            // `at`. The file's bytes may change meanwhile, as they may under `pread`; what is gone
            // is the handler's matter.
            unsafe {
                ptr::copy_nonoverlapping(from, p, n);
                from = from.add(n);
                last = p.add(n - 1).cast_const();
            }
        }
        // The copy's reads come before the look at the mark.
        fence(Acquire);
        if slot.failed.load(Relaxed) {
            return false;
        }
        // The page that the file now ends in does not fault behind the end: it reads as zeroes. If
        // that happened to any byte then to the last one, so only a zero there needs a look.
        // SAFETY: `last` is the last byte of the caller's memory, which was just written.
        match file {
            Some(file) if !last.is_null() && unsafe { *last } == 0 => {
                sys::file_size(file).is_ok_and(|size| offset + buf.len() as u64 <= size)
            }
            _ => true,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Out of the table before `map` goes: as long as an address is in the table it is ours.
        if let Some(slot) = self.slot.take() {
            slot.give_back();
        }
    }
}

/// One mapping in the table.
struct Slot {
    next: AtomicPtr<Slot>,
    taken: AtomicBool,
    /// Odd while `start` and `end` change.
    sequence: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    failed: AtomicBool,
}

/// The first slot.
static TABLE: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());

fn slots() -> impl Iterator<Item = &'static Slot> {
    // SAFETY: slots are leaked, and complete before they are linked.
    let get = |p: &AtomicPtr<Slot>| unsafe { p.load(Acquire).as_ref() };
    std::iter::successors(get(&TABLE), move |slot: &&'static Slot| get(&slot.next))
}

impl Slot {
    /// A slot for these addresses.
    fn take(start: usize, end: usize) -> &'static Self {
        let free = |slot: &&Slot| slot.taken.compare_exchange(false, true, SeqCst, SeqCst).is_ok();
        let slot = slots().find(free).unwrap_or_else(Self::add);
        slot.failed.store(false, SeqCst);
        slot.set(start, end);
        slot
    }

    /// A new slot, taken.
    fn add() -> &'static Self {
        let slot: &'static Slot = Box::leak(Box::new(Slot {
            next: AtomicPtr::new(ptr::null_mut()),
            taken: AtomicBool::new(true),
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }));
        let mut first = TABLE.load(SeqCst);
        loop {
            slot.next.store(first, SeqCst);
            let new = ptr::from_ref(slot).cast_mut();
            match TABLE.compare_exchange(first, new, SeqCst, SeqCst) {
                Ok(_) => return slot,
                Err(other) => first = other,
            }
        }
    }

    fn give_back(&self) {
        self.set(0, 0);
        self.taken.store(false, Release);
    }

    /// Only by whoever has the slot.
    fn set(&self, start: usize, end: usize) {
        self.sequence.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.end.store(end, SeqCst);
        self.sequence.fetch_add(1, SeqCst);
    }

    /// The addresses, if `address` is one of them.
    fn holds(&self, address: usize) -> Option<(usize, usize)> {
        let before = self.sequence.load(SeqCst);
        let (start, end) = (self.start.load(SeqCst), self.end.load(SeqCst));
        let whole = before & 1 == 0 && self.sequence.load(SeqCst) == before;
        (whole && (start..end).contains(&address)).then_some((start, end))
    }
}

/// What a handler needs, known before it can be called.
struct Installed {
    page: usize,
    before: libc::sigaction,
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();
/// The error number of the attempt to install the handler; 0 = it is there.
static ATTEMPT: OnceLock<Errno> = OnceLock::new();

fn install_handler() -> Result<(), Errno> {
    let errno = *ATTEMPT.get_or_init(|| {
        // SAFETY: a `sigaction` of zeroes is a valid one, and both are ours; the handler keeps to
        // what a handler may do.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) != 0 {
                return libc::EINVAL;
            }
            let page = libc::sysconf(libc::_SC_PAGESIZE).max(4096) as usize;
            let _ = INSTALLED.set(Installed { page, before });
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_sigbus as *const () as usize;
            // On the thread's other stack if it has one; whatever ran before expects no less.
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut ours.sa_mask);
            if libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) != 0 {
                return libc::EINVAL;
            }
        }
        0
    });
    if errno == 0 { Ok(()) } else { Err(errno) }
}

/// The handler. It runs in the middle of any thread's copy: no lock, no allocation, `errno` kept.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    if !heal(info) {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
}

/// Put zeroes where a page of ours is gone. `false` if it is not ours.
fn heal(info: *mut siginfo_t) -> bool {
    let Some(installed) = INSTALLED.get() else { return false };
    if info.is_null() {
        return false;
    }
    // SAFETY: the kernel's own structure; the address is looked at only if it is one's fault.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Codes up to 0 are signals that a process sent: there is no address in them.
    if code <= 0 {
        return false;
    }
    let found = slots().find_map(|slot| slot.holds(address).map(|range| (slot, range)));
    let Some((slot, (start, end))) = found else { return false };
    // Before the zeroes are there to be read.
    slot.failed.store(true, SeqCst);
    let page = address & !(installed.page - 1);
    // The rest of the mapping; all of it if the process may not have one more mapping.
    zeroes_at(page, end) || zeroes_at(start, end)
}

fn zeroes_at(start: usize, end: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let (at, len) = (start as *mut c_void, end - start);
    // SAFETY: the range is part of a mapping of ours, which cannot go while its reader is in here.
    unsafe { libc::mmap(at, len, libc::PROT_READ, flags, -1, 0) != libc::MAP_FAILED }
}

/// Do what would have been done without us.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(Installed { before, .. }) = INSTALLED.get() else { return };
    // SAFETY: see `heal`.
    let sent = info.is_null() || unsafe { (*info).si_code } <= 0;
    match before.sa_sigaction {
        // A signal that was sent can be ignored; a fault cannot, it ends the process.
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: a `sigaction` of zeroes asks for the default.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, ptr::null_mut());
                // A fault repeats when we return; what was sent has to be sent again.
                if sent {
                    libc::raise(signal);
                }
            }
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: whoever set it said that it is a function of this type.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: as above.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
