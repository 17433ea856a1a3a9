//! Work on a chain: what the uppermost image has goes into the one below (commit), or another image comes
//! below it (rebase).
//!
//! Meanwhile the device belongs to the work alone: its chain is taken away from its contexts, whose calls
//! wait, as when it is reopened. Whatever happens, they find a chain again afterwards.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::copy::{Disk, Job, Which, threads};
use super::life::close_tree;
use super::whole::Taken;
use super::{Image, OpenFlags, Options, Tree, Use, chain, state};
use crate::block::*;
use crate::log::{Level, log};

/// Zeroes of so many bytes in data are zeroed, not written.
const SPARSE: u64 = 64 << 10;

/// A device of a chain, outside of any context.
struct Part<'a> {
    dev: &'a Device,
    calls: &'a InFlight,
}

impl Disk for Part<'_> {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let call = self.calls.enter();
        let _own = call.own();
        self.dev.read_slice(buf, offset)
    }
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let call = self.calls.enter();
        let _own = call.own();
        self.dev.write_slice(buf, offset, ReqFlags::NONE)
    }
    fn write_compressed(&self, buf: &[u8], offset: u64) -> Result<()> {
        let call = self.calls.enter();
        let _own = call.own();
        self.dev.driver().write_compressed(OneIov::src(buf).iov(), offset)
    }
    fn zero(&self, offset: u64, count: u64) -> Result<()> {
        let call = self.calls.enter();
        let _own = call.own();
        self.dev.zero(offset, count, ReqFlags::MAY_TRIM)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut [Extent]) -> Result<usize> {
        let call = self.calls.enter();
        let _own = call.own();
        let mut list = ExtentList::for_c(out);
        crate::format::extents(self.dev, offset, count, &mut list)?;
        Ok(list.len())
    }
}

/// What is to be below: an image, or nothing; zeroes follow its end.
struct NewBelow(Option<Image>);

impl NewBelow {
    fn size(&self) -> Result<u64> {
        self.0.as_ref().map_or(Ok(0), Image::size)
    }

    /// How deep it lies in the chain that is open: what is found there, or deeper, stays the same.
    fn depth_in(&self, tree: &Tree) -> Result<Option<u32>> {
        let Some(image) = &self.0 else { return Ok(None) };
        let (old, new) = (images_of(&tree.top), images_of(&image.call()?.top));
        // All the way down: an option may have put something else below one of them.
        let same = |depth: &usize| old.get(*depth..).is_some_and(|rest| rest == new);
        let known = new.iter().all(Option::is_some);
        Ok((1..old.len()).find(|depth| known && same(depth)).map(|depth| depth as u32))
    }
}

/// The format and the file of each image of a chain, `top` first; `None` of one that they do not tell
/// what it holds.
fn images_of(top: &Device) -> Vec<Option<(&'static str, (u64, u64))>> {
    std::iter::successors(Some(top), |dev| dev.driver().backing())
        .map(|dev| {
            let driver = dev.driver();
            // What lies in a data file is of any image that names it.
            let whole = driver.describe().state & state::HAS_DATA_FILE == 0;
            let id = driver.files().first().and_then(|file| file.driver().identity());
            id.filter(|_| whole).map(|id| (driver.kind(), id))
        })
        .collect()
}

impl Disk for NewBelow {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = self.size()?.saturating_sub(offset).min(buf.len() as u64) as usize;
        buf[there..].fill(0);
        match &self.0 {
            Some(image) if there > 0 => image.read_at(&mut buf[..there], offset),
            _ => Ok(()),
        }
    }
    fn write(&self, _: &[u8], _: u64) -> Result<()> {
        Err(Error::Internal("what is below is not written".into()))
    }
    fn write_compressed(&self, _: &[u8], _: u64) -> Result<()> {
        Err(Error::Internal("what is below is not written".into()))
    }
    fn zero(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::Internal("what is below is not written".into()))
    }
    fn extents(&self, offset: u64, count: u64, out: &mut [Extent]) -> Result<usize> {
        let there = self.size()?.saturating_sub(offset).min(count);
        match (&self.0, out) {
            (Some(image), out) if there > 0 => image.extents(offset, there, out),
            (_, [first, ..]) => {
                *first = Extent::new(offset, count, Extent::ZERO);
                Ok(1)
            }
            _ => Ok(0),
        }
    }
}

