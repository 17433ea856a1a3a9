//! A source that writes down every call that a layer makes below it: `open 1 rw`, `1 write 0+4096 FUA`,
//! `1 flush`, `close 1`. Contexts share one memory; any call can be made to fail.

// Each layer's tests use some of it.
#![allow(dead_code)]

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use qblk::block::*;
use qblk::layer::{Settings, Source, find};

/// What the contexts of a source share.
pub struct Recorder {
    name: Name,
    caps: Caps,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<String>,
    contexts: usize,
    /// What of each byte is further down, and not here: 0 nothing, else flags of an extent; empty: all is
    /// here.
    lower: Vec<u32>,
    /// Calls that fail: what they begin with (without the number of the context), the error number, and
    /// how often.
    fail: Vec<(String, i32, usize)>,
    /// Calls that wait, by what they begin with, how many do, and how many do at most.
    hold: Option<String>,
    held: usize,
    most: usize,
}

/// Everything natively.
pub fn able() -> Caps {
    Caps {
        fua: true,
        zero_fua: true,
        trim_fua: true,
        trim: true,
        zero: true,
        cache: true,
        extents: true,
        ..Caps::default()
    }
}

impl State {
    fn is_here(&mut self, offset: u64, count: u64) {
        if !self.lower.is_empty() {
            self.lower[offset as usize..(offset + count) as usize].fill(0);
        }
    }
}

