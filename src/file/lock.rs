//! Locks that QEMU and its like understand, so that no image is opened twice by accident.
//!
//! The protocol is QEMU's (block/file-posix.c), on OFD byte locks of the image file itself. A
//! permission is something that one does with an image; each has a number. Who uses permission n
//! holds byte 100 + n, who wants nobody else to use it holds byte 200 + n. Only shared locks are ever
//! held, so that taking one cannot fail; whether they agree with those of others is then *tested*.
//! Since everybody takes all first and tests afterwards, of two who come at the same moment both may
//! be refused, and never are both let in.
//!
//! Promises: no byte of a file is interpreted before its lock was taken and tested; the lock is on
//! one open file description until [`FileLock`] goes; where one opening replaces another, some
//! description has each lock at any moment, whether it works out or not ([`Locks`]).
//!
//! Locks belong to the description and not to the process. So two handles of one process are as
//! strange to each other as two processes are, and a child of `fork` that lives on keeps the
//! description; which is why a lock is given back by hand, by the process that took it.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{holders, os, sys};
use crate::block::{Error, Fence, Name, Result};
use crate::log::{Level, log};
use sys::Errno;

/// Byte of "permission 0 is used".
pub(super) const USED: u64 = 100;
/// Byte of "permission 0 is not shared".
pub(super) const UNSHARED: u64 = 200;
/// What permissions are called, by their number. The last is of QEMU up to 6.1, and still seen.
pub(super) const NAMES: [&str; 5] =
    ["consistent read", "write", "write unchanged", "resize", "change children"];
/// How many of them are used today.
const COUNT: u8 = 4;

/// From the first byte of the protocol to the last.
const SPAN: u64 = UNSHARED + COUNT as u64 - USED;

const READ: u8 = 1;
const WRITE: u8 = 2;
const RESIZE: u8 = 8;
const ALL: u8 = (1 << COUNT) - 1;

/// Sets of permissions, as bits by their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    used: u8,
    unshared: u8,
}

impl Permissions {
    /// Nothing is locked: a description.
    pub const NONE: Self = Self { used: 0, unshared: 0 };
    /// Who writes an image: bytes 100, 101, 103 and 201, 203.
    pub const WRITER: Self = Self { used: READ | WRITE | RESIZE, unshared: WRITE | RESIZE };
    /// Who reads an image that has metadata, or one that is below another: bytes 100 and 201, 203.
    pub const READER: Self = Self { used: READ, unshared: WRITE | RESIZE };
    /// Who reads a raw file: bytes 100 and 203. What a program of QEMU writes may be read meanwhile,
    /// as QEMU itself allows; our own writers resize, and so keep such a reader out.
    pub const RAW_READER: Self = Self { used: READ, unshared: RESIZE };
    /// Who reads whatever others do: byte 100.
    pub const SHARED: Self = Self { used: READ, unshared: 0 };
    /// Who makes a file: bytes 101, 103 and 203.
    pub const CREATING: Self = Self { used: WRITE | RESIZE, unshared: RESIZE };

    /// The same, and nobody else may have the file at all: bytes 200 to 203 too.
    pub const fn exclusive(self) -> Self {
        Self { unshared: ALL, ..self }
    }

    /// The same for a file that is below another: what is in it is relied on.
    pub const fn below(self) -> Self {
        if self.used == Self::RAW_READER.used && self.unshared == Self::RAW_READER.unshared {
            Self::READER
        } else {
            self
        }
    }

    fn is_none(self) -> bool {
        self == Self::NONE
    }

    fn with(self, other: Self) -> Self {
        Self { used: self.used | other.used, unshared: self.unshared | other.unshared }
    }

    fn without(self, other: Self) -> Self {
        Self { used: self.used & !other.used, unshared: self.unshared & !other.unshared }
    }

    /// Bytes to lock, ascending: first byte and how many.
    fn bytes(self) -> impl Iterator<Item = (u64, u64)> {
        runs(USED, self.used).chain(runs(UNSHARED, self.unshared))
    }

    /// Bytes that nobody else may have locked, in QEMU's order.
    fn tested(self) -> impl Iterator<Item = (u64, u64)> {
        runs(UNSHARED, self.used).chain(runs(USED, self.unshared))
    }
}

