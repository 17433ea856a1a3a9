//! NBD: our server and our client beside qemu-nbd, nbdkit and libnbd.
//!
//! Servers are processes, ours too, at a Unix socket, with a raw file in memory. They are started
//! anew for each sample, so that none is there while another is measured. Loads are fio's nbd engine,
//! nbdcopy, and [`blast`], a client that sends and receives many requests at a time, since the former
//! two end where libnbd ends. [`mini`] is a server that does the least a server can do: what the
//! sockets of the machine make possible.

mod blast;
mod calls;
mod client;
mod fio;
mod memory;
mod mini;
mod rows;
mod servers;

pub use rows::{ROWS, memory_disks};
pub use servers::Aio;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::qemu::missing;
use crate::work::Res;

/// What a load did.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Requests or bytes a second, as the row has it.
    pub rate: f64,
    /// Requests, all of them, for what the server used in the same time.
    pub ops: f64,
}

/// What others must have installed, and what of it says its version.
const PEERS: [(&str, &str, &str); 5] = [
    ("qemu-nbd", "--version", "qemu-nbd"),
    ("nbdkit", "--version", "nbdkit"),
    ("nbdcopy", "--version", "libnbd"),
    ("fio", "--version", "fio"),
    ("strace", "--version", "strace"),
];

/// The peers with their versions, in one line; an error if one of them is not there.
pub fn look() -> Res<String> {
    let mut found = Vec::new();
    for (program, option, name) in PEERS {
        let out = Command::new(program)
            .arg(option)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| missing(program, &e))?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        // "nbdkit 1.32.5", "fio-3.33", "qemu-nbd 10.0.2 (Debian …)", "strace -- version 6.1".
        let number = said
            .split(|c: char| c.is_whitespace() || c == '-')
            .find(|w| w.starts_with(|c: char| c.is_ascii_digit()) && w.contains('.'));
        found.push(format!("{name} {}", number.unwrap_or("unknown")));
    }
    Ok(found.join(" · "))
}

/// What this program does when it was started by itself, to serve or to be counted.
pub fn part(args: &[OsString]) -> Option<Res<()>> {
    let text = |i: usize| args.get(i).map(|a| a.to_string_lossy().into_owned()).unwrap_or_default();
    if ["--nbd-serve", "--nbd-mini", "--nbd-client"].contains(&text(0).as_str()) {
        die_with_parent();
    }
    match text(0).as_str() {
        "--nbd-serve" => Some(servers::serve(&text(1), &text(2), &text(3), text(4) == "rw")),
        "--nbd-mini" => Some(mini::serve(text(1).as_ref(), text(2).as_ref(), text(3) == "rw")),
        "--nbd-blast" => Some(blast::by_hand(text(1).as_ref(), &text(2), &text(3), &text(4))),
        "--nbd-client" => Some(client::requests(&text(1), &text(2), &text(3))),
        _ => None,
    }
}

/// Set that the program dies with this one, hears signals though we wait for them elsewhere, and may
/// be looked into by strace.
fn with_us(command: &mut Command) -> &mut Command {
    let prepare = || {
        die_with_parent();
        // SAFETY: a set on the stack, filled before it is used; and a call that only sets a number.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            // An error where no rule forbids it anyway.
            libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
        }
        Ok(())
    };
    // SAFETY: only system calls that are allowed between fork and exec.
    unsafe { command.pre_exec(prepare) }
}

/// Be killed when the one that started this process ends.
fn die_with_parent() {
    // SAFETY: only sets a number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// A process of ours, killed when it is not needed any more.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Run a load to its end; what it printed.
fn output(command: &mut Command) -> Res<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = with_us(command).stdin(Stdio::null()).output().map_err(|e| missing(&program, &e))?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        false => Err(format!("{program} failed: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}