impl Recorder {
    /// A source of `size` bytes, counting up, that can do `caps`.
    pub fn new(size: usize, caps: Caps) -> Arc<Self> {
        let bytes = (0..size).map(|i| (i % 251) as u8).collect();
        Arc::new(Self {
            name: "below".into(),
            caps,
            state: Mutex::new(State { bytes, ..State::default() }),
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was called since this was last asked.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }

    /// The bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Let a range lie one image further down, as flags of an extent say, until it is written or zeroed.
    pub fn lower(&self, from: usize, to: usize, flags: u32) {
        let mut state = self.state();
        let size = state.bytes.len();
        state.lower.resize(size, 0);
        state.lower[from..to].fill(flags | 1 << 16);
    }

    /// Let the first bytes be these.
    pub fn set_bytes(&self, bytes: &[u8]) {
        self.state().bytes[..bytes.len()].copy_from_slice(bytes);
    }

    /// Let the next `times` calls that begin with `what` ("write", "read 512+") fail.
    pub fn fail(&self, what: &str, errno: i32, times: usize) {
        self.state().fail.push((what.to_owned(), errno, times));
    }

    /// Let nothing fail any more.
    pub fn forgive(&self) {
        self.state().fail.clear();
    }

    /// Let calls that begin with `what` wait, once they are written down, until [`Recorder::release`].
    pub fn hold(&self, what: &str) {
        self.hold_most(what, usize::MAX);
    }

    /// The same for the first such call alone.
    pub fn hold_first(&self, what: &str) {
        self.hold_most(what, 1);
    }

    fn hold_most(&self, what: &str, most: usize) {
        let mut state = self.state();
        (state.hold, state.most) = (Some(what.to_owned()), most);
    }

    /// Wait until so many calls wait.
    pub fn wait_held(&self, calls: usize) {
        let mut state = self.state();
        while state.held < calls {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No call waits any more.
    pub fn release(&self) {
        self.state().hold = None;
        self.changed.notify_all();
    }

    fn note(&self, context: usize, what: String) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.log.push(format!("{context} {what}"));
        let most = state.most;
        if state.hold.as_ref().is_some_and(|h| what.starts_with(h)) && state.held < most {
            state.held += 1;
            self.changed.notify_all();
            while state.hold.as_ref().is_some_and(|h| what.starts_with(h)) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.held -= 1;
        }
        if let Some(f) = state.fail.iter_mut().find(|f| f.2 > 0 && what.starts_with(&f.0)) {
            f.2 -= 1;
            return Err(Error::Os {
                op: "a call that is to fail",
                file: self.name.clone(),
                errno: f.1,
            });
        }
        Ok(state)
    }
}

fn flags(flags: ReqFlags) -> String {
    let all = [
        (ReqFlags::FUA, " FUA"),
        (ReqFlags::MAY_TRIM, " MAY_TRIM"),
        (ReqFlags::FAST_ZERO, " FAST"),
    ];
    all.iter().filter(|f| flags.has(f.0)).map(|f| f.1).collect()
}

/// [`Recorder`] as what a layer stands on.
pub struct Below(pub Arc<Recorder>);

impl Source for Below {
    fn name(&self) -> &Name {
        &self.0.name
    }
    fn can_write(&self) -> bool {
        !self.0.caps.read_only
    }
    fn open(&self, write: bool) -> Result<Device> {
        let mut state = self.0.state();
        if write && self.0.caps.read_only {
            return Err(Error::ReadOnly(self.0.name.clone()));
        }
        state.contexts += 1;
        let number = state.contexts;
        state.log.push(format!("open {number} {}", if write { "rw" } else { "ro" }));
        if let Some(f) = state.fail.iter_mut().find(|f| f.2 > 0 && "open".starts_with(&f.0)) {
            f.2 -= 1;
            return Err(Error::Os { op: "open", file: self.0.name.clone(), errno: f.1 });
        }
        let caps = Caps { read_only: !write, ..self.0.caps.clone() };
        Ok(Device::new(Box::new(Context { recorder: self.0.clone(), caps, number })))
    }
    fn reopen(&self) -> Result<()> {
        self.0.note(0, "reopen".into()).map(drop)
    }
    fn handle(&self, _write: bool) -> Result<Box<dyn Any + Send>> {
        Err(Error::NotSupported("handles"))
    }
}

struct Context {
    recorder: Arc<Recorder>,
    caps: Caps,
    number: usize,
}

impl Context {
    fn note(&self, what: String) -> Result<MutexGuard<'_, State>> {
        self.recorder.note(self.number, what)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.recorder.state().log.push(format!("close {}", self.number));
    }
}

impl Driver for Context {
    fn name(&self) -> &Name {
        &self.recorder.name
    }
    fn kind(&self) -> &'static str {
        "recorder"
    }
    fn caps(&self) -> Caps {
        self.caps.clone()
    }
    fn size(&self) -> u64 {
        self.recorder.state().bytes.len() as u64
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let state = self.note(format!("read {offset}+{}", buf.len()))?;
        buf.copy_from(&state.bytes[offset as usize..]);
        Ok(())
    }
    fn write(&self, buf: Src<'_>, offset: u64, f: ReqFlags) -> Result<()> {
        let mut state = self.note(format!("write {offset}+{}{}", buf.len(), flags(f)))?;
        buf.copy_to(&mut state.bytes[offset as usize..]);
        state.is_here(offset, buf.len() as u64);
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        self.note("flush".into()).map(drop)
    }
    fn flush_to_close(&self) -> Result<()> {
        self.note("flush to close".into()).map(drop)
    }
    fn zero(&self, offset: u64, count: u64, f: ReqFlags) -> Result<()> {
        let mut state = self.note(format!("zero {offset}+{count}{}", flags(f)))?;
        state.bytes[offset as usize..(offset + count) as usize].fill(0);
        state.is_here(offset, count);
        Ok(())
    }
    fn trim(&self, offset: u64, count: u64, f: ReqFlags) -> Result<()> {
        self.note(format!("trim {offset}+{count}{}", flags(f))).map(drop)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.note(format!("cache {offset}+{count}")).map(drop)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let state = self.note(format!("extents {offset}+{count}"))?;
        if state.lower.is_empty() {
            out.push(Extent::new(offset, count, Extent::ALLOCATED | Extent::DATA));
            return Ok(());
        }
        for at in offset..offset + count {
            out.push(match state.lower[at as usize] {
                0 => Extent::new(at, 1, Extent::ALLOCATED | Extent::DATA | Extent::OWNED),
                flags => Extent { depth: 1, ..Extent::new(at, 1, flags & 0x8000_ffff) },
            });
        }
        Ok(())
    }
}

/// A layer of that name and settings ("key=value") on a recorder, with its emulation, as a stack has it.
pub fn on(
    recorder: &Arc<Recorder>,
    name: &str,
    settings: &[(&str, &str)],
    write: bool,
) -> Result<Device> {
    let kind = find(name).unwrap_or_else(|| panic!("no layer {name}"));
    let mut all = Settings::new(name);
    settings.iter().for_each(|(k, v)| all.set(k, v.as_bytes()));
    all.check(kind.keys)?;
    let below = write && (kind.writes_below)(&all)?;
    assert!(!below || !recorder.caps.read_only, "the stack would have refused this");
    Ok(Device::new((kind.open)(&all, Arc::new(Below(recorder.clone())), write)?))
}
