//! A lease: resources that a manager has given to one open device, and the thread that looks after it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::*};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::ffi::list;
use super::{Manager, Owner, READ_ONLY, Resource};
use crate::block::{Error, Fence, InFlight, Name, Result};
use crate::crypto;
use crate::log::{Level, log};
use crate::thread;

/// Room for what a manager says.
const TEXT: usize = 1024;
/// After a renewal that failed, if the manager has not said when the next is due.
const AGAIN: Duration = Duration::from_millis(500);

/// How resources are to be acquired.
#[derive(Clone)]
pub struct Request {
    /// By whom.
    pub manager: Arc<Manager>,
    /// `KEY=VALUE` for the manager.
    pub settings: Vec<CString>,
    /// For whom.
    pub owner: Owner,
    /// How long to wait for others.
    pub wait: Duration,
    /// How long a call may take beyond that.
    pub patience: Duration,
    /// What the manager on another host has said of the lease that is to be taken over.
    pub adopt: Option<CString>,
}

/// Resources that are held until this is dropped.
pub struct Lease {
    manager: Arc<Manager>,
    settings: Vec<CString>,
    state: Arc<State>,
    orders: Mutex<Sender<Order>>,
    held: Mutex<Vec<Resource>>,
    patience: Duration,
    /// A forked child has not got the thread.
    process: u32,
}

/// What the thread and the device share.
struct State {
    fence: Arc<Fence>,
    lost: AtomicBool,
    /// See [`PENDING`].
    phase: AtomicU8,
    /// Calls under way on the device.
    calls: Arc<InFlight>,
    image: Name,
}

/// Acquiring is under way.
const PENDING: u8 = 0;
/// It succeeded, and somebody wants to have it.
const TAKEN: u8 = 1;
/// It took too long: who asked is gone.
const GIVEN_UP: u8 = 2;

enum Order {
    Release(Sender<()>),
    Change(bool, Resource, Sender<c_int>),
    Inquire(Sender<std::result::Result<Vec<u8>, c_int>>),
}

/// Code and words of a failure.
type Refusal = (c_int, Vec<u8>);

impl Request {
    /// Have `resources`, all of them. `fence` is closed when the lease is lost; `calls` are those that use
    /// what it stands for.
    pub fn acquire(
        self,
        image: &Name,
        resources: Vec<Resource>,
        fence: Arc<Fence>,
        calls: Arc<InFlight>,
    ) -> Result<Arc<Lease>> {
        if self.adopt.is_some() && self.manager.functions.adopt.is_none() {
            let what = "option 'lock-adopt': it lacks the function qblk_lockmgr_adopt";
            return Err(self.manager.error(what, libc::ENOTSUP));
        }
        let state = Arc::new(State {
            fence,
            lost: AtomicBool::new(false),
            phase: AtomicU8::new(PENDING),
            calls,
            image: image.clone(),
        });
        let (orders, inbox) = channel();
        let (say, answer) = channel();
        let (manager, patience) = (self.manager.clone(), self.patience);
        let (limit, settings) = (self.wait.saturating_add(patience), self.settings.clone());
        let (worker_state, held) = (state.clone(), resources.clone());
        // The usual stack: most of what runs there is the manager's.
        let work = move || Worker::run(self, &resources, &worker_state, &inbox, &say);
        thread::spawn("qblk-lease", None, work).map_err(|e| {
            manager.error("starting a thread", e.raw_os_error().unwrap_or(libc::EAGAIN))
        })?;
        let answer = answer.recv_timeout(limit);
        match answer {
            Ok(Ok(())) => {}
            Ok(Err((code, text))) => {
                return Err(manager.refused(image, "acquiring", code.saturating_neg(), &text));
            }
            Err(_) => {
                // Should it succeed at this very moment after all, it is the thread that finds out.
                if state.phase.compare_exchange(PENDING, GIVEN_UP, SeqCst, SeqCst).is_ok() {
                    let what = format!("no answer in {:.1} s", limit.as_secs_f64());
                    return Err(manager.error(what, libc::ETIMEDOUT));
                }
            }
        }
        Ok(Arc::new(Lease {
            manager,
            settings,
            state,
            orders: Mutex::new(orders),
            held: Mutex::new(held),
            patience,
            process: std::process::id(),
        }))
    }

