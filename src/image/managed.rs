//! Images under a lock manager: which one, for whom, and for which files of the chain.
//!
//! What a chain consists of is written in its images, and must not be believed before they are
//! leased. So the chain is gone through once without locks, what was found is leased, and it is opened;
//! if it has become another chain in between, all is given back and done again.

use std::ffi::CString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use super::how::check;
use super::{Again, OpenFlags, Options, Tree, chain};
use crate::block::{Device, Error, Fence, InFlight, Name, Result, quoted};
use crate::file::{Locking, Locks};
use crate::format::Kind;
use crate::lockmgr::{self, Lease, Manager, Owner, READ_ONLY, Request, Resource, SHARED};

/// The manager where the options name none: PATH, or PATH,KEY=VALUE...
const SITE: &str = "QBLK_LOCK_MANAGER";

/// What the options ask for, if anything.
pub(super) fn request(options: &Options, flags: OpenFlags) -> Result<Option<Request>> {
    if flags.has(OpenFlags::INFO_ONLY) || flags.has(OpenFlags::NO_LOCK) {
        return Ok(None);
    }
    let mut settings = Vec::new();
    let site = std::env::var_os(SITE).unwrap_or_default();
    let name = match options.get("lock-manager") {
        Some(name) => name,
        None => {
            let mut parts = site.as_bytes().split(|&b| b == b',');
            let name = parts.next().unwrap_or_default();
            for part in parts {
                settings.push(c_string(part, SITE)?);
            }
            name
        }
    };
    if name.is_empty() {
        return Ok(None);
    }
    let manager = Manager::named(name)?;
    for (key, value) in manager.settings().iter().map(|(k, v)| (k.as_str(), &v[..])) {
        settings.push(setting(key, value)?);
    }
    for (key, value) in options.with_prefix("lock-manager.") {
        settings.push(setting(key, value)?);
    }
    let name = match options.get("lock-owner") {
        Some(name) => c_string(name, "lock-owner")?,
        None => {
            let name = std::fs::read("/proc/self/comm").unwrap_or_default();
            c_string(name.trim_ascii_end(), "lock-owner")?
        }
    };
    let uuid = match options.get("lock-owner-uuid") {
        Some(text) => parse_uuid(text).ok_or_else(|| {
            let found = quoted(text);
            let text = format!("option 'lock-owner-uuid': found {found}, expected 32 hex digits");
            Error::invalid(text)
        })?,
        None => [0; 16],
    };
    let adopt = options.get("lock-adopt").map(|text| c_string(text, "lock-adopt")).transpose()?;
    Ok(Some(Request {
        manager,
        settings,
        owner: Owner { name, uuid },
        wait: options.seconds("lock-wait")?.unwrap_or_default(),
        patience: options.seconds("lock-manager-timeout")?.unwrap_or(lockmgr::PATIENCE),
        adopt,
    }))
}

fn c_string(text: &[u8], what: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(format!("{what}: has a NUL byte in it")))
}

fn setting(key: &str, value: &[u8]) -> Result<CString> {
    c_string(&[key.as_bytes(), b"=", value].concat(), key)
}

/// A UUID in hexadecimal digits, with hyphens anywhere between two of them.
fn parse_uuid(text: &[u8]) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.iter().copied().filter(|&b| b != b'-').collect();
    let mut uuid = [0; 16];
    if digits.len() != 32 {
        return None;
    }
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(uuid)
}

/// A file of a chain, and its format: what a lock manager may be asked for.
#[derive(Clone)]
pub(super) struct Noted(Name, Kind);

/// Note a file of a chain, if it is one that other hosts may have as well.
pub(super) fn note(parts: &mut Vec<Noted>, file: &Device, format: Kind) {
    if matches!(file.driver().kind(), "file" | "host_device") {
        parts.push(Noted(file.driver().name().clone(), format));
    }
}

impl Noted {
    fn resource(&self, flags: u32) -> Option<Resource> {
        let shown = self.0.as_path();
        let path = std::fs::canonicalize(shown).or_else(|_| std::path::absolute(shown));
        let path = path.unwrap_or_else(|_| shown.to_owned());
        // Neither can have a NUL: the one came from the system, the other is ours.
        let path = CString::new(path.into_os_string().into_vec()).ok()?;
        Some(Resource { path, format: CString::new(self.1.name()).ok()?, flags })
    }
}

/// In the one order in which everybody acquires them.
pub(super) fn in_order(mut parts: Vec<Resource>) -> Vec<Resource> {
    // Of a file that is there twice the one that is written counts, which is the first.
    parts.sort();
    parts.dedup_by(|a, b| a.path == b.path);
    parts
}

/// How often it is tried again when a chain has changed while it was being leased.
const CHANGES: u32 = 5;

