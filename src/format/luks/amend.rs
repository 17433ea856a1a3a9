//! Adding and taking away key slots of an image that there is.
//!
//! A power cut at any moment leaves every passphrase that was there before or is there afterwards good,
//! and no other: a new key is split and written before its slot is marked as active, by a write within
//! one sector; a slot is marked as inactive before its key is destroyed.
//!
//! Source: LUKS1 On-Disk Format Specification 1.2.3, sections 4.2 and 4.4.

use super::header::{Area, Header, LEN, SLOTS, STRIPES, Slot};
use super::keys;
use crate::block::*;
use crate::crypto;

/// Change key slots of the header in `area` of `dev`; returns the header as it is then.
pub fn change_keys(dev: &Device, area: Area, how: &AmendKeys) -> Result<Header> {
    let mut header = Header::read(dev, area)?;
    header.known(dev.name())?;
    if let Some(slot) = how.slot.filter(|s| *s >= SLOTS as u32) {
        return Err(Error::invalid(format!(
            "option 'keyslot': found {slot}, expected 0 to {}",
            SLOTS - 1
        )));
    }
    if how.activate {
        add(dev, area, &mut header, how)?;
    } else {
        take_away(dev, area, &mut header, how)?;
    }
    Ok(header)
}

fn refused(dev: &Device, what: String) -> Error {
    Error::invalid(format!("{}: {what}", dev.name()))
}

fn add(dev: &Device, area: Area, header: &mut Header, how: &AmendKeys) -> Result<()> {
    let new = how.new.as_ref();
    let new = new.ok_or_else(|| Error::invalid("state=active needs the option 'new-secret'"))?;
    let opens = how.old.as_ref().or(how.unlock.as_ref());
    let opens = opens.ok_or_else(|| Error::NeedKey(dev.name().clone()))?;
    let i = match how.slot {
        Some(i) if is_active(header, i as usize) => {
            let what = format!("key slot {i} is in use; it is to be taken away first");
            return Err(refused(dev, what));
        }
        Some(i) => i as usize,
        None => header
            .slots
            .iter()
            .position(|s| !s.active)
            .ok_or_else(|| refused(dev, format!("all {SLOTS} key slots are in use")))?,
    };
    check_place(dev, area, header, i)?;
    let key = keys::unlock(dev, area, header, opens, false)?;
    keys::put_key(dev, area, header, i, &key, new, how.ms)?;
    dev.flush()?;
    // What belongs to the slot, and only then that it counts.
    let (at, record) = header.slot_record(i);
    let (state, rest) = record.split_at(4);
    dev.write_slice(rest, area.offset + at + 4, ReqFlags::NONE)?;
    dev.flush()?;
    dev.write_slice(state, area.offset + at, ReqFlags::NONE)?;
    dev.flush()
}

fn is_active(header: &Header, i: usize) -> bool {
    header.slots.get(i).is_some_and(|s| s.active)
}

/// See that the key of a slot that is not in use may be written where the header says.
fn check_place(dev: &Device, area: Area, header: &mut Header, i: usize) -> Result<()> {
    let no_slot = || Error::Internal(format!("no key slot {i}"));
    header.slots.get_mut(i).ok_or_else(no_slot)?.stripes = STRIPES;
    let limit = area.len.unwrap_or(header.payload);
    let bad = |what: String| Error::corrupt(dev.name(), format!("LUKS header: {what}"));
    let place = |s: &Slot| (s.offset, s.offset + header.split_len(s));
    let (from, to) = place(header.slots.get(i).ok_or_else(no_slot)?);
    if from < LEN as u64 || to > limit {
        return Err(bad(format!(
            "key material of key slot {i}: found {} bytes at {from}, expected them between {LEN} and \
             {limit}",
            to - from
        )));
    }
    for (k, other) in header.slots.iter().enumerate().filter(|(k, s)| *k != i && s.active) {
        let (begin, end) = place(other);
        if from < end && begin < to {
            return Err(bad(format!("the key material of key slots {i} and {k} overlaps")));
        }
    }
    Ok(())
}

fn take_away(dev: &Device, area: Area, header: &mut Header, how: &AmendKeys) -> Result<()> {
    if how.new.is_some() {
        return Err(Error::invalid("option 'new-secret' has no use here (state=inactive)"));
    }
    let active = header.slots.iter().filter(|s| s.active).count();
    let gone: Vec<usize> = match (how.slot, &how.old) {
        (None, None) => {
            return Err(Error::invalid(
                "state=inactive needs the option 'keyslot' or 'old-secret', to say which is taken away",
            ));
        }
        (Some(i), _) if !is_active(header, i as usize) => {
            return Err(refused(dev, format!("key slot {i} is not in use")));
        }
        (Some(i), None) => vec![i as usize],
        (slot, Some(old)) => {
            header.check_cost(dev.name(), false)?;
            let mut found = Vec::new();
            for (i, s) in header.slots.iter().enumerate() {
                let asked = slot.is_none_or(|slot| slot as usize == i);
                if s.active && asked && keys::try_slot(dev, area, header, s, old)?.is_some() {
                    found.push(i);
                }
            }
            if found.is_empty() {
                return Err(Error::BadKey(dev.name().clone()));
            }
            found
        }
    };
    if gone.len() == active {
        let what = "without the key slots that are to be taken away nobody could open it any more";
        return Err(refused(dev, what.into()));
    }
    gone.into_iter().try_for_each(|i| destroy(dev, area, header, i))
}

/// Make slot `i` inactive, and what was in it noise.
fn destroy(dev: &Device, area: Area, header: &mut Header, i: usize) -> Result<()> {
    let len = header.slots.get(i).map_or(0, |s| header.split_len(s));
    let Some(slot) = header.slots.get_mut(i) else {
        return Err(Error::Internal(format!("no key slot {i}")));
    };
    slot.active = false;
    let offset = area.offset + slot.offset;
    let (at, record) = header.slot_record(i);
    dev.write_slice(&record[..4], area.offset + at, ReqFlags::NONE)?;
    dev.flush()?;
    let mut noise = crypto::blank(len as usize);
    keys::fill(&mut noise)?;
    dev.write_slice(&noise, offset, ReqFlags::NONE)?;
    dev.flush()?;
    if let Some(slot) = header.slots.get_mut(i) {
        (slot.iterations, slot.salt) = (0, [0; super::header::SALT]);
    }
    let (at, record) = header.slot_record(i);
    dev.write_slice(&record, area.offset + at, ReqFlags::NONE)?;
    dev.flush()
}
