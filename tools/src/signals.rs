//! Signals that ask the process to end: caught where something has to be tidied up first.

use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

/// The first signal that asked us to end; 0 = none did.
static ASKED: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: i32) {
    let _ = ASKED.compare_exchange(0, signal, Relaxed, Relaxed);
}

/// From now on, SIGINT, SIGTERM and SIGHUP are only noted, each once: a second one ends the process as
/// it always does, so that nobody is held by a disk that hangs.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: sigaction is plain data for which all zeroes are valid; `note` only touches an
        // atomic, which a signal handler may.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut old);
            // What was ignored when we were started (nohup) is to stay so.
            if old.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = note as extern "C" fn(i32) as libc::sighandler_t;
            new.sa_flags = libc::SA_RESTART | libc::SA_RESETHAND;
            libc::sigaction(signal, &new, std::ptr::null_mut());
        }
    }
}

/// Signals that ask the process to end, held back until somebody waits for them.
pub struct Held {
    set: libc::sigset_t,
    before: libc::sigset_t,
}

/// A signal that came.
pub struct Came {
    pub signal: i32,
    /// From the terminal, which sends it to all that run in it: our children have it, too.
    pub from_terminal: bool,
}

impl Held {
    /// Hold SIGINT, SIGTERM and SIGHUP back, and SIGCHLD. Threads that this one makes do the same.
    pub fn new() -> Self {
        // SAFETY: signal sets and sigaction are plain data for which all zeroes are valid, and all
        // of them are ours.
        unsafe {
            let mut held: Self = std::mem::zeroed();
            libc::sigemptyset(&mut held.set);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut old);
                // What was ignored when we were started (nohup) is to stay so.
                if old.sa_sigaction != libc::SIG_IGN {
                    libc::sigaddset(&mut held.set, signal);
                }
            }
            // Children of a process that ignores it can not be waited for.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::sigaddset(&mut held.set, libc::SIGCHLD);
            libc::pthread_sigmask(libc::SIG_BLOCK, &held.set, &mut held.before);
            held
        }
    }

    /// Wait for the next.
    pub fn wait(&self) -> Came {
        loop {
            // SAFETY: as above.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            // SAFETY: as above.
            let signal = unsafe { libc::sigwaitinfo(&self.set, &mut info) };
            // It is interrupted when the process is stopped and goes on.
            if signal > 0 {
                return Came { signal, from_terminal: info.si_code == libc::SI_KERNEL };
            }
        }
    }

    /// The signals that were held back before, for a child to begin with.
    pub fn before(&self) -> libc::sigset_t {
        self.before
    }

    /// From now on they do what they always do: end the process.
    pub fn release(self) {
        // SAFETY: as above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// Ignore `signal`.
pub fn ignore(signal: i32) {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// The signal that asked us to end, if one did.
pub fn asked_to_end() -> Option<i32> {
    match ASKED.load(Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}

/// What a signal means, for people.
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "interrupted",
        libc::SIGTERM => "terminated",
        libc::SIGHUP => "terminal closed",
        _ => "ended by a signal",
    }
}