/// Open, by leave of a lock manager if there is one. `old` is the chain that is to be replaced.
pub(super) fn open(
    name: Name,
    again: Again,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
    old: Option<&Tree>,
) -> Result<Tree> {
    let locks = || old.map_or_else(Locks::default, |old| Locks::replacing(&old.locks));
    let local = matches!(again, Again::Path(_) | Again::Descriptor(_));
    check(options, flags, again.carrier(), Locking::default())?;
    let asked = if local { request(options, flags)? } else { None };
    let Some(request) = asked else {
        return chain::open_now(name, &again, options, flags, calls, locks()).map(|t| t.by(again));
    };
    let keep = old.and_then(|old| old.lease.as_ref());
    let keep = keep.filter(|lease| !lease.is_lost() && request.is_of(lease));
    for _ in 0..CHANGES {
        let writing = OpenFlags::RDWR | OpenFlags::WRITE_BELOW;
        let look = OpenFlags(flags.0 & !(writing | OpenFlags::DIRECT | OpenFlags::SHARED).0);
        let survey = Arc::new(InFlight::default());
        let look = look | OpenFlags::NO_LOCK;
        let found =
            chain::open_now(name.clone(), &again, options, look, &survey, Locks::default())?;
        let wanted = found.resources(flags);
        drop(found);
        let mut locks = locks();
        let (lease, change) = match keep {
            Some(lease) => (lease.clone(), Some(lease.extend(&wanted)?)),
            None => {
                let fence = Arc::new(Fence::default());
                let (request, calls) = (request.clone(), calls.clone());
                (request.acquire(&name, wanted.clone(), fence, calls)?, None)
            }
        };
        locks.set_fence(lease.fence().clone());
        let tree = chain::open_now(name.clone(), &again, options, flags, calls, locks)?;
        if tree.resources(flags) == wanted {
            if let Some(change) = change {
                change.settle(&wanted);
            }
            return Ok(Tree { lease: Some(lease), ..tree.by(again) });
        }
    }
    Err(Error::Locked { file: name, what: "its chain changes while it is being leased".into() })
}

impl Tree {
    /// With how it is opened again.
    fn by(self, again: Again) -> Self {
        Self { again, ..self }
    }

    /// What a lock manager is asked for, if the chain is (to be) opened with `flags`.
    fn resources(&self, flags: OpenFlags) -> Vec<Resource> {
        let shared = if flags.has(OpenFlags::SHARED) { SHARED } else { 0 };
        let resource = |(i, noted): (usize, &Noted)| {
            // Only the uppermost image is written, and the one below while something is committed to it.
            let write = match () {
                _ if i < self.own_parts => flags.has(OpenFlags::RDWR),
                _ if i < self.parts_to_below => flags.has(OpenFlags::WRITE_BELOW),
                _ => false,
            };
            noted.resource(shared | if write { 0 } else { READ_ONLY })
        };
        in_order(self.parts.iter().enumerate().filter_map(resource).collect())
    }
}

/// A lease of files, by their formats, while something is done with all of them.
pub(super) fn lease_files(
    files: &[(&Name, &str)],
    options: &Options,
) -> Result<Option<Arc<Lease>>> {
    let Some(request) = request(options, OpenFlags::RDWR)? else { return Ok(None) };
    let mut parts = Vec::with_capacity(files.len());
    for (path, format) in files {
        let shown = path.as_path();
        // It need not be there yet, but the directory is.
        let dir = shown.parent().filter(|d| !d.as_os_str().is_empty());
        let dir = std::fs::canonicalize(dir.unwrap_or(std::path::Path::new(".")));
        let whole = std::fs::canonicalize(shown)
            .or_else(|e| dir.map(|d| d.join(shown.file_name().unwrap_or_default())).map_err(|_| e))
            .unwrap_or_else(|_| shown.to_owned());
        parts.push(Resource {
            path: c_string(whole.as_os_str().as_bytes(), "the name")?,
            format: c_string(format.as_bytes(), "format")?,
            flags: 0,
        });
    }
    let Some((first, _)) = files.first() else { return Ok(None) };
    let (fence, calls) = (Arc::new(Fence::default()), Arc::new(InFlight::default()));
    request.acquire(first, in_order(parts), fence, calls).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_with_and_without_hyphens() {
        let uuid = Some([0x12, 0x3e, 0x45, 0x67, 0xe8, 0x9b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xaf]);
        assert_eq!(parse_uuid(b"123e4567-e89b-0102-0304-0506070809af"), uuid);
        assert_eq!(parse_uuid(b"123E4567E89B010203040506070809AF"), uuid);
        for bad in [&b""[..], b"123e4567", b"123e4567-e89b-0102-0304-0506070809ag"] {
            assert_eq!(parse_uuid(bad), None);
        }
    }

    #[test]
    fn resources_are_in_one_order_and_once() {
        let part = |path: &str, flags| Resource {
            path: CString::new(path).unwrap(),
            format: CString::new("raw").unwrap(),
            flags,
        };
        let sorted = in_order(vec![part("/c", 0), part("/a", 1), part("/b", 1), part("/a", 0)]);
        assert_eq!(sorted, [part("/a", 0), part("/b", 1), part("/c", 0)]);
    }
}
