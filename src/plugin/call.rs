//! Calls into plugins: what a thread is in the middle of, one at a time where the plugin wants that,
//! and what a callback says of its failure.
//!
//! Each call has a `Frame` on the stack, linked to that of the call around it, so that a thread knows
//! which instances it is inside of. Nothing is allocated for it but the texts of a call that fails.

use std::cell::Cell;
use std::ffi::c_int;

use parking_lot::{Mutex, MutexGuard};

use crate::block::{Error, Result};

/// Bytes of a text that a callback leaves, at most.
const TEXT: usize = 1024;
/// Calls into plugins that one thread may be in the middle of: so many layers, or a plugin that calls
/// itself for ever.
const DEEPEST: u32 = 64;

/// A text of bounded length; it takes no memory until there is one.
struct Text(Cell<Option<Box<[u8]>>>);

impl Text {
    #[inline(always)]
    const fn new() -> Self {
        Self(Cell::new(None))
    }

    fn set(&self, text: &[u8]) {
        self.0.set(Some(text[..text.len().min(TEXT)].into()));
    }

    fn get(&self) -> Vec<u8> {
        let text = self.0.take();
        let bytes = text.as_deref().unwrap_or_default().to_vec();
        self.0.set(text);
        bytes
    }
}

/// A call that a thread is in the middle of.
pub struct Frame {
    outer: Cell<*const Frame>,
    depth: Cell<u32>,
    /// The device that stands on the instance.
    device: usize,
    /// The lock that is held.
    serial: *const Serial,
    /// What the callback said of its failure.
    code: Cell<c_int>,
    text: Text,
    /// The last call of the library that failed inside of the callback.
    inner_code: Cell<c_int>,
    inner: Text,
}

thread_local! {
    static INNERMOST: Cell<*const Frame> = const { Cell::new(std::ptr::null()) };
}

/// A lock that is held while a plugin is called.
pub struct Serial(Mutex<()>);

impl Serial {
    pub const fn new() -> Self {
        Self(Mutex::new(()))
    }
}

/// What a thread does in a plugin is over when it is dropped.
pub struct Inside<'a> {
    frame: &'a Frame,
    _serial: Option<MutexGuard<'a, ()>>,
}

impl Drop for Inside<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        INNERMOST.set(self.frame.outer.get());
    }
}

impl Frame {
    #[inline(always)]
    pub fn new(device: usize, serial: Option<&Serial>) -> Self {
        Self {
            outer: Cell::new(std::ptr::null()),
            depth: Cell::new(0),
            device,
            serial: serial.map_or(std::ptr::null(), std::ptr::from_ref),
            code: Cell::new(0),
            text: Text::new(),
            inner_code: Cell::new(0),
            inner: Text::new(),
        }
    }

    /// Begin the call; it must not outlive the frame, which must not move.
    #[inline(always)]
    pub fn enter<'a>(&'a self, serial: Option<&'a Serial>) -> Result<Inside<'a>> {
        let outer = INNERMOST.get();
        if !outer.is_null() {
            self.nested(outer)?;
        }
        let lock = serial.map(|s| s.0.lock());
        self.outer.set(outer);
        INNERMOST.set(self);
        Ok(Inside { frame: self, _serial: lock })
    }

    /// From within another call: not under a lock that this thread has, and not without end.
    #[cold]
    fn nested(&self, outer: *const Frame) -> Result<()> {
        let mut at = outer;
        // SAFETY: frames of calls that this thread is in the middle of, which are on its stack.
        while let Some(frame) = unsafe { at.as_ref() } {
            if !self.serial.is_null() && frame.serial == self.serial {
                return Err(deadlock(
                    "a plugin that takes one call at a time was called from within a call of it",
                ));
            }
            at = frame.outer.get();
        }
        // SAFETY: as above.
        let depth = unsafe { (*outer).depth.get() } + 1;
        if depth >= DEEPEST {
            return Err(Error::Refused {
                file: "plugins".into(),
                what: format!("{DEEPEST} calls of plugins within one another"),
                errno: libc::ELOOP,
            });
        }
        self.depth.set(depth);
        Ok(())
    }

