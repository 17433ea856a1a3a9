//! one-image.rs with imago in place of libqblk.

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

fn main() -> std::io::Result<()> {
    let image = std::env::args_os().nth(1).unwrap_or_default();
    let image = Qcow2::<File>::builder_path(image).open(PermissiveImplicitOpenGate::default())?;
    let image = FormatAccess::new(image);
    let mut buf = [0u8; 4096];
    image.read(&mut buf[..], 0)?;
    println!("{}", resident_kib());
    Ok(())
}

include!("../resident.rs");