/// Runs of bits as runs of bytes.
fn runs(base: u64, bits: u8) -> impl Iterator<Item = (u64, u64)> {
    let (bits, mut at) = (u32::from(bits), 0);
    std::iter::from_fn(move || {
        at += (bits >> at).trailing_zeros();
        // No bit is left: 32 zeroes.
        if at >= 32 {
            return None;
        }
        let len = (bits >> at).trailing_ones();
        let run = (base + u64::from(at), u64::from(len));
        at += len;
        Some(run)
    })
}

/// Whether files are locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Not at all.
    Off,
    /// Where the file system has such locks.
    #[default]
    Auto,
    /// Where it has none, that is an error.
    On,
}

/// How a file is locked when it is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Locking {
    /// Whether.
    pub policy: Policy,
    /// What for.
    pub wanted: Permissions,
    /// How long to wait for others.
    pub wait: Duration,
}

impl Locking {
    /// No lock.
    pub const OFF: Self =
        Self { policy: Policy::Off, wanted: Permissions::NONE, wait: Duration::ZERO };
}

/// The locks that are held on one open file. They go when this does.
pub struct FileLock {
    file: Arc<File>,
    name: Name,
    /// Device and inode numbers.
    id: (u64, u64),
    held: Mutex<Permissions>,
    /// A forked child must not give back what its parent has.
    process: u32,
}

/// What is in the way.
struct Conflict {
    byte: u64,
    /// Where the system names the process at once: a POSIX lock.
    pid: Option<i32>,
}

impl FileLock {
    fn new(file: &Arc<File>, name: &Name, id: (u64, u64)) -> Self {
        let (file, name, process) = (file.clone(), name.clone(), std::process::id());
        Self { file, name, id, held: Mutex::default(), process }
    }

    /// Have the locks `all`, besides those that are held already. If that fails nothing changes.
    fn add(&self, all: Permissions) -> std::result::Result<(), Errno> {
        let mut held = self.held.lock();
        let missing = all.without(*held);
        for (start, count) in missing.bytes() {
            if let Err(errno) = sys::lock_bytes(&self.file, libc::F_RDLCK, start, count) {
                self.unlock(missing);
                return Err(errno);
            }
        }
        *held = held.with(all);
        Ok(())
    }

    /// Have the locks `keep` only.
    fn reduce(&self, keep: Permissions) {
        let mut held = self.held.lock();
        match keep.is_none() {
            true => self.unlock_all(),
            false => self.unlock(held.without(keep)),
        }
        *held =
            Permissions { used: held.used & keep.used, unshared: held.unshared & keep.unshared };
    }

    fn unlock(&self, which: Permissions) {
        for (start, count) in which.bytes() {
            // It fails where there are no locks, and then there is nothing to unlock.
            let _ = sys::lock_bytes(&self.file, libc::F_UNLCK, start, count);
        }
    }

    /// One call instead of one for each run of bytes; nothing else of ours is between them.
    fn unlock_all(&self) {
        let _ = sys::lock_bytes(&self.file, libc::F_UNLCK, USED, SPAN);
    }

    fn held(&self) -> Permissions {
        *self.held.lock()
    }

    /// What keeps us from `wanted`. Our own description's locks are never in our way.
    fn conflict(&self, wanted: Permissions) -> std::result::Result<Option<Conflict>, Errno> {
        // As a rule nobody else is there at all, and one look will do.
        if sys::locked_by_other(&self.file, USED, SPAN)?.is_none() {
            return Ok(None);
        }
        for (start, count) in wanted.tested() {
            if let Some((byte, pid)) = sys::locked_by_other(&self.file, start, count)? {
                return Ok(Some(Conflict { byte, pid }));
            }
        }
        Ok(None)
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing would do, were it not for children that have the description too.
        if self.process == std::process::id() {
            self.unlock_all();
        }
    }
}

