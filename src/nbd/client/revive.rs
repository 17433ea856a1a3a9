//! Making lost connections again: one thread, started by a loss, that ends when all are back, when
//! the time for it is over, or when the device is closed.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::call::Outcome;
use super::handshake::Export;
use super::lane::Lane;
use super::pool::{Pool, State};
use super::rx::Link;
use super::slot::{Memory, Request};
use crate::block::{Error, ErrorKind, OneIov, Result};
use crate::log::{Level, log};
use crate::nbd::proto::{cmd, flag};
use crate::thread;

/// Between two tries: first, and at most.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(10);
pub(super) const LAST_PAUSE: Duration = Duration::from_secs(2);
/// One try to connect and negotiate.
const TRY: Duration = Duration::from_secs(10);

impl Pool {
    /// Have a thread make connections again, if none is at it.
    pub(super) fn start_reviving(&self, state: &mut MutexGuard<'_, State>) {
        let Some(me) = self.me.upgrade() else { return };
        if state.running || self.closing.load(SeqCst) || state.fatal.is_some() {
            return;
        }
        // The last one has said that it is done, and only has to end.
        if let Some(last) = state.thread.take() {
            let _ = last.join();
        }
        match thread::spawn("qblk-nbd", None, move || me.revive()) {
            Ok(thread) => (state.thread, state.running) = (Some(thread), true),
            Err(e) => {
                let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                state.failure = Some(Error::net(self.name(), "starting a thread", errno));
            }
        }
    }

    /// The thread.
    fn revive(self: Arc<Self>) {
        while let Some((lane, end)) = self.next_to_revive() {
            if let Err(e) = self.revive_one(lane, end) {
                log(Level::Info, format_args!("reconnecting: {e}"));
                let mut state = self.state.lock();
                if e.kind() == ErrorKind::Errno(libc::ESTALE) {
                    state.fatal = Some(e.clone());
                }
                state.failure = Some(e);
                state.back_off();
            }
        }
    }

    /// A lane without a connection and until when to try, after the pause that is due; `None` once
    /// there is nothing left to do. That is decided under the lock, so that whoever loses a
    /// connection later starts anew.
    fn next_to_revive(&self) -> Option<(&Lane, Instant)> {
        let mut state = self.state.lock();
        while !self.closing.load(SeqCst)
            && state.fatal.is_none()
            && let Some(left) =
                state.not_before.and_then(|t| t.checked_duration_since(Instant::now()))
            && !left.is_zero()
        {
            self.wait_changed(&mut state, left);
        }
        let window = self.source.settings.reconnect;
        // A try that a call asked for has no window: it is the only one.
        let once = state.since.is_none() && state.failure.is_none();
        let end = state.since.and_then(|t| t.checked_add(window));
        let end = if once { Instant::now().checked_add(TRY) } else { end };
        let lane = self.lanes.iter().find(|l| !l.is_up());
        let stop = self.closing.load(SeqCst) || state.fatal.is_some();
        match (lane, end) {
            (Some(lane), Some(end)) if !stop && Instant::now() < end => Some((lane, end)),
            _ => {
                state.running = false;
                // Those who have waited in vain need not ask at once.
                state.asked = Some(Instant::now());
                drop(state);
                self.changed.notify_all();
                None
            }
        }
    }

    fn revive_one(&self, lane: &Lane, end: Instant) -> Result<()> {
        let end = end.min(Instant::now() + TRY);
        let link = self.another(Some(end))?;
        // Only now: an answer that comes after the new connection was made proves that the server
        // which made it is the one that the old connections are to. Were that one dead, with what it
        // kept in memory, the new connection must not hide it.
        self.prove_survivors();
        self.install(lane, link);
        Ok(())
    }