    /// Whether a lease is what this would ask for, but for the resources.
    pub fn is_of(&self, lease: &Lease) -> bool {
        Arc::ptr_eq(&self.manager, &lease.manager)
            || (self.manager.name == lease.manager.name && self.settings == lease.settings)
    }
}

impl Lease {
    /// Closed while the lease is not good.
    pub fn fence(&self) -> &Arc<Fence> {
        &self.state.fence
    }

    /// Whether somebody else has, or may have had, what it was for.
    pub fn is_lost(&self) -> bool {
        self.state.lost.load(SeqCst)
    }

    /// The error of a write that the fence stops.
    pub fn error(&self) -> Error {
        let what = match self.is_lost() {
            true => "its lease was lost to somebody else: it has to be reopened",
            false => {
                "its lease could not be renewed in time: writes are refused until it is regained"
            }
        };
        let what = format!("{what} (lock manager {})", self.manager.name);
        Error::Locked { file: self.state.image.clone(), what }
    }

    /// The manager, by the name that it was loaded by.
    pub fn manager(&self) -> &Name {
        &self.manager.name
    }

    fn ask<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Result<T> {
        let (say, answer) = channel();
        let sent = self.orders.lock().send(order(say));
        sent.ok().and_then(|()| answer.recv_timeout(self.patience).ok()).ok_or_else(|| {
            let what = format!("no answer in {:.1} s", self.patience.as_secs_f64());
            self.manager.error(what, libc::ETIMEDOUT)
        })
    }

    /// What another host needs to take the lease over.
    pub fn inquire(&self) -> Result<Vec<u8>> {
        match self.ask(Order::Inquire)? {
            Ok(text) => Ok(text),
            Err(libc::ENOTSUP) => {
                let what = "it lacks the function qblk_lockmgr_inquire";
                Err(self.manager.error(what, libc::ENOTSUP))
            }
            Err(code) => Err(self.manager.refused(&self.state.image, "inquiring", code, &[])),
        }
    }

    /// Make the lease one for `wanted` too; what it is for by now stays held. The answer undoes it.
    pub fn extend(&self, wanted: &[Resource]) -> Result<Change<'_>> {
        let before = self.held.lock().clone();
        let mut change = Change { lease: self, before, done: Vec::new() };
        let same = change.before == wanted;
        if !same && !self.manager.can_change() {
            let what = "it lacks qblk_lockmgr_add and qblk_lockmgr_remove, so that what a device has \
                        leased cannot change while it is open: close it and open it anew";
            return Err(self.manager.error(what, libc::ENOTSUP));
        }
        for new in wanted {
            let old = change.before.iter().find(|r| r.path == new.path);
            // What is held for writing is enough for reading until all is settled.
            let enough = old.is_some_and(|r| r == new || r.flags & READ_ONLY == 0);
            if !enough {
                self.change(true, new)?;
                change.done.push((new.clone(), old.cloned()));
            }
        }
        Ok(change)
    }

    fn change(&self, add: bool, resource: &Resource) -> Result<()> {
        let code = self.ask(|say| Order::Change(add, resource.clone(), say))?;
        match code {
            0 => Ok(()),
            code => {
                let what = if add { "adding a resource" } else { "giving a resource back" };
                Err(self.manager.refused(&self.state.image, what, code.saturating_neg(), &[]))
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.process == std::process::id()
            && let Err(e) = self.ask(Order::Release)
        {
            log(Level::Error, format_args!("giving a lease back: {e}"));
        }
    }
}

/// A change of what a lease is for, undone when dropped unless it was settled.
pub struct Change<'a> {
    lease: &'a Lease,
    before: Vec<Resource>,
    /// What was added, and what of the same path was held before.
    done: Vec<(Resource, Option<Resource>)>,
}

