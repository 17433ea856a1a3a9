//! `readonly`: what is below can not be changed through this layer.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "readonly",
    about: "refuse every change; what is below is opened read-only",
    keys: &[],
    writes_below: never,
    open,
};

struct ReadOnly(Device);

fn open(_: &Settings, source: Arc<dyn Source>, _write: bool) -> Result<Box<dyn Driver>> {
    Ok(Stacked::boxed(ReadOnly(source.open(false)?)))
}

impl Layer for ReadOnly {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.0
    }
    fn caps(&self) -> Caps {
        Caps { read_only: true, ..self.0.caps().clone() }
    }
}
