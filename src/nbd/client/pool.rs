//! The connections of one device: which one a request takes, what happens when one is lost, and when
//! all are.
//!
//! A request whose connection is lost before its reply came is sent again on another, or on a new one
//! once there is one. That is safe for every request: reads, caching and block status change
//! nothing; writes, zeroing and trimming are not acknowledged yet, may have happened whole, in part or
//! not at all, and put the same bytes in the same place if they happen again (the order among
//! requests that are under way at once is nobody's promise). A flush is sent again too, but what it
//! has to cover may be gone with the server: see [`super::durable`].
//!
//! Not so where we gave the connection up ourselves because an answer took too long: the server may live,
//! and do what it was asked after the same change, sent again, and after what came later. Writes,
//! zeroing and trimming that were under way there fail; the rest is sent again.
//!
//! Locks: `state` is taken with none of a lane's locks held, and none of those are taken under it.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::call::{Claim, Outcome};
use super::durable::Durable;
use super::handshake::Export;
use super::lane::Lane;
use super::revive::{FIRST_PAUSE, LAST_PAUSE};
use super::slot::{Request, Work};
use super::source::Source;
use super::sys::Deadline;
use crate::block::{Error, Name, Result};
use crate::log::{Level, log};
use crate::nbd::net::Waker;
use crate::nbd::proto::{cmd, flag};

/// Small requests that one connection gets before the next gets any: they travel together.
pub(super) const TOGETHER: u32 = 8;
/// Requests of at least so many bytes are better spread, bytes.
const LARGE: u64 = 64 << 10;
/// Connections where a server says that several are safe and the caller says nothing.
const DEFAULT_LANES: u32 = 4;
/// How often a call may ask for another try after reconnecting was given up.
const RETRY: Duration = Duration::from_secs(1);
/// How long flushing before closing may take, and closing itself.
pub(super) const CLOSE: Duration = Duration::from_secs(5);

/// Whether a call waits for a lost connection to be made again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Reconnect,
    None,
}

/// What is known of lost connections.
#[derive(Default)]
pub(super) struct State {
    /// Lanes that are up.
    pub live: usize,
    /// When and why the last one was lost.
    pub lost: Option<(Instant, Error)>,
    /// Since when reconnecting is tried.
    pub since: Option<Instant>,
    /// When the last connection was made.
    pub made: Option<Instant>,
    /// How long to pause after a failure, and until when to pause now.
    pub pause: Duration,
    pub not_before: Option<Instant>,
    /// Why the last try to reconnect failed.
    pub failure: Option<Error>,
    /// The reconnecting thread is at work.
    pub running: bool,
    pub thread: Option<JoinHandle<()>>,
    /// When the last try that a call asked for began.
    pub asked: Option<Instant>,
    /// The device is no good any more, for this reason.
    pub fatal: Option<Error>,
}

impl State {
    /// A try came to nothing: the next one comes after a pause, longer each time.
    pub(super) fn back_off(&mut self) {
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        self.not_before = Some(Instant::now() + self.pause);
    }
}

/// How long each further connection may take at open, at least and at most: a server that has as many
/// clients as it wants does not answer at all, and one connection will do.
const FURTHER: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));
/// And how many times as long as the first took.
const SLOWER: u32 = 8;

/// See the module's text.
pub(super) struct Pool {
    pub me: Weak<Self>,
    /// What was agreed on at the first connection, which holds for all.
    pub export: Export,
    /// Before `source`: a server that was started ends by itself once its connection is closed.
    pub lanes: Vec<Lane>,
    pub source: Source,
    pub state: Mutex<State>,
    /// Slots were freed for which somebody waits, or `state` has changed.
    pub changed: Condvar,
    /// Who waits on `changed`.
    waiters: AtomicU32,
    pub durable: Durable,
    pub closing: AtomicBool,
    /// Ends connecting and negotiating.
    pub cancel: Arc<Waker>,
}