    /// What the callback gave as its code, if it did.
    pub fn code(&self) -> c_int {
        self.code.get()
    }

    /// What it gave as its text.
    pub fn text(&self) -> Vec<u8> {
        self.text.get()
    }

    /// The code and text of the last call of the library that failed in it; 0 if none did.
    pub fn inner(&self) -> (c_int, Vec<u8>) {
        (self.inner_code.get(), self.inner.get())
    }
}

fn deadlock(what: &str) -> Error {
    Error::Refused { file: "plugin".into(), what: what.into(), errno: libc::EDEADLK }
}

/// Whether this thread is in the middle of a call into a plugin.
#[inline(always)]
pub fn is_inside() -> bool {
    !INNERMOST.get().is_null()
}

/// Refuse a call on a device from within a callback of an instance that it stands on: the device may hold
/// locks meanwhile.
pub fn refuse_reentry(device: usize) -> Result<()> {
    let mut at = INNERMOST.get();
    // SAFETY: as in `nested`.
    while let Some(frame) = unsafe { at.as_ref() } {
        if frame.device == device {
            return Err(deadlock("a callback of a plugin calls the very device that stands on it"));
        }
        at = frame.outer.get();
    }
    Ok(())
}

fn innermost(f: impl FnOnce(&Frame)) {
    // SAFETY: NULL, or as in `nested`.
    if let Some(frame) = unsafe { INNERMOST.get().as_ref() } {
        f(frame);
    }
}

/// A callback says with what code it fails: an errno of either sign, or one of the library's own.
pub fn set_error(code: c_int) {
    innermost(|frame| frame.code.set(if code > 0 { code.saturating_neg() } else { code }));
}

/// A callback says in words why it fails.
pub fn set_error_text(text: &[u8]) {
    innermost(|frame| frame.text.set(text));
}

/// A call of the library has failed on this thread: what a callback around it may fail with, too.
pub fn note_inner(code: c_int, text: &[u8]) {
    innermost(|frame| {
        frame.inner_code.set(code);
        frame.inner.set(text);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_never_waits_for_itself_and_never_goes_down_for_ever() {
        let (one, other) = (Serial::new(), Serial::new());
        let a = Frame::new(1, Some(&one));
        let in_a = a.enter(Some(&one)).unwrap();
        let b = Frame::new(2, Some(&other));
        let in_b = b.enter(Some(&other)).unwrap();
        let again = Frame::new(3, Some(&one));
        let e = again.enter(Some(&one)).err().unwrap();
        assert!(matches!(e, Error::Refused { errno: libc::EDEADLK, .. }), "{e}");
        assert!(
            refuse_reentry(1).is_err() && refuse_reentry(2).is_err() && refuse_reentry(3).is_ok()
        );
        drop(in_b);
        assert!(refuse_reentry(2).is_ok());
        drop(in_a);
        assert!(!is_inside());

        fn down(n: u32) -> (u32, Error) {
            let frame = Frame::new(0, None);
            match frame.enter(None) {
                Ok(_inside) => down(n + 1),
                Err(e) => (n, e),
            }
        }
        let (n, e) = down(0);
        assert_eq!(n, DEEPEST);
        assert!(matches!(e, Error::Refused { errno: libc::ELOOP, .. }), "{e}");
        assert!(!is_inside());
    }

    #[test]
    fn what_is_said_belongs_to_the_innermost_call() {
        set_error(5);
        let outer = Frame::new(1, None);
        let _outer = outer.enter(None).unwrap();
        set_error(28);
        set_error_text(b"outer");
        {
            let inner = Frame::new(2, None);
            let _inner = inner.enter(None).unwrap();
            set_error(-5);
            set_error_text(&[b'x'; 5000]);
            note_inner(-7, b"below");
            assert_eq!((inner.code(), inner.text().len()), (-5, TEXT));
            assert_eq!(inner.inner(), (-7, b"below".to_vec()));
        }
        assert_eq!((outer.code(), outer.text()), (-28, b"outer".to_vec()));
        assert_eq!(outer.inner().0, 0);
    }
}
