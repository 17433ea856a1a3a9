//! `noextents`: what is below does not tell where its holes are.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "noextents",
    about: "tell of no holes: everything is data",
    keys: &[],
    writes_below: always,
    open,
};

struct NoExtents(Device);

fn open(_: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    Ok(Stacked::boxed(NoExtents(source.open(write)?)))
}

impl Layer for NoExtents {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.0
    }
    fn caps(&self) -> Caps {
        Caps { extents: false, sparse: false, ..self.0.caps().clone() }
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        out.push(Extent::new(offset, count, Extent::ALLOCATED | Extent::DATA | Extent::OWNED));
        Ok(())
    }
}