impl Pool {
    /// Connect as often as the settings say.
    pub(super) fn open(source: Source) -> Result<Arc<Self>> {
        let begun = Instant::now();
        let first = source.first()?;
        let further = (begun.elapsed() * SLOWER).clamp(FURTHER.0, FURTHER.1);
        let export = first.export.clone();
        let safe = export.has(flag::CAN_MULTI_CONN) && source.is_repeatable();
        let wanted = source.settings.connections.unwrap_or(DEFAULT_LANES).clamp(1, 64);
        // Without the server's word a flush on one connection says nothing of writes on another.
        let wanted = if safe { wanted } else { 1 };
        let no_memory = |e: std::io::Error| {
            let errno = e.raw_os_error().unwrap_or(libc::ENOMEM);
            Error::net(&source.name, "memory for a connection", errno)
        };
        let lanes = (0..wanted).map(|_| Lane::new()).collect::<std::io::Result<Vec<_>>>();
        let lanes = lanes.map_err(no_memory)?;
        let cancel = Arc::new(Waker::new()?);
        let pool = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            source,
            export,
            lanes,
            state: Mutex::default(),
            changed: Condvar::new(),
            waiters: AtomicU32::new(0),
            durable: Durable::default(),
            closing: AtomicBool::new(false),
            cancel,
        });
        let mut next = Some(first);
        for lane in &pool.lanes {
            let link = match next.take() {
                Some(link) => link,
                None => match pool.another(Some(Instant::now() + further)) {
                    Ok(link) => link,
                    Err(e) => {
                        log(Level::Warn, format_args!("doing without another connection: {e}"));
                        break;
                    }
                },
            };
            pool.install(lane, link);
        }
        Ok(pool)
    }

    pub(super) fn name(&self) -> &Name {
        &self.source.name
    }

    /// Lanes that are up.
    pub(super) fn live(&self) -> usize {
        self.state.lock().live
    }

    /// Whether lost connections are made again.
    pub(super) fn reconnects(&self) -> bool {
        self.source.is_repeatable() && !self.source.settings.reconnect.is_zero()
    }

    /// A call's deadline.
    #[inline]
    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.source.settings.timeout)
    }

    /// The failure of a call whose deadline has passed.
    pub(super) fn too_late(&self) -> Error {
        let limit = self.source.settings.timeout.unwrap_or_default();
        let what = format!("no answer within {limit:?}");
        Error::net(self.name(), what, libc::ETIMEDOUT)
    }

    /// Send a request, again if need be, and tell what came of it.
    #[inline]
    pub(super) fn run<T>(
        &self,
        request: &Request<'_>,
        deadline: Deadline,
        patience: Patience,
        take: impl FnOnce(&mut Work, u64) -> T,
    ) -> Result<T> {
        loop {
            let mut claim = self.claim(request, deadline)?;
            // Before it is sent, and while the claim keeps the connection: see Durable.
            let losses = self.durable.losses();
            match claim.exchange(request, deadline) {
                Outcome::Over => match claim.work() {
                    Some(work) => return Ok(take(work, losses)),
                    None => return Err(Error::Internal("a reply without a request".into())),
                },
                Outcome::Lost if deadline.passed() => return Err(self.too_late()),
                Outcome::Lost if patience == Patience::Reconnect => {}
                Outcome::Lost => {
                    // Another connection may be alive: only if none is there is nothing to wait for.
                    let state = self.state.lock();
                    if state.live == 0 {
                        return Err(self.gone(&state));
                    }
                }
                Outcome::Late => return Err(self.too_late()),
                // A server that lives may carry out a change after the same one, sent again, and
                // after what came later: that must not be.
                Outcome::GivenUp(why)
                    if matches!(request.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES)
                        || patience != Patience::Reconnect =>
                {
                    return Err(why);
                }
                Outcome::GivenUp(_) => {}
                Outcome::Broken(why) => return Err(why),
            }
        }
    }

    #[inline]
    fn claim(&self, request: &Request<'_>, deadline: Deadline) -> Result<Claim<'_>> {
        match self.try_claim(request) {
            Some(claim) => Ok(claim),
            None => self.claim_late(request, deadline),
        }
    }

    #[inline]
    fn try_claim(&self, request: &Request<'_>) -> Option<Claim<'_>> {
        if let [only] = self.lanes.as_slice() {
            return only.claim(self);
        }
        let carries = matches!(request.kind, cmd::READ | cmd::WRITE);
        if !(carries && request.length >= LARGE) {
            let with_room = |lane: &&Lane| lane.is_up() && lane.in_flight() < TOGETHER;
            if let Some(claim) = self.lanes.iter().find(with_room).and_then(|l| l.claim(self)) {
                return Some(claim);
            }
        }
        let least = self.lanes.iter().filter(|l| l.is_up()).min_by_key(|l| l.in_flight())?;
        least.claim(self).or_else(|| self.lanes.iter().find_map(|l| l.claim(self)))
    }

    /// Wait for a slot or for a connection.
    #[cold]
    fn claim_late(&self, request: &Request<'_>, deadline: Deadline) -> Result<Claim<'_>> {
        let mut state = self.state.lock();
        let mut asked = false;
        loop {
            self.waiters.fetch_add(1, SeqCst);
            let claim = self.try_claim(request);
            if claim.is_none() {
                let waited = self.wait_for_claim(&mut state, deadline, &mut asked);
                self.waiters.fetch_sub(1, SeqCst);
                waited?;
                continue;
            }
            self.waiters.fetch_sub(1, SeqCst);
            // Before the claim, which takes the lock when it is given back.
            drop(state);
            return claim.ok_or_else(|| Error::Internal("no claim".into()));
        }
    }

    fn wait_for_claim(
        &self,
        state: &mut MutexGuard<'_, State>,
        deadline: Deadline,
        asked: &mut bool,
    ) -> Result<()> {
        if self.closing.load(SeqCst) {
            return Err(Error::BadHandle(format!("{}: closed", self.name())));
        }
        if let Some(fatal) = &state.fatal {
            return Err(fatal.clone());
        }
        if state.live == 0 && !state.running {
            if *asked || !self.ask_again(state) {
                return Err(self.gone(state));
            }
            *asked = true;
        }
        if deadline.passed() {
            return Err(match state.live {
                0 => self.gone(state),
                _ => self.too_late(),
            });
        }
        match deadline.left() {
            None => self.changed.wait(state),
            Some(left) => drop(self.changed.wait_for(state, left)),
        }
        Ok(())
    }

    /// Start another try to reconnect, if the last one is long enough ago.
    fn ask_again(&self, state: &mut MutexGuard<'_, State>) -> bool {
        if !self.reconnects() || state.asked.is_some_and(|t| t.elapsed() < RETRY) {
            return false;
        }
        state.asked = Some(Instant::now());
        // One try: the time for more is over.
        (state.since, state.failure, state.not_before) = (None, None, None);
        self.start_reviving(state);
        state.running
    }

    /// Why there is no connection.
    fn gone(&self, state: &State) -> Error {
        let Some((when, why)) = &state.lost else {
            return Error::net(self.name(), "not connected", libc::ENOTCONN);
        };
        let mut what = format!("the connection was lost {:.1} s ago", when.elapsed().as_secs_f64());
        what.push_str(&format!(" ({})", reason(why)));
        if let Some(failure) = &state.failure {
            what.push_str(&format!(" and cannot be made again ({})", reason(failure)));
        }
        let errno = match (why.kind(), self.reconnects() && state.running) {
            (_, true) => libc::ETIMEDOUT,
            (crate::block::ErrorKind::Errno(errno), _) => errno,
            _ => libc::ENOTCONN,
        };
        Error::net(self.name(), what, errno)
    }

    /// A slot was freed.
    #[inline]
    pub(super) fn slot_freed(&self, lane: &Lane) {
        if self.waiters.load(SeqCst) > 0 || !lane.is_up() {
            drop(self.state.lock());
            self.changed.notify_all();
        }
    }

    /// A connection was lost. Called before any of its requests is seen to fail.
    pub(super) fn lost(&self, lane: &Lane, why: &Error) {
        let mut state = self.state.lock();
        if !lane.take_down() {
            return;
        }
        state.live = state.live.saturating_sub(1);
        let closing = self.closing.load(SeqCst);
        if !closing {
            log(Level::Warn, format_args!("connection lost, {} left: {why}", state.live));
            let now = Instant::now();
            state.lost = Some((now, why.clone()));
            state.failure = None;
            let new = state.made.is_some_and(|t| t.elapsed() < LAST_PAUSE);
            if lane.answered.load(Relaxed) {
                (state.pause, state.not_before) = (Duration::ZERO, None);
            } else if new {
                // It came to nothing: the next one may, too.
                state.back_off();
            }
            if state.live == 0 {
                self.durable.all_lost(&format!(
                    "the connection was lost ({}) when writes were acknowledged but not flushed: they \
                     may be lost",
                    reason(why)
                ));
            }
            if state.live == 0 || !state.running {
                state.since = Some(now);
            }
            if self.reconnects() {
                self.start_reviving(&mut state);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Whether somebody has to look for what [`Pool::slot_freed`] tells.
    pub(super) fn wait_changed(&self, state: &mut MutexGuard<'_, State>, most: Duration) {
        self.waiters.fetch_add(1, SeqCst);
        self.changed.wait_for(state, most);
        self.waiters.fetch_sub(1, SeqCst);
    }

    /// Say goodbye on all connections and end the reconnecting thread. Waits a little for calls that
    /// are under way; those that come later are told that the device is closed.
    pub(super) fn close(&self) {
        if self.closing.swap(true, SeqCst) {
            return;
        }
        let limit = self.source.settings.timeout.unwrap_or(CLOSE).min(CLOSE);
        let deadline = Deadline::after(Some(limit));
        self.cancel.wake();
        let mut state = self.state.lock();
        let thread = state.thread.take();
        if thread.as_ref().is_some_and(|t| !t.is_finished()) {
            // It may wait for a reply to its probe, which need not come any more.
            self.lanes.iter().for_each(Lane::cut);
        }
        while self.lanes.iter().any(|l| l.is_up() && l.in_flight() > 0) && !deadline.passed() {
            self.wait_changed(&mut state, deadline.left().unwrap_or_default());
        }
        drop(state);
        for lane in &self.lanes {
            lane.goodbye(self, deadline);
        }
        self.changed.notify_all();
        if let Some(thread) = thread {
            // It has nothing left to wait for.
            let _ = thread.join();
        }
        self.source.end();
    }
}

/// What an error says without naming the peer again.
pub(super) fn reason(e: &Error) -> String {
    match e {
        Error::Net { what, .. } | Error::Proto { what, .. } => what.clone(),
        other => other.to_string(),
    }
}
