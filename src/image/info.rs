//! What an image tells of itself: facts of a fixed shape, and properties by name.

use std::sync::atomic::Ordering::Relaxed;

use super::{Image, layers};
use crate::block::*;

/// State bits of an image (`QBLK_STATE_*`).
pub mod state {
    /// Not open for writing.
    pub const READ_ONLY: u32 = 1;
    /// Marked as not closed cleanly.
    pub const DIRTY: u32 = 2;
    /// Marked as corrupt.
    pub const CORRUPT: u32 = 4;
    /// Its data is encrypted.
    pub const ENCRYPTED: u32 = 8;
    /// It names a backing image.
    pub const HAS_BACKING: u32 = 16;
    /// Its data lies in another file.
    pub const HAS_DATA_FILE: u32 = 32;
    /// The format was found by probing.
    pub const PROBED: u32 = 64;
    /// It is locked: by this handle, or (on one that is open for its description) by anybody.
    pub const LOCKED: u32 = 128;
    /// The medium turns.
    pub const ROTATIONAL: u32 = 256;
}

/// What an image is. Sizes are in bytes.
#[derive(Clone, Debug)]
pub struct Info {
    /// Size of the device.
    pub size: u64,
    /// In use on the host; `None` = not known.
    pub allocated: Option<u64>,
    /// In one request; 0 = no limit.
    pub max_transfer: u64,
    /// What requests are best aligned to; 1 = any.
    pub request_alignment: u32,
    /// What a request is best a multiple of.
    pub optimal_io_size: u32,
    /// 0 = none.
    pub cluster_size: u32,
    /// Images below this one.
    pub backing_depth: u32,
    /// Bits of [`state`].
    pub state: u32,
    /// Flush.
    pub can_flush: Can,
    /// Force unit access.
    pub can_fua: Can,
    /// Trim.
    pub can_trim: Can,
    /// Zero.
    pub can_zero: Can,
    /// Zero, or fail at once.
    pub can_fast_zero: Can,
    /// Bring near.
    pub can_cache: Can,
    /// Tell extents.
    pub can_extents: Can,
    /// Flush on one connection holds for all.
    pub can_multi_conn: Can,
    /// "qcow2", "raw", …
    pub format: &'static str,
    /// "file", "host_device", "mem", …: what holds the bytes.
    pub driver: &'static str,
}

impl Image {
    /// What the image is.
    pub fn info(&self) -> Result<Info> {
        let call = self.call()?;
        let tree = &*call;
        let (dev, caps) = (&tree.top, tree.top.caps());
        let about = dev.driver().describe();
        let write = self.write.load(Relaxed);
        let mut state = about.state;
        for (on, bit) in [
            (!write, state::READ_ONLY),
            (tree.probed, state::PROBED),
            (caps.rotational, state::ROTATIONAL),
            (tree.in_use || !tree.locks.is_empty() || tree.lease.is_some(), state::LOCKED),
        ] {
            state |= if on { bit } else { 0 };
        }
        let under = tree.below.as_ref().map(Image::info).transpose()?;
        state |= under.as_ref().map_or(0, |b| b.state & !state::READ_ONLY);
        let if_write = |can: Can| if write { can } else { Can::Not };
        let native_or = |native: bool, other: Can| if native { Can::Native } else { other };
        let mut depth = 0;
        let mut below = dev.driver().backing();
        while let Some(b) = below {
            depth += 1;
            below = b.driver().backing();
        }
        // Formats take any request; what holds their bytes may like some better.
        let file = tree.files.first().map_or(caps, |file| file.caps());
        let (align, depth) = under.map_or((1, depth), |b| (b.request_alignment, b.backing_depth));
        Ok(Info {
            size: dev.size(),
            allocated: dev.driver().allocated(),
            max_transfer: file.max_transfer,
            request_alignment: caps.align.max(file.align).max(align),
            optimal_io_size: caps.optimal_io,
            cluster_size: about.cluster_size,
            backing_depth: depth,
            state,
            can_flush: native_or(caps.flush, Can::Not),
            can_fua: if_write(dev.can_fua()),
            can_trim: if_write(native_or(caps.trim, Can::Not)),
            can_zero: if_write(dev.can_zero()),
            can_fast_zero: if_write(dev.can_fast_zero()),
            can_cache: dev.can_cache(),
            can_extents: native_or(caps.extents, Can::Emulate),
            can_multi_conn: Can::Native,
            format: about.format,
            driver: tree.driver,
        })
    }

    /// The property `key`, `None` if there is no such key here. `properties` lists all, a line each.
    pub fn property(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let call = self.call()?;
        let mut all = vec![("filename", call.name.as_bytes().to_vec())];
        all.extend(call.top.driver().describe().properties);
        all.extend(call.top.driver().properties_on_demand(key));
        if let Some(lease) = &call.lease {
            all.push(("lock-manager", lease.manager().as_bytes().to_vec()));
            if key == "lock-lease" {
                return lease.inquire().map(Some);
            }
            all.push(("lock-lease", Vec::new()));
        }
        // What holds the bytes of the image may have something to tell, too.
        if let Some(file) = call.files.first() {
            all.extend(file.driver().describe().properties);
            all.extend(file.driver().properties_on_demand(key));
        }
        if let Some(below) = &call.below {
            all.push(("layers", layers::names(&call)));
            all.retain(|p| p.0 != "filename");
            return match (all.iter().find(|p| p.0 == key), key) {
                (Some(found), _) => Ok(Some(found.1.clone())),
                (None, "properties") => {
                    let mut list = below.property(key)?.unwrap_or_default();
                    for (name, _) in &all {
                        list.extend([b"\n", name.as_bytes()].concat());
                    }
                    Ok(Some(list))
                }
                _ => below.property(key),
            };
        }
        if key == "properties" {
            return Ok(Some(all.iter().map(|p| p.0).collect::<Vec<_>>().join("\n").into_bytes()));
        }
        Ok(all.into_iter().find(|p| p.0 == key).map(|p| p.1))
    }
}
