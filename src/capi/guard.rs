//! What every call has in common: this thread's last error, panics that stop here, and fork.
//!
//! Promises: no panic leaves an `extern "C"` function; a call that succeeds costs a few
//! nanoseconds here and formats nothing; the buffer of the last error has no destructor, so that
//! it can be used until the thread's very end.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ffi::{c_char, c_int, c_void};
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::*;
use crate::block::{Error, ErrorKind, Progress};
use crate::log::{Level, log};
use crate::plugin;

/// Bytes of this thread's last error, with the NUL.
const TEXT: usize = 1024;

/// Why a call fails.
pub(super) enum Fail {
    /// The library says so.
    Lib(Error),
    /// An argument means nothing: `-EINVAL`.
    Argument(&'static str),
    /// This code, for this reason.
    Code(c_int, String),
}

impl From<Error> for Fail {
    fn from(e: Error) -> Self {
        Self::Lib(e)
    }
}

impl Fail {
    fn code(&self) -> c_int {
        let kind = match self {
            Self::Lib(e) => e.kind(),
            Self::Argument(_) => return -libc::EINVAL,
            Self::Code(code, _) => return *code,
        };
        match kind {
            // 0 would be a success, and from 4096 on the system has no errors.
            ErrorKind::Errno(e @ 1..=4095) => -e,
            ErrorKind::Errno(_) => -libc::EIO,
            ErrorKind::Corrupt => QBLK_ECORRUPT,
            ErrorKind::Format => QBLK_EFORMAT,
            ErrorKind::Unsupported => QBLK_EUNSUPPORTED,
            ErrorKind::Locked => QBLK_ELOCKED,
            ErrorKind::Proto => QBLK_EPROTO,
            ErrorKind::NeedKey => QBLK_ENEEDKEY,
            ErrorKind::BadKey => QBLK_EBADKEY,
            ErrorKind::Policy => QBLK_EPOLICY,
            ErrorKind::Internal => QBLK_EINTERNAL,
        }
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lib(e) => e.fmt(f),
            Self::Argument(what) => f.write_str(what),
            Self::Code(_, what) => f.write_str(what),
        }
    }
}

/// What a call gives back to C.
pub(super) trait Answer {
    /// Its type there.
    type C;
    /// Success.
    fn done(self) -> Self::C;
    /// Failure.
    fn failed(code: c_int) -> Self::C;
}

impl Answer for () {
    type C = c_int;
    #[inline]
    fn done(self) -> c_int {
        0
    }
    #[inline]
    fn failed(code: c_int) -> c_int {
        code
    }
}

impl Answer for i64 {
    type C = i64;
    fn done(self) -> i64 {
        self
    }
    fn failed(code: c_int) -> i64 {
        code.into()
    }
}

/// What this room keeps for each thread.
struct Thread {
    /// Guarded calls that this thread is in; above 1 when a log callback calls back.
    depth: Cell<u32>,
    /// Whether this thread is in a log callback.
    in_sink: Cell<bool>,
    /// The last error, NUL-terminated; empty if there was none.
    text: UnsafeCell<[u8; TEXT]>,
}

thread_local! {
    static THREAD: Thread =
        const {
            Thread {
                depth: Cell::new(0),
                in_sink: Cell::new(false),
                text: UnsafeCell::new([0; TEXT]),
            }
        };
}
const _: () = assert!(!std::mem::needs_drop::<Thread>());

/// Set in a child of `fork`, which has the memory of its parent but none of its threads.
static FORKED: AtomicBool = AtomicBool::new(false);

/// A call that needs no handle.
pub(super) fn call<R: Answer>(what: &'static str, f: impl FnOnce() -> Result<R, Fail>) -> R::C {
    guarded(what, None, || {
        life::ready();
        f()
    })
}

/// A call on a device. `f` checks the arguments first, and gets at the image by [`image`].
///
/// # Safety
/// `dev` is NULL, or a handle that nobody closes during the call.
#[inline(always)]
pub(super) unsafe fn on<R: Answer>(
    what: &'static str,
    dev: *mut qblk,
    f: impl FnOnce(&qblk) -> Result<R, Fail>,
) -> R::C {
    // SAFETY: the caller's word.
    match unsafe { dev.as_ref() } {
        Some(dev) => guarded(what, Some(&dev.broken), || {
            if plugin::is_inside() {
                dev.image.refuse_reentry()?;
            }
            f(dev)
        }),
        None => null_handle::<R>(what),
    }
}

#[cold]
#[inline(never)]
fn null_handle<R: Answer>(what: &'static str) -> R::C {
    guarded::<R>(what, None, || Err(Fail::Argument("the device handle is NULL")))
}

/// The image of a handle, if it may be used here and now.
#[inline(always)]
pub(super) fn image(dev: &qblk) -> Result<&Image, Fail> {
    if FORKED.load(Relaxed) || dev.broken.load(Relaxed) {
        return Err(unusable());
    }
    Ok(&dev.image)
}

