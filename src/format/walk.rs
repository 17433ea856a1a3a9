//! Walking a chain of images down to where bytes are: reading and describing are built on it.

use crate::block::*;

/// Where a run of bytes was found in a chain.
pub struct Found<'a> {
    /// Bytes.
    pub len: u64,
    /// Where they are. Never [`Place::Below`].
    pub place: Place<'a>,
    /// The image that says so; `None` if it is the one that was asked.
    pub owner: Option<&'a Device>,
    /// How many images below the first.
    pub depth: u32,
}

/// Find where the bytes of a driver from `offset` on live, in it or below: the first run of at most
/// `count` bytes.
#[inline]
pub fn locate(driver: &dyn Driver, offset: u64, count: u64) -> Result<Found<'_>> {
    let (mut run, mut owner, mut depth) = (driver.map(offset, count)?, None, 0);
    while let Place::Below(below) = run.place {
        let left = below.size().saturating_sub(offset);
        if left == 0 {
            // Past the end of what is below: nobody has these bytes.
            run.place = Place::Zero { allocated: false, kept: None };
            break;
        }
        (owner, depth) = (Some(below), depth + 1);
        run = below.driver().map(offset, run.len.min(left))?;
    }
    Ok(Found { len: run.len, place: run.place, owner, depth })
}

/// Read `buf` from a format at `offset`, from wherever in its chain the bytes are. What of them the
/// format itself has encrypted must be whole sectors.
#[inline]
pub fn read(driver: &dyn Driver, buf: Dst<'_>, offset: u64) -> Result<()> {
    read_runs(driver, None, buf, offset)
}

/// [`read`], any range.
#[inline]
pub fn read_device(dev: &Device, buf: Dst<'_>, offset: u64) -> Result<()> {
    read_runs(dev.driver(), Some(dev), buf, offset)
}

#[inline]
fn read_runs(
    driver: &dyn Driver,
    dev: Option<&Device>,
    mut buf: Dst<'_>,
    mut offset: u64,
) -> Result<()> {
    while !buf.is_empty() {
        let found = locate(driver, offset, buf.len() as u64)?;
        let (part, rest) = buf.split_at(found.len as usize);
        match (found.place, found.owner.or(dev)) {
            (Place::At { dev, offset }, _) => dev.read(part, offset)?,
            (Place::Zero { .. }, _) => part.zero_fill(),
            (Place::Compressed { .. }, owner) => {
                owner.map_or(driver, Device::driver).read_compressed(part, offset)?;
            }
            (Place::Encrypted { .. }, None) => driver.read(part, offset)?,
            (_, Some(owner)) => owner.read(part, offset)?,
            (_, None) => {
                return Err(Error::Internal("a format carries no bytes of its own".into()));
            }
        }
        offset += part.len() as u64;
        buf = rest;
    }
    Ok(())
}

/// Describe a range of `dev` and of what is below it.
pub fn extents(dev: &Device, mut offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
    let end = offset.saturating_add(count).min(dev.size());
    while offset < end && !out.is_full() {
        let found = locate(dev.driver(), offset, end - offset)?;
        describe(found.owner.unwrap_or(dev), &found, offset, out)?;
        offset += found.len;
    }
    Ok(())
}

fn describe(
    owner: &Device,
    found: &Found<'_>,
    offset: u64,
    out: &mut ExtentList<'_>,
) -> Result<()> {
    let here = if found.depth == 0 { Extent::ALLOCATED } else { 0 };
    let mut e = Extent::new(offset, found.len, 0);
    e.depth = found.depth;
    match found.place {
        Place::At { dev, offset: host }
            if owner.caps().sparse || owner.driver().kind() == "raw" =>
        {
            // A raw image, or one that keeps its data raw, has the holes of its file.
            return holes(dev, host, offset, found, out);
        }
        Place::Own => return holes(owner, offset, offset, found, out),
        Place::At { dev, offset: host } => {
            e.flags = here | Extent::DATA | Extent::OWNED;
            // Bytes that are not the same in the file are at no place that is worth telling.
            if let Place::Own = dev.driver().map(host, found.len)?.place {
                e.flags |= Extent::HOST;
                e.host_offset = host;
            }
        }
        Place::Encrypted { .. } => e.flags = here | Extent::DATA | Extent::OWNED,
        Place::Compressed { offset: host, .. } => {
            e.flags = here | Extent::DATA | Extent::COMPRESSED | Extent::HOST | Extent::OWNED;
            e.host_offset = host;
        }
        Place::Zero { allocated, kept } => {
            e.flags = Extent::ZERO | if allocated { here | Extent::OWNED } else { 0 };
            if let Some((_, host)) = kept {
                e.flags |= Extent::HOST;
                e.host_offset = host;
            }
        }
        Place::Below(_) => {}
    }
    out.push(e);
    Ok(())
}

/// The holes of a device that carries bytes, put at `offset` of the image that stands on it.
fn holes(
    dev: &Device,
    host: u64,
    offset: u64,
    found: &Found<'_>,
    out: &mut ExtentList<'_>,
) -> Result<()> {
    if !dev.caps().extents {
        let mut e = Extent::data(offset, found.len);
        e.host_offset = host;
        push_at_depth(e, found.depth, out);
        return Ok(());
    }
    let mut done = 0;
    while done < found.len && !out.is_full() {
        let mut some = [Extent::default(); 32];
        let mut list = ExtentList::new(&mut some);
        dev.driver().extents(host + done, found.len - done, &mut list)?;
        let n = list.len();
        let before = done;
        for e in &some[..n] {
            let mut e = *e;
            e.host_offset = if e.has(Extent::HOST) { e.offset } else { 0 };
            e.offset = e.offset - host + offset;
            e.length = e.length.min(found.len - done);
            done += e.length;
            push_at_depth(e, found.depth, out);
        }
        if done == before {
            return Err(Error::Internal("a driver described no extent".into()));
        }
    }
    Ok(())
}

fn push_at_depth(mut e: Extent, depth: u32, out: &mut ExtentList<'_>) {
    // A device may have images below of its own, as the server of an export does.
    e.depth = e.depth.saturating_add(depth);
    if e.depth > 0 {
        e.flags &= !Extent::ALLOCATED;
    }
    if e.has(Extent::ZERO) {
        (e.flags, e.host_offset) = (e.flags & !Extent::HOST, 0);
    }
    out.push(e);
}