/// The locks of a chain that is being opened, perhaps in place of one that is open.
///
/// An open chain gives its locks up for nobody but its successor, and in this order: the new
/// description takes what it wants *and all that the old one has*; the old one lets go, so that what is
/// still there is somebody else's; the new one is tested. If that fails, or anything later does, the
/// old takes its locks again before the new lets go; if all is well the new one gives back what it has
/// too much in [`Locks::settle`]. All of them are shared locks, so none of this can fail.
#[derive(Default)]
pub struct Locks {
    /// Of the chain that is replaced.
    before: Vec<Before>,
    /// With what they are to be in the end.
    taken: Vec<(Arc<FileLock>, Permissions)>,
    /// When we began to wait for others.
    waiting: Option<Instant>,
    in_use: bool,
    /// For the files that are opened for writing.
    fence: Option<Arc<Fence>>,
}

/// A lock of a chain that is being replaced.
struct Before {
    lock: Arc<FileLock>,
    /// What it had.
    had: Permissions,
}

impl Locks {
    /// For opening a chain in place of the one that has the locks `before`.
    pub fn replacing(before: &[Arc<FileLock>]) -> Self {
        let before = before.iter().map(|l| Before { lock: l.clone(), had: l.held() }).collect();
        let mut locks = Self::default();
        locks.before = before;
        locks
    }

    /// Files that are opened for writing from now on are not written while `fence` is closed.
    pub fn set_fence(&mut self, fence: Arc<Fence>) {
        self.fence = Some(fence);
    }

    pub(super) fn fence(&self) -> Option<Arc<Fence>> {
        self.fence.clone()
    }

    /// Whether some file that is not to be locked was found to be locked by others.
    pub fn in_use(&self) -> bool {
        self.in_use
    }

    /// Lock a file that was just opened. Its size is to be asked for afterwards.
    /// `id`: its device and inode numbers.
    pub(super) fn take(
        &mut self,
        file: &Arc<File>,
        id: (u64, u64),
        name: &Name,
        how: Locking,
    ) -> Result<()> {
        if how.policy == Policy::Off {
            return Ok(());
        }
        let lock = Arc::new(FileLock::new(file, name, id));
        if how.wanted.is_none() {
            let any = Permissions { used: ALL, unshared: ALL };
            self.in_use |= matches!(lock.conflict(any), Ok(Some(_)));
            return Ok(());
        }
        // A file that is in its own chain: said so by who knows of chains.
        if self.taken.iter().any(|(l, _)| l.id == lock.id) {
            return Ok(());
        }
        match self.have(&lock, how.wanted, how.wait) {
            Ok(()) => {}
            Err(Failed::Locked(e)) => return Err(e),
            Err(Failed::System(errno)) if how.policy == Policy::Auto && has_none(errno) => {
                warn_once(name, lock.id.0, errno);
                return Ok(());
            }
            Err(Failed::System(errno)) => return Err(os("lock", name, errno)),
        }
        self.taken.push((lock, how.wanted));
        Ok(())
    }

    /// What was taken for a raw file turned out to have metadata, which nobody else may write.
    pub fn tighten(&mut self, id: Option<(u64, u64)>, how: Locking) -> Result<()> {
        let found = self.taken.iter().position(|(l, p)| {
            Some(l.id) == id && *p == Permissions::RAW_READER && how.policy != Policy::Off
        });
        let Some(i) = found else { return Ok(()) };
        let lock = self.taken[i].0.clone();
        match self.have(&lock, Permissions::READER, how.wait) {
            Ok(()) => {}
            Err(Failed::Locked(e)) => return Err(e),
            Err(Failed::System(errno)) => return Err(os("lock", &lock.name, errno)),
        }
        self.taken[i].1 = Permissions::READER;
        Ok(())
    }

    /// The chain is open: what its files are to hold from now on.
    pub fn settle(mut self) -> Vec<Arc<FileLock>> {
        self.before.clear();
        let taken = std::mem::take(&mut self.taken);
        let settled = taken.into_iter().map(|(lock, wanted)| {
            lock.reduce(wanted);
            lock
        });
        settled.collect()
    }

