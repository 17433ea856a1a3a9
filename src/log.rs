//! Messages for whoever runs the program: to a C callback, or to stderr by `QBLK_LOG`.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use parking_lot::RwLock;

/// How grave a message is. The values are those of the C ABI (`QBLK_LOG_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum Level {
    /// Something failed and nobody could be told otherwise.
    Error = 1,
    /// Something is not as it should be.
    Warn = 2,
    /// What is done, once per open or close.
    Info = 3,
    /// Why it is done.
    Debug = 4,
    /// Every request.
    Trace = 5,
}

/// Where messages go.
pub type Sink = Box<dyn Fn(Level, &str) + Send + Sync>;

static SINK: RwLock<Option<Sink>> = RwLock::new(None);
/// The gravest level that is still dropped, plus one; 0 = QBLK_LOG was not looked at yet.
static LEVEL: AtomicI32 = AtomicI32::new(UNSET);
const UNSET: i32 = -1;

/// Send messages up to `level` to `sink`; `None` sends them nowhere.
pub fn set_sink(sink: Option<Sink>, level: i32) {
    LEVEL.store(if sink.is_some() { level } else { 0 }, Relaxed);
    *SINK.write() = sink;
}

fn from_environment() -> i32 {
    let level = match std::env::var_os("QBLK_LOG").as_deref().and_then(|s| s.to_str()) {
        Some("error") => 1,
        Some("warn") => 2,
        Some("info") => 3,
        Some("debug") => 4,
        Some("trace") => 5,
        _ => 0,
    };
    if level > 0 {
        let to_stderr: Sink = Box::new(|level, text| {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "qblk: {level:?}: {text}");
        });
        *SINK.write() = Some(to_stderr);
    }
    LEVEL.store(level, Relaxed);
    level
}

/// Send a message if anyone wants it.
pub fn log(level: Level, args: Arguments<'_>) {
    let wanted = match LEVEL.load(Relaxed) {
        UNSET => from_environment(),
        level => level,
    };
    if (level as i32) <= wanted
        && let Some(sink) = &*SINK.read_recursive()
    {
        sink(level, &args.to_string());
    }
}
