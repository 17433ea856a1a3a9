//! Running the tool and its peer, in a directory of one's own.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A scratch directory; commands run in it, and it goes when the test ends.
pub struct Dir(TempDir);

/// How a command ended.
pub struct Ran {
    pub status: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(o: Output) -> Self {
        let err = String::from_utf8_lossy(&o.stderr).into_owned();
        Self { status: o.status.code(), out: o.stdout, err }
    }
}

impl Ran {
    /// It must have succeeded in silence on stderr: its output as text.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(
            (self.status, &*self.err),
            (Some(0), ""),
            "{}",
            String::from_utf8_lossy(&self.out)
        );
        String::from_utf8(self.out).expect("output is text")
    }

    /// It must have printed JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.good();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// It must have failed with `status`, one message with our name and all of `words` on stderr, and
    /// nothing on stdout.
    #[track_caller]
    pub fn bad(self, status: i32, words: &[&str]) -> String {
        assert_eq!(self.status, Some(status), "{}", self.err);
        assert!(self.err.starts_with("qblk: ") && self.err.ends_with('\n'), "{:?}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in {:?}", self.err);
        }
        assert_eq!(String::from_utf8_lossy(&self.out), "");
        self.err
    }
}

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("qblk-tool-").tempdir().expect("a scratch directory"))
    }

    pub fn path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.0.path().join(name.as_ref())
    }

    /// The tool, to be run here.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qblk"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null()).env_remove("QBLK_LOG");
        let hear = || {
            // SAFETY: a call that is allowed between fork and exec. A shell lets what it runs in the
            // background ignore SIGINT, and that is inherited: an endless copy would have no end.
            unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { command.pre_exec(hear) };
        command
    }

    /// Run the tool.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        self.command(args).output().expect("the tool runs").into()
    }

    /// Run the tool with arguments that have no spaces in them.
    pub fn qblk(&self, line: &str) -> Ran {
        self.run(line.split_whitespace())
    }

    /// Run the tool with `input` on its standard input.
    pub fn with_input(&self, line: &str, input: &[u8]) -> Ran {
        let mut file = tempfile::tempfile().expect("a scratch file");
        std::io::Write::write_all(&mut file, input).expect("input is written");
        std::io::Seek::rewind(&mut file).expect("input is rewound");
        self.command(line.split_whitespace()).stdin(file).output().expect("the tool runs").into()
    }

    /// Run qemu-img; it must succeed.
    #[track_caller]
    pub fn qemu_img(&self, line: &str) -> String {
        let ran = self.try_qemu_img(line);
        assert_eq!(ran.status, Some(0), "qemu-img {line}: {}", ran.err);
        String::from_utf8(ran.out).expect("output is text")
    }

    #[track_caller]
    pub fn try_qemu_img(&self, line: &str) -> Ran {
        let mut command = Command::new("qemu-img");
        command.args(line.split_whitespace()).current_dir(self.0.path());
        match command.output() {
            Ok(output) => output.into(),
            Err(e) => panic!("qemu-img: {e}; this test needs it: apt-get install qemu-utils"),
        }
    }

    pub fn write(&self, name: impl AsRef<OsStr>, bytes: &[u8]) {
        fs::write(self.path(name), bytes).expect("a file is written");
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("a file is read")
    }

    /// A sparse file with pieces of data in it.
    pub fn sparse(&self, name: &str, size: u64, pieces: &[(u64, &[u8])]) {
        use std::os::unix::fs::FileExt;
        let file = fs::File::create(self.path(name)).expect("a file is made");
        file.set_len(size).expect("it has its size");
        for (offset, bytes) in pieces {
            file.write_all_at(bytes, *offset).expect("it has its data");
        }
    }

    pub fn fifo(&self, name: &str) {
        use std::os::unix::ffi::OsStrExt;
        let path = self.path(name);
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("no NUL in it");
        // SAFETY: a NUL-terminated path.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Bytes that a file takes on the disk.
    pub fn on_disk(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).expect("the file is there").blocks() * 512
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("the directory is listed");
        let mut all: Vec<_> =
            entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        all.sort();
        all
    }
}

/// Bytes that look like nothing in particular, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // No zeroes: what is noise is never taken for a hole.
            (state >> 32) as u8 | 1
        })
        .collect()
}