#[cold]
#[inline(never)]
fn unusable() -> Fail {
    match alive() {
        Err(e) => e,
        Ok(()) => Fail::Code(
            QBLK_EINTERNAL,
            "an earlier call on this device met an internal error; it can only be closed".into(),
        ),
    }
}

/// Do `work` with whom C named to be told how far it is (nobody if `tell` is NULL).
pub(super) fn with_progress<T>(
    tell: qblk_progress_fn,
    opaque: *mut c_void,
    work: impl FnOnce(Progress<'_>) -> T,
) -> T {
    let Some(tell) = tell else { return work(Progress::NONE) };
    /// What C handed over; what it points to is C's affair.
    struct Opaque(*mut c_void);
    // SAFETY: it is only handed back to C, which was told from which threads.
    unsafe impl Sync for Opaque {}
    let opaque = Opaque(opaque);
    let call = |done, total| {
        // One piece, so that its Sync counts.
        let opaque = &opaque;
        // SAFETY: the caller's function with the caller's argument, while the caller waits.
        unsafe { tell(opaque.0, done, total) == 0 }
    };
    work(Progress::new(&call))
}

/// Refuse to work in a child of `fork`.
pub(super) fn alive() -> Result<(), Fail> {
    if forked() { Err(Error::Forked("libqblk").into()) } else { Ok(()) }
}

/// Whether this process is a child of `fork` that inherited the library.
pub(super) fn forked() -> bool {
    FORKED.load(Relaxed)
}

/// Note that this process is one; called by `fork` in the child.
pub(super) extern "C" fn set_forked() {
    FORKED.store(true, Relaxed);
}

/// Run `f`; turn what it answers, or its panic, into what C is answered. A panic breaks `device`.
#[inline(always)]
pub(super) fn guarded<R: Answer>(
    what: &'static str,
    device: Option<&AtomicBool>,
    f: impl FnOnce() -> Result<R, Fail>,
) -> R::C {
    THREAD.with(|thread| {
        thread.clear();
        thread.depth.set(thread.depth.get().wrapping_add(1));
        let result = catch_unwind(AssertUnwindSafe(f));
        thread.depth.set(thread.depth.get().wrapping_sub(1));
        match result {
            Ok(Ok(answer)) => answer.done(),
            Ok(Err(fail)) => R::failed(failed(thread, what, &fail)),
            Err(payload) => {
                if let Some(broken) = device {
                    broken.store(true, Relaxed);
                }
                R::failed(panicked(thread, what, payload))
            }
        }
    })
}

#[cold]
#[inline(never)]
fn failed(thread: &Thread, what: &str, fail: &Fail) -> c_int {
    // Failures of a log callback's own calls are not logged: that would never end.
    if thread.depth.get() == 0 && !thread.in_sink.get() {
        log(Level::Debug, format_args!("{what}: {fail}"));
    }
    // A log callback may have called back in the meantime, and so written its own text: replace it.
    thread.store(format_args!("{what}: {fail}"));
    if plugin::is_inside() {
        plugin::note_inner(fail.code(), thread.noted().as_bytes());
    }
    fail.code()
}

#[cold]
#[inline(never)]
fn panicked(thread: &Thread, what: &str, payload: Box<dyn Any + Send>) -> c_int {
    // The hook has left the message and its place here, unless the program replaced the hook.
    let noted = thread.noted();
    let text = if noted.is_empty() { message(&*payload).to_owned() } else { noted };
    // A payload is any type, and its drop may panic as well: no louder than the first time.
    thread.depth.set(thread.depth.get().wrapping_add(1));
    if let Err(worse) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(worse);
    }
    thread.depth.set(thread.depth.get().wrapping_sub(1));
    thread.store(format_args!("{what}: internal error: {text}"));
    QBLK_EINTERNAL
}

fn message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Keep panics inside a guarded call off stderr: their text goes to `qblk_get_error`. All others
/// go on to the hook that was there (the program's own, where this crate is used from Rust).
pub(super) fn install_hook() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        THREAD.with(|thread| {
            if thread.depth.get() == 0 {
                return previous(info);
            }
            let text = message(info.payload());
            match info.location() {
                Some(at) => thread.store(format_args!("{text} ({}:{})", at.file(), at.line())),
                None => thread.store(format_args!("{text}")),
            }
        });
    }));
}

/// Run a log callback. One that is called within another on the same thread is left out.
pub(super) fn in_sink(callback: impl FnOnce()) {
    THREAD.with(|thread| {
        if !thread.in_sink.replace(true) {
            // What its own calls fail with is not what the call that logs fails with.
            // SAFETY: as in `clear`.
            let text = unsafe { *thread.text.get() };
            callback();
            // SAFETY: as in `clear`.
            unsafe { *thread.text.get() = text };
            thread.in_sink.set(false);
        }
    });
}

