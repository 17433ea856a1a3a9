//! What the tests share: a directory that goes away, numbers that can be had again, the peers.
// Each test program uses some of it.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod disk;
pub mod workload;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use qblk::block::{Iov, Src};
use qblk::{Error, Extent, Image, OpenFlags, Options, ReqFlags};

pub const RW: OpenFlags = OpenFlags::RDWR;
pub const RO: OpenFlags = OpenFlags(0);
pub const NONE: ReqFlags = ReqFlags::NONE;

/// A directory of its own, removed at the end (kept if the test fails and `QBLK_TEST_KEEP` is set).
pub struct Tmp(PathBuf);

impl Tmp {
    pub fn new(what: &str) -> Self {
        Self::under(&std::env::temp_dir(), what)
    }

    /// In memory, for tests that make many images and sync often.
    pub fn in_memory(what: &str) -> Self {
        let shm = Path::new("/dev/shm");
        if shm.is_dir() { Self::under(shm, what) } else { Self::new(what) }
    }

    pub fn under(dir: &Path, what: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Relaxed);
        let path = dir.join(format!("qblk-{what}-{}-{n}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Tmp {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("QBLK_TEST_KEEP").is_some() {
            eprintln!("kept: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// SplitMix64: the same numbers from the same seed, everywhere.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    /// Once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Bytes that tell by themselves when they are in the wrong place.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(n + 8);
        let mut x = self.next() | 0x0101_0101_0101_0101;
        while out.len() < n {
            x = x.wrapping_mul(0xd129_0d3d_3b1a_25b5).wrapping_add(1);
            out.extend_from_slice(&(x ^ (x >> 29)).to_le_bytes());
        }
        out.truncate(n);
        out
    }
}

/// The seed of this run: `QBLK_TEST_SEED`, or the time. Printed, so that a failure can be had again.
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("QBLK_TEST_SEED") {
        Ok(s) => s.parse().unwrap_or_else(|_| panic!("QBLK_TEST_SEED={s}: expected a number")),
        Err(_) => {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros()
                as u64
        }
    };
    eprintln!("{test}: QBLK_TEST_SEED={seed}");
    seed
}

/// How long a random test runs: `QBLK_TEST_SECONDS`, or `default`.
pub fn deadline(default: u64) -> Instant {
    let seconds = match std::env::var("QBLK_TEST_SECONDS") {
        Ok(s) => s.parse().unwrap_or_else(|_| panic!("QBLK_TEST_SECONDS={s}: expected a number")),
        Err(_) => default,
    };
    Instant::now() + Duration::from_secs(seconds)
}

/// Run a peer; whether it succeeded is the caller's to judge.
pub fn run(program: &str, args: &[&dyn AsRef<OsStr>]) -> Output {
    let args: Vec<&OsStr> = args.iter().map(|a| a.as_ref()).collect();
    match Command::new(program).args(&args).output() {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => match program {
            "qemu-img" | "qemu-io" => panic!("install qemu-utils (apt-get install qemu-utils)"),
            "mkfs.ext4" => panic!("install e2fsprogs (apt-get install e2fsprogs)"),
            "sfdisk" => panic!("install fdisk (apt-get install fdisk)"),
            "sgdisk" => panic!("install gdisk (apt-get install gdisk)"),
            "mount" | "umount" => panic!("install mount (apt-get install mount)"),
            _ => panic!("{program} is missing"),
        },
        Err(e) => panic!("{program}: {e}"),
    }
}

/// Tell whoever runs the tests, also where they pass, what they have tried.
pub fn say(text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // Not by the macros: what those print is shown for tests that fail.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

fn told(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

/// Run a peer that must succeed; what it printed.
pub fn run_ok(program: &str, args: &[&dyn AsRef<OsStr>]) -> String {
    let out = run(program, args);
    let shown: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
    assert!(out.status.success(), "{program} {}: {}\n{}", shown.join(" "), out.status, told(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// `qemu-img`, which must succeed.
macro_rules! qemu_img {
    ($($arg:expr),+ $(,)?) => {
        $crate::common::run_ok("qemu-img", &[$(&$arg as &dyn AsRef<std::ffi::OsStr>),+])
    };
}
pub(crate) use qemu_img;

/// `qemu-io` commands on an image, which must succeed.
pub fn qemu_io(image: &Path, format: &str, commands: &[&str]) -> String {
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &format];
    for c in commands {
        args.push(&"-c");
        args.push(c);
    }
    args.push(&image);
    let out = run_ok("qemu-io", &args);
    // It says so and exits with 0.
    assert!(!out.contains("failed"), "qemu-io {commands:?}: {out}");
    out
}

/// Neither corruptions nor leaks.
pub fn check_clean(image: &Path) {
    let out = run("qemu-img", &[&"check", &"-f", &"qcow2", &image]);
    assert!(out.status.code() == Some(0), "qemu-img check {}: {}", image.display(), told(&out));
}

/// No corruptions; leaks are allowed (as after a crash).
pub fn check_no_corruption(image: &Path) {
    let out = run("qemu-img", &[&"check", &"-f", &"qcow2", &image]);
    let fine = matches!(out.status.code(), Some(0 | 3));
    assert!(fine, "qemu-img check {}: {}", image.display(), told(&out));
}

/// [`check_no_corruption`] of an image with another data file than it names.
pub fn check_no_corruption_with(image: &Path, data: &Path) {
    let opts = format!(
        "driver=qcow2,file.driver=file,file.filename={},data-file.driver=file,data-file.filename={}",
        image.display(),
        data.display()
    );
    let out = run("qemu-img", &[&"check", &"--image-opts", &opts]);
    let fine = matches!(out.status.code(), Some(0 | 3));
    assert!(fine, "qemu-img check {}: {}", image.display(), told(&out));
}

/// The image and the bytes are the same, size and all.
pub fn check_same(image: &Path, format: &str, bytes: &[u8], scratch: &Path) {
    fs::write(scratch, bytes).unwrap();
    let args: [&dyn AsRef<OsStr>; 7] =
        [&"compare", &"-f", &format, &"-F", &"raw", &image, &scratch];
    let out = run("qemu-img", &args);
    let text = told(&out);
    // Not -s: sizes that are no multiple of 512 are rounded by qemu, differently for each format.
    assert!(out.status.code() == Some(0), "qemu-img compare {}: {text}", image.display());
}

pub fn open(path: &Path, flags: OpenFlags) -> Image {
    try_open(path, flags).unwrap_or_else(|e| panic!("open {}: {e}", path.display()))
}

pub fn try_open(path: &Path, flags: OpenFlags) -> Result<Image, Error> {
    Image::open(path.as_os_str(), &Options::new(), flags)
}

pub fn open_with(path: &Path, options: &Options, flags: OpenFlags) -> Image {
    Image::open(path.as_os_str(), options, flags)
        .unwrap_or_else(|e| panic!("open {}: {e}", path.display()))
}

pub fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().fold(Options::new(), |o, (k, v)| o.with(k, v))
}

/// The error of opening, which must fail.
pub fn open_error(path: &Path, opts: &Options, flags: OpenFlags) -> Error {
    match Image::open(path.as_os_str(), opts, flags) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(e) => e,
    }
}

pub fn create(path: &Path, format: &str, size: u64, pairs: &[(&str, &str)]) {
    qblk::image::create(path.as_os_str(), format, size, &options(pairs))
        .unwrap_or_else(|e| panic!("create {} {size} {pairs:?}: {e}", path.display()));
}

pub fn read_all(image: &Image) -> Vec<u8> {
    let mut out = vec![0xee; image.size().unwrap() as usize];
    image.read_at(&mut out, 0).unwrap_or_else(|e| panic!("read: {e}"));
    out
}

pub fn read_range(image: &Image, offset: u64, count: u64) -> Vec<u8> {
    let mut out = vec![0xee; count as usize];
    image.read_at(&mut out, offset).unwrap_or_else(|e| panic!("read {count}@{offset}: {e}"));
    out
}

/// Pieces of memory for a vectored call, cut at random places.
pub fn scatter(rng: &mut Rng, base: *mut u8, len: usize) -> Vec<libc::iovec> {
    let mut vecs = Vec::new();
    let mut at = 0;
    while at < len {
        let n = match rng.below(4) {
            0 => rng.below(16) as usize,
            1 => rng.below(5000) as usize,
            2 => 512,
            _ => rng.below(len as u64 + 1) as usize,
        }
        .min(len - at);
        // SAFETY: `at` stays within `len`.
        vecs.push(libc::iovec { iov_base: unsafe { base.add(at) }.cast(), iov_len: n });
        at += n;
        if vecs.len() > 900 {
            // SAFETY: as above.
            let iov_base = unsafe { base.add(at) }.cast();
            vecs.push(libc::iovec { iov_base, iov_len: len - at });
            break;
        }
    }
    vecs
}

/// Write from scattered memory.
pub fn write_scattered(
    image: &Image,
    rng: &mut Rng,
    data: &[u8],
    offset: u64,
    flags: ReqFlags,
) -> Result<(), Error> {
    let vecs = scatter(rng, data.as_ptr().cast_mut(), data.len());
    // SAFETY: the pieces are `data`, which outlives the call.
    let src: Src<'_> = unsafe { Iov::from_raw(&vecs, data.len()) };
    image.write(src, offset, flags)
}

/// Read into scattered memory.
pub fn read_scattered(image: &Image, rng: &mut Rng, offset: u64, count: u64) -> Vec<u8> {
    let mut out = vec![0xee; count as usize];
    let vecs = scatter(rng, out.as_mut_ptr(), out.len());
    // SAFETY: the pieces are `out`, which outlives the call.
    image.read(unsafe { Iov::from_raw(&vecs, out.len()) }, offset).unwrap();
    out
}

/// All extents of a range, asked for in small bites; they must cover it without a gap.
pub fn all_extents(image: &Image, offset: u64, count: u64, bite: usize) -> Vec<Extent> {
    let mut all: Vec<Extent> = Vec::new();
    let (mut at, end) = (offset, offset + count);
    while at < end {
        let mut some = vec![Extent::default(); bite];
        let n = image.extents(at, end - at, &mut some).unwrap_or_else(|e| panic!("extents: {e}"));
        let n = n.min(bite);
        assert!(n > 0, "no extent at {at}, {} bytes before the end", end - at);
        for e in &some[..n] {
            assert_eq!(e.offset, at, "extents follow one another");
            assert!(
                e.length > 0 && e.offset + e.length <= end,
                "an extent leaves the range: {e:?}"
            );
            assert_eq!(e.reserved, [0; 16]);
            at += e.length;
            all.push(*e);
        }
    }
    all
}

/// Put bytes into a file.
pub fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Take bytes from a file.
pub fn peek(path: &Path, offset: u64, count: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut out = vec![0; count];
    fs::File::open(path).unwrap().read_exact_at(&mut out, offset).unwrap();
    out
}

pub fn peek_u32(path: &Path, offset: u64) -> u32 {
    u32::from_be_bytes(peek(path, offset, 4).try_into().unwrap())
}

pub fn peek_u64(path: &Path, offset: u64) -> u64 {
    u64::from_be_bytes(peek(path, offset, 8).try_into().unwrap())
}

/// The first place where two equally long runs of bytes differ, told usefully.
pub fn assert_same(found: &[u8], expected: &[u8], base: u64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        let run = (i..found.len()).take_while(|&j| found[j] != expected[j]).count();
        let to = (i + 16).min(found.len());
        panic!(
            "{what}: {run} bytes differ from offset {} on: found {:02x?}, expected {:02x?}",
            base + i as u64,
            &found[i..to],
            &expected[i..to]
        );
    }
}

/// Bytes of the host that a file takes.
pub fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

/// Fail, and say how to help, unless this is root.
pub fn need_root(why: &str) {
    // SAFETY: asks for a number.
    let uid = unsafe { libc::geteuid() };
    assert!(uid == 0, "run the tests as root: {why}");
}

/// Messages of level error that the library could tell nobody else: in a test on a sound image
/// there must be none.
pub fn watch_log() {
    qblk::log::set_sink(
        Some(Box::new(|level, text| {
            if level == qblk::log::Level::Error {
                LOGGED.lock().unwrap().push(text.to_owned());
            }
        })),
        1,
    );
}

static LOGGED: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

pub fn assert_nothing_logged() {
    assert_nothing_logged_of("");
}

/// Of a file, by a part of its name: other tests of the program may log, too.
pub fn assert_nothing_logged_of(file: &str) {
    let mut logged = std::mem::take(&mut *LOGGED.lock().unwrap());
    logged.retain(|text| text.contains(file));
    assert!(logged.is_empty(), "the library logged errors: {logged:#?}");
}