impl Change<'_> {
    /// It is for `wanted` from now on, and nothing else.
    pub fn settle(mut self, wanted: &[Resource]) {
        self.done.clear();
        for old in &self.before {
            let result = match wanted.iter().find(|r| r.path == old.path) {
                None => self.lease.change(false, old),
                Some(new) if new != old && old.flags & READ_ONLY == 0 => {
                    self.lease.change(true, new)
                }
                Some(_) => Ok(()),
            };
            if let Err(e) = result {
                log(Level::Warn, format_args!("{e}"));
            }
        }
        *self.lease.held.lock() = wanted.to_vec();
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        for (added, old) in self.done.drain(..).rev() {
            let undone = match &old {
                Some(old) => self.lease.change(true, old),
                None => self.lease.change(false, &added),
            };
            if let Err(e) = undone {
                log(Level::Warn, format_args!("{e}"));
            }
        }
    }
}

/// The thread of a lease.
struct Worker<'a> {
    manager: &'a Manager,
    state: &'a State,
    lease: *mut c_void,
    /// When to renew next; never, if there is no need.
    next: Option<Instant>,
    pace: Duration,
    failing: bool,
}

impl Worker<'_> {
    fn run(
        request: Request,
        resources: &[Resource],
        state: &State,
        inbox: &Receiver<Order>,
        say: &Sender<std::result::Result<(), Refusal>>,
    ) {
        let manager = &*request.manager;
        let lease = match acquire(&request, resources) {
            Ok(lease) => lease,
            Err(refusal) => {
                let _ = say.send(Err(refusal));
                return;
            }
        };
        let mut worker = Worker { manager, state, lease, next: None, pace: AGAIN, failing: false };
        if let Err(code) = worker.renew() {
            worker.release();
            let _ = say.send(Err((code, b"the new lease cannot be kept".to_vec())));
            return;
        }
        if state.phase.compare_exchange(PENDING, TAKEN, SeqCst, SeqCst).is_err() {
            return worker.release();
        }
        let _ = say.send(Ok(()));
        worker.serve(inbox);
    }

    /// Look after the lease until it is to be given back.
    fn serve(&mut self, inbox: &Receiver<Order>) {
        loop {
            let order = match self.next {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Release(say)) => {
                    self.release();
                    let _ = say.send(());
                    return;
                }
                Ok(Order::Change(add, resource, say)) => {
                    let _ = say.send(self.change(add, &resource));
                }
                Ok(Order::Inquire(say)) => {
                    let _ = say.send(self.inquire());
                }
                Err(RecvTimeoutError::Timeout) => self.keep(),
                // Nobody has the lease any more.
                Err(RecvTimeoutError::Disconnected) => return self.release(),
            }
        }
    }

    /// One renewal; the code if it fails.
    fn renew(&mut self) -> std::result::Result<(), c_int> {
        let Some(renew) = self.manager.functions.renew else { return Ok(()) };
        let (mut next, mut valid) = (0, u32::MAX);
        let since = Fence::now();
        // SAFETY: a lease of this manager's, and memory for two numbers.
        let code = unsafe { renew(self.lease, &mut next, &mut valid) };
        if code != 0 {
            return Err(code);
        }
        let valid = (valid != u32::MAX).then(|| Duration::from_millis(valid.into()));
        self.state.fence.open_for(since, valid);
        self.pace = Duration::from_millis(next.into());
        self.next = (next > 0).then(|| Instant::now() + self.pace);
        Ok(())
    }

    fn keep(&mut self) {
        let was_closed = self.state.fence.is_closed();
        let image = &self.state.image;
        match self.renew() {
            Ok(()) => {
                if self.failing || was_closed {
                    log(Level::Warn, format_args!("{image}: its lease is good again"));
                }
                self.failing = false;
            }
            Err(code) if code == -libc::ESTALE => {
                self.state.lost.store(true, SeqCst);
                self.state.fence.close();
                self.next = None;
                let by = &self.manager.name;
                log(Level::Error, format_args!("{image}: its lease was lost (lock manager {by})"));
                // The writes that passed the fence before: only when they are done may another begin.
                let mark = self.state.calls.mark();
                let begun = Instant::now();
                while !self.state.calls.passed(mark) && begun.elapsed() < super::PATIENCE {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if self.state.calls.passed(mark) {
                    self.release();
                }
            }
            Err(code) => {
                if !self.failing {
                    let e = std::io::Error::from_raw_os_error(code.saturating_neg());
                    log(Level::Warn, format_args!("{image}: its lease is not renewed: {e}"));
                }
                self.failing = true;
                self.next = Some(Instant::now() + self.pace.clamp(Duration::from_millis(1), AGAIN));
            }
        }
    }

    fn change(&mut self, add: bool, resource: &Resource) -> c_int {
        let functions = &self.manager.functions;
        let Some(call) = (if add { functions.add } else { functions.remove }) else {
            return -libc::ENOTSUP;
        };
        if self.lease.is_null() {
            return -libc::ESTALE;
        }
        // SAFETY: a lease of this manager's; the resource lives during the call.
        unsafe { call(self.lease, &resource.as_c()) }
    }

    fn inquire(&mut self) -> std::result::Result<Vec<u8>, c_int> {
        let Some(inquire) = self.manager.functions.inquire else { return Err(libc::ENOTSUP) };
        if self.lease.is_null() {
            return Err(libc::ESTALE);
        }
        let mut text = vec![0; 4 * TEXT];
        // SAFETY: a lease of this manager's, and as much memory as is said.
        match unsafe { inquire(self.lease, text.as_mut_ptr().cast(), text.len()) } {
            0 => Ok(until_nul(text)),
            code => Err(code.saturating_neg()),
        }
    }

    fn release(&mut self) {
        let lease = std::mem::replace(&mut self.lease, ptr::null_mut());
        if lease.is_null() {
            return;
        }
        // SAFETY: a lease of this manager's, for the last time.
        let code = unsafe { (self.manager.functions.release)(lease) };
        if code != 0 {
            let e = std::io::Error::from_raw_os_error(code.saturating_neg());
            let (image, by) = (&self.state.image, &self.manager.name);
            log(
                Level::Warn,
                format_args!("{image}: giving its lease back (lock manager {by}): {e}"),
            );
        }
    }
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    text.truncate(end);
    text
}

