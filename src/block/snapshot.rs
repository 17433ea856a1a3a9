//! Internal snapshots: what an image tells of one, and what a new one is told.

use std::time::{SystemTime, UNIX_EPOCH};

/// A state of the guest's data that an image keeps inside itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// What names it alone.
    pub id: Vec<u8>,
    /// What people call it.
    pub name: Vec<u8>,
    /// Bytes of the machine's state that it keeps beside the disk's.
    pub vm_state_size: u64,
    /// Bytes that the disk had.
    pub disk_size: u64,
    /// When it was made: seconds since 1970 and nanoseconds.
    pub date: (u64, u32),
    /// How long the machine had run, nanoseconds.
    pub vm_clock: u64,
    /// Instructions that it had executed, if they were counted.
    pub icount: Option<u64>,
}

/// What a new snapshot is told beside its name.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// `None`: the next number.
    pub id: Option<Vec<u8>>,
    /// `None`: now.
    pub date: Option<(u64, u32)>,
    /// How long the machine has run, nanoseconds.
    pub vm_clock: u64,
    /// Instructions that it has executed, if they were counted.
    pub icount: Option<u64>,
}

impl NewSnapshot {
    /// When it was made.
    pub fn when(&self) -> (u64, u32) {
        self.date.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            (now.as_secs(), now.subsec_nanos())
        })
    }
}