/// Whether this thread is in a log callback.
pub(super) fn is_in_sink() -> bool {
    THREAD.with(|thread| thread.in_sink.get())
}

/// This thread's last error, for C: never NULL, valid until the thread's next call.
pub(super) fn last_error() -> *const c_char {
    THREAD.with(|thread| thread.text.get().cast_const().cast())
}

impl Thread {
    #[inline(always)]
    fn clear(&self) {
        // SAFETY: the buffer is this thread's alone, and no reference to it is alive.
        unsafe { *self.text.get().cast::<u8>() = 0 };
    }

    fn store(&self, args: fmt::Arguments<'_>) {
        let mut text = Cut { buf: [0; TEXT], len: 0 };
        // Formatting may run code that calls back, hence the buffer of its own.
        let _ = text.write_fmt(args);
        // SAFETY: as in `clear`.
        unsafe { *self.text.get() = text.buf };
    }

    fn noted(&self) -> String {
        // SAFETY: as in `clear`.
        let buf = unsafe { &*self.text.get() };
        let len = buf.iter().position(|&b| b == 0).unwrap_or(0);
        String::from_utf8_lossy(&buf[..len]).into_owned()
    }
}

/// Text cut to the buffer at a character's boundary; what is left of the buffer stays NUL.
struct Cut {
    buf: [u8; TEXT],
    len: usize,
}

impl Write for Cut {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let mut n = s.len().min(TEXT - 1 - self.len);
        while !s.is_char_boundary(n) {
            n -= 1;
        }
        for (to, &from) in self.buf[self.len..].iter_mut().zip(&s.as_bytes()[..n]) {
            // A NUL would end the text for C.
            *to = if from == 0 { b' ' } else { from };
        }
        self.len += n;
        // Once cut, nothing may follow.
        if n < s.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last() -> &'static str {
        // SAFETY: this thread's buffer, which is NUL-terminated and used by this test only.
        unsafe { CStr::from_ptr(last_error()) }.to_str().unwrap()
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let rc = call::<()>("qblk_x", || Err(Fail::Code(-5, "€".repeat(1000))));
        assert_eq!(rc, -5);
        assert!(last().starts_with("qblk_x: €") && last().ends_with('€'));
        assert!((TEXT - 4..TEXT).contains(&last().len()), "{}", last().len());
        assert_eq!(call::<()>("qblk_x", || Ok(())), 0);
        assert_eq!(last(), "");
    }

    #[test]
    fn a_nul_in_a_text_does_not_end_it() {
        call::<()>("qblk_x", || Err(Fail::Code(-5, "a\0b".into())));
        assert_eq!(last(), "qblk_x: a b");
    }

    #[test]
    fn an_errno_that_is_none_is_still_a_failure() {
        for errno in [0, -5, 4096] {
            let e = Error::Os { op: "x", file: crate::block::Name::from("f"), errno };
            assert_eq!(call::<()>("qblk_x", || Err(e.into())), -libc::EIO);
        }
    }

    #[test]
    fn codes_of_plugins_mean_what_they_mean_here() {
        for code in [-1, -5, -4095].into_iter().chain(QBLK_EINTERNAL..=QBLK_ECORRUPT) {
            let kind = ErrorKind::of_code(code).unwrap();
            let e = Error::Plugin { file: "f".into(), what: "x".into(), kind };
            assert_eq!(call::<()>("qblk_x", || Err(e.into())), code);
        }
        for none in [0, 1, -4096, QBLK_ECORRUPT + 1, QBLK_EINTERNAL - 1, i32::MIN] {
            assert!(ErrorKind::of_code(none).is_none(), "{none}");
        }
    }

    #[test]
    fn a_panic_is_an_error_code_and_breaks_its_device_only() {
        let (broken, whole) = (AtomicBool::new(false), AtomicBool::new(false));
        let rc = guarded::<i64>("qblk_x", Some(&broken), || {
            // A log callback that calls back in and fails, before the panic.
            let inner = guarded::<()>("qblk_y", Some(&whole), || Err(Fail::Argument("inner")));
            assert_eq!(inner, -libc::EINVAL);
            panic!("number {}", 5)
        });
        assert_eq!(rc, i64::from(QBLK_EINTERNAL));
        assert!(last().starts_with("qblk_x: internal error: number 5"), "{}", last());
        assert!(broken.load(Relaxed) && !whole.load(Relaxed));
        // Its payload may be anything, and may panic when dropped.
        struct Worse;
        impl Drop for Worse {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        let rc = guarded::<()>("qblk_x", None, || std::panic::panic_any(Worse));
        assert_eq!(rc, QBLK_EINTERNAL);
        assert!(last().starts_with("qblk_x: internal error: no message"), "{}", last());
    }
}