/// What became of a chain that was worked on.
enum Outcome {
    /// It is as it was, or good to go on with.
    Same,
    /// It goes on as this one.
    Other(Box<Tree>),
}

impl Image {
    /// Write what the uppermost image has itself into the one below, and (unless it is to `keep` it) empty
    /// it then. The one below grows if it is smaller.
    pub fn commit(&self, keep: bool, progress: Progress<'_>) -> Result<()> {
        self.alone_on_chain(|old, calls| {
            if old.top.driver().backing().is_none() {
                return Err(Error::invalid(format!("{}: has no backing image", old.name)));
            }
            close_tree(old)?;
            // It takes the locks over, and more of them for the image below.
            let options = &old.options;
            let both = chain::reopen(old, options, old.flags | OpenFlags::WRITE_BELOW, calls)?;
            let done = commit_tree(&both, keep, progress, calls);
            // What the old one keeps in memory is out of date by now.
            let again = chain::reopen(&both, options, old.flags, calls);
            match (again, done) {
                (Ok(new), done) => Ok((Outcome::Other(new.into()), done)),
                (Err(e), done) => {
                    let both = Tree { flags: old.flags, ..both };
                    log(Level::Warn, format_args!("{}: stays locked for writing: {e}", both.name));
                    Ok((Outcome::Other(both.into()), done))
                }
            }
        })
    }

    /// Name `backing` (none: empty) as the image below. What differs between the old chain and the new
    /// one is copied first; if `blind`, nothing is, and what the disk holds may become something else.
    pub fn rebase(
        &self,
        backing: &OsStr,
        options: &Options,
        blind: bool,
        progress: Progress<'_>,
    ) -> Result<()> {
        options.check(Use::Rebase)?;
        let threads = threads(options)?;
        if backing.is_empty() && options.get("backing-fmt").is_some() {
            let what = "option 'backing-fmt' has no use without a backing file";
            return Err(Error::invalid(what));
        }
        self.alone_on_chain(|old, calls| {
            if !blind {
                refuse_without_chain(old)?;
            }
            let (below, format) = match backing.is_empty() {
                true => (NewBelow(None), None),
                false => {
                    let (image, format) = open_below(old, backing, options, blind)?;
                    (NewBelow(image), format)
                }
            };
            close_tree(old)?;
            if !blind {
                copy_what_differs(old, &below, threads, progress, calls)?;
                // Settled once more: what is opened next is to find nothing half done.
                close_tree(old)?;
            }
            let named = (!backing.is_empty()).then(|| (backing.as_bytes(), format.as_deref()));
            old.top.driver().set_backing(named)?;
            // How the old one below was opened says nothing of the new one.
            let options = old.options.without_backing();
            let new = chain::reopen(old, &options, old.flags, calls);
            // Until here nobody could write to it.
            drop(below);
            match new {
                Ok(new) => Ok((Outcome::Other(new.into()), Ok(()))),
                // It is named, as was asked.
                Err(e) if blind => {
                    let text = format_args!("{}: goes on with its old backing file: {e}", old.name);
                    log(Level::Warn, text);
                    Ok((Outcome::Same, Ok(())))
                }
                Err(e) => Ok((Outcome::Same, Err(e))),
            }
        })
    }

    /// Take the chain away from all contexts, do `work` on it, and give them what became of it: what it was
    /// where the work failed as a whole. The inner result is answered in any case.
    fn alone_on_chain(
        &self,
        work: impl FnOnce(&Tree, &Arc<InFlight>) -> Result<(Outcome, Result<()>)>,
    ) -> Result<()> {
        let mut gone = None;
        self.with_tree(true, |old| {
            chain::check_reopen(old)?;
            let mut taken = Taken::new(&self.shared);
            let (outcome, result) = work(old, &self.shared.calls.shared())?;
            if let Outcome::Other(new) = outcome {
                // It is dropped when the reference to it is over.
                gone = Some(taken.put(new));
            }
            result
        })
    }
}

