//! Threads for what would have to wait: a disk, a peer, a decompression. Shared by all connections of a
//! server, made when they are needed, gone when they were idle for a while.
//!
//! Fair: connections take turns, however many requests each has queued. None can hold more than three
//! quarters of the threads, and where there are several exports none of those more than half, so that
//! a device that hangs leaves some to the others.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::conn::Conn;
use super::job::Job;

/// How long a thread waits for work before it ends.
const PATIENCE: Duration = Duration::from_secs(2);

/// The pool of one server.
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    /// Connections that have jobs, each with its jobs, in the order of their turns.
    ready: VecDeque<(Arc<Conn>, VecDeque<Job>)>,
    threads: usize,
    /// No more jobs will come.
    ended: bool,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Have a job done by one of at most `most` threads.
    pub fn submit(self: &Arc<Self>, conn: &Arc<Conn>, job: Job, most: usize) {
        let mut state = self.state.lock();
        match state.ready.iter_mut().find(|(c, _)| Arc::ptr_eq(c, conn)) {
            Some((_, jobs)) => jobs.push_back(job),
            None => state.ready.push_back((conn.clone(), VecDeque::from([job]))),
        }
        // A thread that was woken already, for another job, does not count: that one may take long.
        if !self.work.notify_one() && state.threads < most {
            state.threads += 1;
            drop(state);
            let pool = self.clone();
            let made = super::spawn("qblk-nbd-pool", move || pool.run(most));
            let mut state = self.state.lock();
            match made {
                Ok(handle) => {
                    state.handles.retain(|h| !h.is_finished());
                    state.handles.push(handle);
                }
                Err(_) => {
                    state.threads -= 1;
                    // Where there is not a single thread the connection does it itself.
                    if state.threads == 0
                        && let Some((conn, job)) = state.take(most)
                    {
                        drop(state);
                        conn.run(job);
                        conn.running_ended();
                    }
                }
            }
        }
    }

    /// No more jobs will come: have the threads end, and with `wait` wait for them.
    pub fn end(&self, wait: bool) {
        let handles = {
            let mut state = self.state.lock();
            state.ended = true;
            std::mem::take(&mut state.handles)
        };
        self.work.notify_all();
        if wait {
            handles.into_iter().for_each(super::join);
        }
    }

    fn run(&self, most: usize) {
        let mut state = self.state.lock();
        loop {
            if let Some((conn, job)) = state.take(most) {
                drop(state);
                conn.run(job);
                conn.running_ended();
                // Jobs of an export that had its share may go on now.
                state = self.state.lock();
                if !state.ready.is_empty() {
                    self.work.notify_one();
                }
                continue;
            }
            if state.ended {
                state.threads -= 1;
                return;
            }
            let timed_out = self.work.wait_for(&mut state, PATIENCE).timed_out();
            if timed_out && state.ready.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

impl State {
    /// The next job whose export may have another thread.
    fn take(&mut self, most: usize) -> Option<(Arc<Conn>, Job)> {
        for _ in 0..self.ready.len() {
            let (conn, mut jobs) = self.ready.pop_front()?;
            if !conn.running_begins(most) {
                self.ready.push_back((conn, jobs));
                continue;
            }
            let job = jobs.pop_front();
            if !jobs.is_empty() {
                self.ready.push_back((conn.clone(), jobs));
            }
            match job {
                Some(job) => return Some((conn, job)),
                None => conn.running_ended(),
            }
        }
        None
    }
}

impl Conn {
    /// Take one of `most` threads, if that leaves some to other connections and other exports.
    fn running_begins(&self, most: usize) -> bool {
        let share = (most - most / 4).max(1);
        let mine = |n: usize| (n < share).then_some(n + 1);
        if self.running.fetch_update(Relaxed, Relaxed, mine).is_err() {
            return false;
        }
        let begins = self.export.running_begins(most);
        if !begins {
            self.running.fetch_sub(1, Relaxed);
        }
        begins
    }

    fn running_ended(&self) {
        self.running.fetch_sub(1, Relaxed);
        self.export.running_ended();
    }
}
