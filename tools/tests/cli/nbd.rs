//! Servers and their peers, for the tests of `qblk serve` and of NBD names.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::*;

impl Dir {
    /// Run another program here; one that is missing fails the test with the package that has it.
    #[track_caller]
    pub fn peer(&self, package: &str, program: &str, args: &[&str]) -> Ran {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.path("")).stdin(Stdio::null());
        match command.output() {
            Ok(output) => output.into(),
            Err(e) => panic!("{program}: {e}; this test needs it: apt-get install {package}"),
        }
    }

    /// Run nbdinfo; it must succeed.
    #[track_caller]
    pub fn nbdinfo(&self, args: &[&str]) -> String {
        self.peer("libnbd-bin", "nbdinfo", args).good()
    }

    /// Copy with nbdcopy, from and to files and URIs; it must succeed.
    #[track_caller]
    pub fn nbdcopy(&self, from: &str, to: &str) {
        self.peer("libnbd-bin", "nbdcopy", &[from, to]).good();
    }

    /// Start `qblk serve`, and wait until it has said `count` times what it serves where.
    #[track_caller]
    pub fn serve(&self, line: &str, count: usize) -> Served {
        let mut command = self.command(std::iter::once("serve").chain(line.split_whitespace()));
        Served::begin(command.stdout(Stdio::piped()).stderr(Stdio::piped()), count)
    }
}

/// A server that runs; it is ended with the test, however that ends.
pub struct Served {
    child: Option<Child>,
    out: BufReader<ChildStdout>,
    /// What it said.
    pub lines: Vec<String>,
}

impl Served {
    /// Start it, and read `count` lines.
    #[track_caller]
    pub fn begin(command: &mut Command, count: usize) -> Self {
        let mut child = command.spawn().expect("the tool runs");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut served = Self { child: Some(child), out, lines: Vec::new() };
        for _ in 0..count {
            let mut line = String::new();
            if served.out.read_line(&mut line).expect("a line") == 0 {
                panic!("it does not serve: {}", served.wait().err);
            }
            served.lines.push(line.trim_end().to_owned());
        }
        served
    }

    /// The URI in a line.
    pub fn uri(&self, line: usize) -> &str {
        self.lines[line].rsplit(' ').next().expect("a word")
    }

    pub fn signal(&self, signal: i32) {
        let pid = self.child.as_ref().expect("a child").id();
        // SAFETY: the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
    }

    /// Wait for its end: what it wrote since, and what it said.
    pub fn wait(mut self) -> Ran {
        let mut rest = Vec::new();
        self.out.read_to_end(&mut rest).expect("its output");
        let ended = self.child.take().expect("a child").wait_with_output().expect("its end");
        Ran { out: rest, ..ended.into() }
    }

    /// End it with SIGTERM: it must have gone well, in silence.
    #[track_caller]
    pub fn end(self) -> String {
        self.signal(libc::SIGTERM);
        self.wait().good()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Asked first: it may have a directory in /tmp that it removes.
            // SAFETY: the child is ours and has not been waited for.
            unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
            let end = Instant::now() + Duration::from_secs(10);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(2));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
