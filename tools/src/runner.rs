//! `qblk serve --run`: a command that has the server to itself.

use std::ffi::OsStr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use crate::failure::{Failure, Result};
use crate::place::Place;
use crate::signals::Held;

/// Run `command` in a shell until it ends, and pass on the signals that reach us; answers its exit
/// status, 128 + N if signal N ended it.
pub fn run(command: &OsStr, uri: &str, place: &Place, held: &Held) -> Result<u8> {
    let before = held.before();
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).env("uri", uri);
    match place.socket() {
        Some(path) => shell.env("unixsocket", path),
        // One that we were started with means another server.
        None => shell.env_remove("unixsocket"),
    };
    // SAFETY: only what may be called in a child of fork. The command is to begin with the signals
    // that we began with.
    unsafe {
        shell.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
            Ok(())
        });
    }
    let failed = |e: std::io::Error| Failure::io("/bin/sh", &e);
    let mut child = shell.spawn().map_err(failed)?;
    loop {
        let came = held.wait();
        if came.signal != libc::SIGCHLD {
            if !came.from_terminal {
                // SAFETY: a child that was not waited for, so the number is still its own.
                unsafe { libc::kill(child.id() as i32, came.signal) };
            }
            continue;
        }
        if let Some(status) = child.try_wait().map_err(failed)? {
            let ended = status.signal().map(|signal| 128 + signal);
            return Ok(status.code().or(ended).unwrap_or(1) as u8);
        }
    }
}