    fn have(
        &mut self,
        lock: &FileLock,
        wanted: Permissions,
        wait: Duration,
    ) -> std::result::Result<(), Failed> {
        let old = self.before.iter().find(|b| b.lock.id == lock.id);
        let mut pause = Pause::new();
        let conflict = loop {
            match attempt(lock, wanted, old).map_err(Failed::System)? {
                None => return Ok(()),
                Some(conflict) if wait.is_zero() => break conflict,
                Some(conflict) => {
                    let begun = *self.waiting.get_or_insert_with(Instant::now);
                    let left = wait.saturating_sub(begun.elapsed());
                    if left.is_zero() {
                        break conflict;
                    }
                    pause.sleep(left);
                }
            }
        };
        let waited = self.waiting.map(|begun| begun.elapsed());
        Err(Failed::Locked(refused(lock, wanted, &conflict, waited)))
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        // Not settled: all is to be as it was. The new ones go after this.
        for old in &self.before {
            restore(old);
        }
    }
}

/// Why a lock could not be had.
enum Failed {
    Locked(Error),
    System(Errno),
}

fn restore(old: &Before) {
    if let Err(errno) = old.lock.add(old.had) {
        let e = std::io::Error::from_raw_os_error(errno);
        log(Level::Error, format_args!("{}: lost its lock: {e}", old.lock.name));
    }
}

/// Take `wanted` and test it. What is in the way is answered when all is as it was before.
fn attempt(
    lock: &FileLock,
    wanted: Permissions,
    old: Option<&Before>,
) -> std::result::Result<Option<Conflict>, Errno> {
    let had = lock.held();
    let inherited = old.map_or(Permissions::NONE, |old| old.had);
    match lock.add(wanted.with(inherited)) {
        Ok(()) => {}
        // Somebody who does not know the protocol has locked it for himself alone.
        Err(libc::EAGAIN | libc::EACCES) => {
            let stranger = wanted.bytes().find_map(|(start, count)| {
                sys::write_locked_by_other(&lock.file, start, count).ok().flatten()
            });
            let (byte, pid) = stranger.unwrap_or((USED, None));
            return Ok(Some(Conflict { byte, pid }));
        }
        Err(errno) => return Err(errno),
    }
    // Nothing more than what was tested when the old one was opened, and held since.
    if wanted.without(inherited).is_none() {
        return Ok(None);
    }
    if let Some(old) = old {
        old.lock.reduce(Permissions::NONE);
    }
    let found = lock.conflict(wanted);
    if !matches!(found, Ok(None)) {
        if let Some(old) = old {
            restore(old);
        }
        lock.reduce(had);
    }
    found
}

/// Whether an error says that there are no such locks here.
fn has_none(errno: Errno) -> bool {
    // EINVAL: a kernel before 3.15.
    matches!(errno, libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL)
}

/// Say that a file system has no locks, once for each.
fn warn_once(name: &Name, device: u64, errno: Errno) {
    static SAID: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());
    if SAID.lock().insert(device) {
        let e = std::io::Error::from_raw_os_error(errno);
        log(
            Level::Warn,
            format_args!("{name}: its file system has no locks ({e}): images on it are not locked"),
        );
    }
}

/// Between two attempts: from 1 ms on twice as long each time, to 100 ms, and of that between a half
/// and all, so that two who wait for each other do not go on meeting.
pub(crate) struct Pause {
    next: Duration,
    random: u64,
}

impl Pause {
    pub fn new() -> Self {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        // The nanoseconds of two processes differ; those of two threads may not.
        let here = &raw const now as u64;
        Self {
            next: Duration::from_millis(1),
            random: (now.as_nanos() as u64) ^ here.rotate_left(32) | 1,
        }
    }

    pub fn sleep(&mut self, at_most: Duration) {
        self.random = self.random.wrapping_mul(0xd129_0d3d_3b1a_25b5).rotate_left(29) | 1;
        let part = 0.5 + (self.random >> 40) as f64 / (1u64 << 25) as f64;
        std::thread::sleep(self.next.mul_f64(part).min(at_most));
        self.next = (self.next * 2).min(Duration::from_millis(100));
    }
}

/// What a lock byte says, in words: the permission, and whether it is used (or else not shared).
pub(super) fn meaning(byte: u64) -> Option<(&'static str, bool)> {
    let (base, used) = if byte < UNSHARED { (USED, true) } else { (UNSHARED, false) };
    let name = NAMES.get(usize::try_from(byte.checked_sub(base)?).ok()?)?;
    Some((name, used))
}