/// What the disk holds must be known before something else comes below it; and what is below must be
/// openable then.
fn refuse_without_chain(tree: &Tree) -> Result<()> {
    let driver = tree.top.driver();
    if driver.backing().is_none() && driver.describe().state & state::HAS_BACKING != 0 {
        let what = "opened without its backing file, so what it holds is not known";
        return Err(Error::invalid(format!("{}: {what}", tree.name)));
    }
    if tree.flags.has(OpenFlags::UNTRUSTED) {
        let what = "QBLK_OPEN_UNTRUSTED opens no backing file, so none can be put below";
        return Err(Error::policy(&tree.name, what));
    }
    Ok(())
}

/// Commit on a chain whose image below is open for writing.
fn commit_tree(
    tree: &Tree,
    keep: bool,
    progress: Progress<'_>,
    calls: &Arc<InFlight>,
) -> Result<()> {
    let lost = || Error::Internal("the image below is gone".into());
    let (top, base) = (&tree.top, tree.top.driver().backing().ok_or_else(lost)?);
    let size = top.size();
    let done = (|| {
        if base.size() < size {
            base.driver().resize(size, Prealloc::Off, false)?;
        }
        let (from, to) = (Part { dev: top, calls }, Part { dev: base, calls });
        let job = Job {
            from: &from,
            to: &to,
            size,
            room: base.size(),
            which: Which::Own,
            same_from: None,
            shown: &to,
            shows_zeroes: false,
            compare: false,
            sparse: SPARSE,
            compress: None,
            threads: threads(&Options::new())?,
        };
        job.run(progress)?;
        // It is there for good before the other one is gone.
        base.flush()?;
        tree.may_write()?;
        match keep {
            true => Ok(()),
            false => top.driver().make_empty(),
        }
    })();
    // Also where that has failed: what is written is whole as far as it goes.
    let closed = base.driver().close().and_then(|()| close_tree(tree));
    done.and(closed)
}

/// Copy into the uppermost image what would read otherwise if `below` were below.
fn copy_what_differs(
    tree: &Tree,
    below: &NewBelow,
    threads: u32,
    progress: Progress<'_>,
    calls: &Arc<InFlight>,
) -> Result<()> {
    let top = Part { dev: &tree.top, calls };
    let size = tree.top.size();
    let job = Job {
        from: &top,
        to: &top,
        size,
        room: size,
        which: Which::NotOwn,
        same_from: below.depth_in(tree)?,
        shown: below,
        shows_zeroes: below.0.is_none(),
        compare: true,
        sparse: SPARSE,
        compress: None,
        threads,
    };
    tree.top.driver().hold_zeroes(true);
    let done = job.run(progress);
    tree.top.driver().hold_zeroes(false);
    done.map(|_| ())
}

/// Open what is to be below, and find out its format: given, or found now, when it is still the caller's
/// word and not a guest's. Where nothing is copied it need not be there if the format is given.
fn open_below(
    tree: &Tree,
    name: &OsStr,
    options: &Options,
    blind: bool,
) -> Result<(Option<Image>, Option<Vec<u8>>)> {
    let local = name.as_bytes().strip_prefix(b"file:").unwrap_or(name.as_bytes());
    let below = chain::beside(tree.name.as_path(), Path::new(OsStr::from_bytes(local)));
    // As a path, whatever it begins with.
    let mut path = OsString::from("file:");
    path.push(&below);
    let (mut how, given) = (Options::new(), options.get("backing-fmt"));
    how.set("format", given);
    let keep = OpenFlags::DIRECT | OpenFlags::NO_LOCK;
    let flags = match blind {
        true => OpenFlags::INFO_ONLY,
        false => OpenFlags(tree.flags.0 & keep.0),
    };
    let image = match Image::open(&path, &how, flags) {
        Ok(image) => image,
        Err(Error::Os { errno: libc::ENOENT, .. }) if blind && given.is_some() => {
            return Ok((None, given.map(<[u8]>::to_vec)));
        }
        Err(e) => return Err(e),
    };
    chain::refuse_loop(&chain::file_of(&tree.name), below.as_os_str(), &how)?;
    let format = image.info()?.format.as_bytes().to_vec();
    Ok((Some(image).filter(|_| !blind), Some(format)))
}
