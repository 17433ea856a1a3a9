//! Lock managers: the contract, bad ones, the example, and the one that ships, among several hosts.

mod common;
#[path = "lockmgr/hosts.rs"]
mod hosts;
#[path = "lockmgr/lease.rs"]
mod lease;
#[path = "lockmgr/managers.rs"]
mod managers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::*;
use qblk::block::ErrorKind;
use qblk::{Error, Image, OpenFlags, Options};

/// Compile C sources of the repository, or a text, into a shared object.
pub fn compile(out: &Path, sources: &[PathBuf]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut cc = Command::new(std::env::var("CC").unwrap_or("cc".into()));
    cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
    cc.args(["-fvisibility=default", "-pthread", "-I"]).arg(root.join("include"));
    cc.arg("-o").arg(out).args(sources);
    let out = cc.output().expect("install gcc (apt-get install gcc)");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The manager that ships. Compiled once for each process that asks, or handed down to hosts, which are
/// killed and could not clean up.
pub fn lease_manager() -> &'static Path {
    static MADE: OnceLock<(Option<Tmp>, PathBuf)> = OnceLock::new();
    // Nobody drops a static.
    extern "C" fn remove() {
        if let Some((Some(dir), _)) = MADE.get() {
            let _ = fs::remove_dir_all(dir.path());
        }
    }
    let made = MADE.get_or_init(|| {
        if let Some(given) = std::env::var_os("QBLK_TEST_MANAGER") {
            return (None, given.into());
        }
        let dir = Tmp::new("lease-so");
        // SAFETY: the function needs nothing but the static, which is there to the end.
        unsafe { libc::atexit(remove) };
        let out = dir.join("libqblk-lockmgr-lease.so");
        compile(&out, &[source("lockmgr-lease/lease.c"), source("lockmgr-lease/record.c")]);
        (Some(dir), out)
    });
    &made.1
}

/// Options for a manager, with file locks out of the way.
pub fn managed(manager: &Path, pairs: &[(&str, &str)]) -> Options {
    options(pairs).with("lock-manager", manager.as_os_str().as_encoded_bytes()).with("lock", "off")
}

pub fn open_managed(path: &Path, o: &Options, flags: OpenFlags) -> Result<Image, Error> {
    Image::open(path.as_os_str(), o, flags)
}

pub fn is_locked(result: Result<Image, Error>) -> String {
    match result {
        Ok(_) => panic!("opened, although somebody else has it"),
        Err(e @ Error::Locked { .. }) => e.to_string(),
        Err(e) => panic!("another error: {e}"),
    }
}

/// Wait for something that has to come.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}