/// The error for somebody who has the file.
fn refused(
    lock: &FileLock,
    wanted: Permissions,
    conflict: &Conflict,
    waited: Option<Duration>,
) -> Error {
    let mut byte = conflict.byte;
    // A reader of what may be raw is refused for "resize", which every writer of metadata uses as well;
    // that it writes says more.
    if byte == USED + 3 && matches!(sys::locked_by_other(&lock.file, USED + 1, 1), Ok(Some(_))) {
        byte = USED + 1;
    }
    let who = holders::who(&lock.file, lock.id, byte, conflict.pid);
    let (permission, used) = meaning(byte).unwrap_or(("?", true));
    let mut what = match used {
        true => format!("permission \"{permission}\" is used by {who}"),
        false => format!("permission \"{permission}\" is claimed by {who}, who does not share it"),
    };
    what += &format!(" (lock on byte {byte})");
    if let Some(waited) = waited {
        what += &format!("; waited {:.1} s", waited.as_secs_f64());
    }
    if wanted == Permissions::READER || wanted == Permissions::RAW_READER {
        what += "; QBLK_OPEN_SHARED reads it all the same";
    }
    Error::Locked { file: lock.name.clone(), what }
}

/// A lock on a file that is being made: as [`Permissions::CREATING`] says, and refused if anybody has
/// the file in any way at all, for what is in it is about to go.
pub(super) fn creating(file: &Arc<File>, name: &Name, how: Locking) -> Result<Option<FileLock>> {
    let stat = sys::fstat(file).map_err(|e| os("fstat", name, e))?;
    let lock = FileLock::new(file, name, (stat.st_dev, stat.st_ino));
    let any = Permissions { used: ALL, unshared: ALL };
    let (begun, mut pause) = (Instant::now(), Pause::new());
    loop {
        let found = lock.add(Permissions::CREATING).and_then(|()| lock.conflict(any));
        let conflict = match found {
            Ok(None) => return Ok(Some(lock)),
            Ok(Some(conflict)) => conflict,
            Err(libc::EAGAIN | libc::EACCES) => Conflict { byte: USED + 1, pid: None },
            Err(errno) if how.policy != Policy::On && has_none(errno) => {
                warn_once(name, lock.id.0, errno);
                return Ok(None);
            }
            Err(errno) => return Err(os("lock", name, errno)),
        };
        lock.reduce(Permissions::NONE);
        let left = how.wait.saturating_sub(begun.elapsed());
        if left.is_zero() {
            let waited = (!how.wait.is_zero()).then(|| begun.elapsed());
            return match refused(&lock, Permissions::CREATING, &conflict, waited) {
                Error::Locked { file, what } => Err(Error::Locked {
                    file,
                    what: what + "; it is not overwritten, close its other user first",
                }),
                e => Err(e),
            };
        }
        pause.sleep(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(p: Permissions) -> Vec<u64> {
        p.bytes().flat_map(|(start, count)| start..start + count).collect()
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        assert_eq!(bytes(Permissions::WRITER), [100, 101, 103, 201, 203]);
        assert_eq!(bytes(Permissions::READER), [100, 201, 203]);
        assert_eq!(bytes(Permissions::RAW_READER), [100, 203]);
        assert_eq!(bytes(Permissions::SHARED), [100]);
        assert_eq!(bytes(Permissions::CREATING), [101, 103, 203]);
        assert_eq!(bytes(Permissions::NONE), []);
        let exclusive = [100, 101, 103, 200, 201, 202, 203];
        assert_eq!(bytes(Permissions::WRITER.exclusive()), exclusive);
        let tested: Vec<_> = Permissions::WRITER.tested().collect();
        assert_eq!(tested, [(200, 2), (203, 1), (101, 1), (103, 1)]);
        assert_eq!(runs(0, 0xff).collect::<Vec<_>>(), [(0, 8)]);
        assert_eq!(runs(0, 0x80).collect::<Vec<_>>(), [(7, 1)]);
    }

    #[test]
    fn a_byte_says_which_permission() {
        assert_eq!(meaning(101), Some(("write", true)));
        assert_eq!(meaning(203), Some(("resize", false)));
        assert_eq!(meaning(104), Some(("change children", true)));
        assert_eq!((meaning(99), meaning(105), meaning(205)), (None, None, None));
    }
}