    /// One more connection, to the same export as ever.
    pub(super) fn another(&self, end: Option<Instant>) -> Result<Link> {
        let mut link = self.source.another(end, Some(self.cancel.clone()))?;
        if let Err(what) = same(&self.export, &mut link.export) {
            let what = format!("the export has changed: {what}");
            return Err(Error::net(self.name(), what, libc::ESTALE));
        }
        Ok(link)
    }

    /// Ask for a byte on each connection that looks alive; those that are not are given up.
    fn prove_survivors(&self) {
        for lane in self.lanes.iter().filter(|l| l.is_up()) {
            let deadline = self.deadline();
            let mut claim = lane.claim(self);
            while claim.is_none() && lane.is_up() && !self.closing.load(SeqCst) {
                // All slots are taken. If the connection is dead, their callers will find out.
                let mut state = self.state.lock();
                self.wait_changed(&mut state, FIRST_PAUSE);
                drop(state);
                claim = lane.claim(self);
            }
            let Some(mut claim) = claim else { continue };
            let mut bytes = vec![0; self.export.minimum as usize];
            let memory = OneIov::dst(&mut bytes);
            let probe = Request {
                kind: cmd::READ,
                flags: 0,
                offset: 0,
                length: self.export.minimum.into(),
                memory: Memory::Into(memory.iov()),
            };
            if self.export.size > 0 && !matches!(claim.exchange(&probe, deadline), Outcome::Over) {
                log(Level::Info, format_args!("{}: another connection is dead too", self.name()));
            }
        }
    }

    /// Give a lane that is down a connection.
    pub(super) fn install(&self, lane: &Lane, link: Link) {
        let mut slots = 0;
        let mut state = self.state.lock();
        loop {
            slots |= lane.collect();
            if slots == u64::MAX {
                break;
            }
            if self.closing.load(SeqCst) {
                lane.give_back(slots);
                return;
            }
            // Callers of the lost connection are about to leave.
            self.wait_changed(&mut state, FIRST_PAUSE);
        }
        // SAFETY: all slots were collected.
        unsafe {
            lane.unlink();
            if self.closing.load(SeqCst) {
                lane.give_back(slots);
                return;
            }
            lane.install(link);
        }
        state.live += 1;
        if state.live > 1 || state.lost.is_some() {
            log(Level::Info, format_args!("{}: {} connections", self.name(), state.live));
        }
        (state.failure, state.asked) = (None, None);
        state.since = Some(Instant::now());
        state.made = state.since;
        drop(state);
        self.changed.notify_all();
    }
}

/// Whether an export is still what it was, and may be used in the same way. Puts its contexts in the
/// same order.
fn same(was: &Export, now: &mut Export) -> std::result::Result<(), String> {
    if now.size != was.size {
        return Err(format!("its size is {} bytes and was {}", now.size, was.size));
    }
    if now.has(flag::READ_ONLY) != was.has(flag::READ_ONLY) {
        let is = if now.has(flag::READ_ONLY) { "now" } else { "no longer" };
        return Err(format!("it is {is} read-only"));
    }
    const ABILITIES: u16 = flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::SEND_CACHE
        | flag::SEND_FAST_ZERO
        | flag::CAN_MULTI_CONN;
    let lacks = was.flags & !now.flags & ABILITIES;
    if lacks != 0 {
        return Err(format!("it lacks what it was able to do (flags {lacks:#x})"));
    }
    if now.minimum > was.minimum || now.maximum < was.maximum {
        return Err(format!(
            "it takes requests of {} to {} bytes and took {} to {}",
            now.minimum, now.maximum, was.minimum, was.maximum
        ));
    }
    if now.mode < was.mode {
        return Err(format!("replies are {:?} and were {:?}", now.mode, was.mode));
    }
    for (i, context) in was.contexts.iter().enumerate() {
        let Some(at) = now.context(&context.name) else {
            let name = crate::block::quoted(&context.name);
            return Err(format!("it has no meta context {name} any more"));
        };
        now.contexts.swap(i, at);
    }
    Ok(())
}
