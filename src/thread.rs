//! Threads of the library's own, of which there are few: see docs/architecture.md.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// Do `work` in a thread that is deaf to all signals: they are the host program's. `stack` is in bytes;
/// without it the thread gets the usual size, for work that is not only ours.
pub(crate) fn spawn(
    name: &str,
    stack: Option<usize>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let builder = Builder::new().name(name.into());
    let builder = stack.into_iter().fold(builder, Builder::stack_size);
    deaf(|| builder.spawn(work))
}

/// Make a thread by `make` so that it is deaf to all signals.
pub(crate) fn deaf<T>(make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: both calls fill the sets that they are given. A thread begins with the mask of the one
    // that makes it.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
    }
    let made = make();
    // SAFETY: `old` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), std::ptr::null_mut()) };
    made
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_thread_hears_no_signal_and_its_maker_still_does() {
        let blocked = || {
            // SAFETY: a set of zeroes is a valid one, and the call fills it.
            unsafe {
                let mut now: libc::sigset_t = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &raw mut now);
                libc::sigismember(&raw const now, libc::SIGTERM) == 1
            }
        };
        let (tell, told) = std::sync::mpsc::channel();
        let thread = super::spawn("qblk-test", None, move || tell.send(blocked()).unwrap());
        thread.unwrap().join().unwrap();
        assert!(told.recv().unwrap());
        assert!(!blocked());
    }
}
