//! Two hosts with a cable between them: network namespaces that go away with the test.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::common::*;
use super::peers::*;

/// Address of the host that serves.
pub const SERVER: &str = "10.213.7.1";

/// Two network namespaces. They have no name: they are there as long as their descriptors are.
pub struct Network {
    client: OwnedFd,
    server: OwnedFd,
}

/// A network namespace of its own for this thread; `None` makes a new one.
fn enter(net: Option<&OwnedFd>) -> std::io::Result<()> {
    // SAFETY: system calls that concern this thread only.
    let rc = unsafe {
        match net {
            Some(fd) => libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET),
            None => libc::unshare(libc::CLONE_NEWNET),
        }
    };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn make() -> OwnedFd {
    let made = std::thread::spawn(|| {
        enter(None).unwrap_or_else(|e| panic!("a network namespace: {e}"));
        File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    made.join().unwrap()
}

impl Network {
    pub fn new() -> Self {
        need_root("network namespaces");
        let net = Self { client: make(), server: make() };
        let other = format!("/proc/{}/fd/{}", std::process::id(), net.server.as_raw_fd());
        net.ip(
            false,
            &["link", "add", "qv0", "type", "veth", "peer", "name", "qv1", "netns", &other],
        );
        for (server, dev, address) in
            [(false, "qv0", "10.213.7.2/30"), (true, "qv1", "10.213.7.1/30")]
        {
            net.ip(server, &["address", "add", address, "dev", dev]);
            net.ip(server, &["link", "set", "lo", "up"]);
            net.ip(server, &["link", "set", dev, "up"]);
        }
        net
    }

    /// Have a command run on one of the hosts.
    fn place(&self, server: bool, command: &mut Command) {
        let fd = if server { &self.server } else { &self.client }.as_raw_fd();
        // SAFETY: one system call, on a descriptor that is open until the command has been started.
        unsafe {
            command.pre_exec(move || match libc::setns(fd, libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }

    fn ip(&self, server: bool, args: &[&str]) {
        let args_os: Vec<&dyn AsRef<OsStr>> = args.iter().map(|a| a as &dyn AsRef<OsStr>).collect();
        let mut command = command("ip", &args_os);
        self.place(server, &mut command);
        let out = command.output().unwrap_or_else(|e| panic!("ip (apt-get install iproute2): {e}"));
        assert!(out.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Pull the cable at the server's end, or put it in again: nobody is told.
    pub fn cut(&self, yes: bool) {
        self.ip(true, &["link", "set", "qv1", if yes { "down" } else { "up" }]);
    }

    /// nbdkit on the server's host, at port 10809.
    pub fn nbdkit(&self, dir: &Tmp, args: &[&dyn AsRef<OsStr>]) -> Daemon {
        let pid = dir.join("net.pid");
        let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &"-P", &pid, &"-i", &SERVER];
        all.extend(args);
        self.start("nbdkit", &all, &pid)
    }

    fn start(&self, program: &str, args: &[&dyn AsRef<OsStr>], ready: &Path) -> Daemon {
        let mut command = command(program, args);
        self.place(true, &mut command);
        Daemon::start_command(command, ready)
    }

    /// Do something as the server's host: sockets made there belong to it.
    pub fn as_server<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(Some(&self.server)).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// Do the test as the client's host, in a thread of its own.
    pub fn as_client(&self, test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(Some(&self.client)).unwrap();
                test();
            });
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }
}
