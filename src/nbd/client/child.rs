//! A server that is started for one device: over its standard input and output, or handed a listening
//! socket as systemd does (sd_listen_fds(3)).

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::time::{Duration, Instant};

use crate::block::{Error, Name, Result, quoted};
use crate::nbd::uri::MAX_SOCKET_PATH;

/// How long a server may take to end, at each of: by itself, at SIGTERM.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at whether it has.
const LOOK: Duration = Duration::from_millis(5);
/// The descriptor of the first socket that systemd hands over.
const LISTEN_FD: i32 = 3;

/// A server process, and the directory of its socket.
pub(super) struct Child {
    process: Option<process::Child>,
    dir: Option<Dir>,
}

/// A private directory, removed when dropped.
pub(super) struct Dir(pub PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        // What is left of it is the socket. Failing changes nothing for anybody.
        let _ = std::fs::remove_file(self.0.join("sock"));
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Dir {
    pub(super) fn new(name: &Name) -> Result<Self> {
        let mut template = std::env::temp_dir().into_os_string().into_encoded_bytes();
        // A socket's address has no room for more.
        if template.len() + "/qblk-XXXXXX/sock".len() > MAX_SOCKET_PATH {
            template = b"/tmp".to_vec();
        }
        template.extend(b"/qblk-XXXXXX\0");
        // SAFETY: a NUL-terminated template of ours, changed in place; the directory is made for
        // this user alone.
        if unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) }.is_null() {
            let what = "making a directory for a socket".to_owned();
            return Err(failed(name, what, std::io::Error::last_os_error()));
        }
        template.pop();
        // SAFETY: the bytes came from an OsString; mkdtemp changed ASCII letters only.
        Ok(Self(unsafe { OsString::from_encoded_bytes_unchecked(template) }.into()))
    }
}

fn failed(name: &Name, what: String, e: std::io::Error) -> Error {
    Error::net(name, what, e.raw_os_error().unwrap_or(libc::EIO))
}

fn program<'a>(argv: &'a [OsString], name: &Name) -> Result<(&'a OsStr, &'a [OsString])> {
    match argv.split_first() {
        Some((program, args)) => Ok((program, args)),
        None => Err(Error::invalid(format!("{name}: no command is given"))),
    }
}

impl Child {
    /// Start a server that talks over its standard input and output.
    pub(super) fn over_stdio(argv: &[OsString], name: &Name) -> Result<(Self, OwnedFd)> {
        let (program, args) = program(argv, name)?;
        let what = || format!("starting {}", quoted(program.as_encoded_bytes()));
        let (ours, theirs) = UnixStream::pair().map_err(|e| failed(name, what(), e))?;
        let again = theirs.try_clone().map_err(|e| failed(name, what(), e))?;
        let process = Command::new(program)
            .args(args)
            .stdin(OwnedFd::from(theirs))
            .stdout(OwnedFd::from(again))
            .spawn()
            .map_err(|e| failed(name, what(), e))?;
        Ok((Self { process: Some(process), dir: None }, ours.into()))
    }

    /// Start a server that is handed a listening socket; the socket's path.
    pub(super) fn activated(argv: &[OsString], name: &Name) -> Result<(Self, PathBuf)> {
        let (program, args) = program(argv, name)?;
        let what = || format!("starting {}", quoted(program.as_encoded_bytes()));
        let dir = Dir::new(name)?;
        let path = dir.0.join("sock");
        let listener = UnixListener::bind(&path).map_err(|e| failed(name, what(), e))?;
        let process =
            spawn_activated(program, args, &listener).map_err(|e| failed(name, what(), e))?;
        Ok((Self { process: Some(process), dir: Some(dir) }, path))
    }

    /// How the server has ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.process.as_mut()?.try_wait().ok()??;
        Some(match (status.code(), status.signal()) {
            (Some(code), _) => format!("has ended with status {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "has ended".to_owned(),
        })
    }

    /// Have the server end: it may do so by itself, its connection being gone; if not, it is asked
    /// to, and then made to.
    pub(super) fn end(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        // A server that listens waits for more connections: only one on stdio ends by itself.
        let mut gone = self.dir.is_none() && ends(&mut process);
        if !gone {
            // SAFETY: the process is our child and was not waited for: the number is still its own.
            unsafe { libc::kill(process.id() as libc::pid_t, libc::SIGTERM) };
            gone = ends(&mut process);
        }
        if !gone {
            let _ = process.kill();
            let _ = process.wait();
        }
        self.dir = None;
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
    }
}

fn ends(process: &mut process::Child) -> bool {
    let until = Instant::now() + PATIENCE;
    loop {
        if !matches!(process.try_wait(), Ok(None)) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}

fn spawn_activated(
    program: &OsStr,
    args: &[OsString],
    listener: &UnixListener,
) -> std::io::Result<process::Child> {
    // LISTEN_PID is the number of the process that gets the socket, which is known only there, where
    // between fork and exec nothing may be allocated: a shell knows its own number, and keeps it when
    // it becomes the server.
    let mut command = Command::new(Path::new("/bin/sh"));
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"])
        .arg(program)
        .args(args)
        .env("LISTEN_FDS", "1")
        .env_remove("LISTEN_FDNAMES")
        .stdin(Stdio::null());
    let fd = listener.as_raw_fd();
    // SAFETY: the closure makes system calls only, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            let rc = if fd == LISTEN_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, LISTEN_FD)
            };
            if rc < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn()
}