/// The call that acquires.
fn acquire(request: &Request, all: &[Resource]) -> std::result::Result<*mut c_void, Refusal> {
    let functions = &request.manager.functions;
    let resources: Vec<_> = all.iter().map(Resource::as_c).collect();
    let (first, count) = (resources.as_ptr(), resources.len());
    let mut unique = [0; 8];
    if let Err(errno) = crypto::random(&mut unique) {
        return Err((errno.saturating_neg(), b"no random number is to be had".to_vec()));
    }
    let owner = request.owner.as_c(u64::from_ne_bytes(unique));
    let options = list(&request.settings);
    let wait = u32::try_from(request.wait.as_millis()).unwrap_or(u32::MAX);
    let mut text = vec![0; TEXT];
    let (words, size) = (text.as_mut_ptr().cast::<c_char>(), text.len());
    let mut lease = ptr::null_mut();
    let begun = Instant::now();
    let mut pause = crate::file::lock::Pause::new();
    // SAFETY: all that is passed lives during the calls, and is as large as is said; the functions are
    // what the contract says.
    let code = unsafe {
        if let (Some(state), Some(adopt)) = (&request.adopt, functions.adopt) {
            let state = state.as_ptr();
            let options = options.as_ptr();
            adopt(&owner, first, count, options, state, wait, words, size, &mut lease)
        } else if let Some(acquire2) = functions.acquire2 {
            acquire2(&owner, first, count, options.as_ptr(), wait, words, size, &mut lease)
        } else {
            // One that cannot wait is asked again.
            loop {
                let code = (functions.acquire)(&owner, first, count, options.as_ptr(), &mut lease);
                let left = request.wait.saturating_sub(begun.elapsed());
                if !matches!(-code, libc::EBUSY | libc::EAGAIN) || left.is_zero() {
                    break code;
                }
                pause.sleep(left);
            }
        }
    };
    match code {
        0 if lease.is_null() => Err((0, b"it answers success without a lease".to_vec())),
        0 => Ok(lease),
        code => Err((code, until_nul(text))),
    }
}
