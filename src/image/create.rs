//! Making images.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::chain::{self, Source};
use super::how;
use super::key;
use super::{OpenFlags, Options, Use};
use crate::block::*;
use crate::crypto::Secret;
use crate::file::{self, Locking};
use crate::format::{self, Kind, luks, qcow2};

/// Make the image `name` of `size` bytes. Leaves no half file behind when it fails.
pub fn create(name: &OsStr, format: &str, size: u64, options: &Options) -> Result<()> {
    options.check(Use::Create)?;
    let Some(kind) = format::by_name(format) else {
        let known = format::EXPECTED;
        return Err(Error::invalid(format!("format {}: {known}", quoted(format.as_bytes()))));
    };
    if name.as_bytes().starts_with(b"layers:") {
        let text = "layers stand on an image that is there; make that";
        return Err(Error::unsupported(&name.to_owned().into(), text));
    }
    let path = match chain::parse_name(name)? {
        Source::Path(path) => Name::from(path.to_owned()),
        Source::Memory(_) => return Err(Error::invalid("mem: is made by opening it")),
        Source::Plugin(_) => {
            return Err(Error::Refused {
                file: name.to_owned().into(),
                what: "a plugin's bytes are its own to make; open it and write to it".into(),
                errno: libc::ENOTSUP,
            });
        }
        Source::Remote(_) => {
            let text = "an NBD export is made by its server; write to it as it is";
            return Err(Error::unsupported(&name.to_owned().into(), text));
        }
    };
    if size > i64::MAX as u64 {
        return Err(Error::TooBig {
            file: path,
            what: format!("{size} bytes are more than a file can have ({})", i64::MAX),
        });
    }
    let exclusive = options.switch("exclusive")?.unwrap_or(false);
    let lock = how::locking(options, OpenFlags::RDWR, Locking::default())?;
    let data = match options.get("data-file") {
        Some(name) if kind == Kind::Qcow2 => Some(data_file_name(&path, name)?),
        _ => None,
    };
    let files = std::iter::once((&path, format)).chain(data.as_ref().map(|data| (data, "raw")));
    let _lease = super::managed::lease_files(&files.collect::<Vec<_>>(), options)?;
    match kind {
        Kind::Raw => {
            options.refuse("format raw", &[QCOW2_ONLY, LUKS_ONLY, &["key", "key-file"]])?;
            let prealloc = preallocation(options)?;
            if prealloc == Prealloc::Metadata {
                return Err(Error::invalid("preallocation=metadata: a raw image has no metadata"));
            }
            let file = file::create_locked(&path, exclusive, lock)?;
            let driver = file.open()?;
            if driver.kind() != "file" {
                // A block device is as it is: it has to be large enough, that is all.
                if driver.size() < size {
                    return Err(too_small(&path, driver.size(), size));
                }
            } else {
                driver.resize(size, prealloc, true)?;
            }
            driver.close()?;
            file.keep();
            Ok(())
        }
        Kind::Luks => {
            options.refuse("format luks", &[QCOW2_ONLY])?;
            if !size.is_multiple_of(512) {
                return Err(Error::invalid(format!(
                    "{size} bytes: an encrypted image has whole sectors of 512 bytes"
                )));
            }
            let locking = locking(&path, options, "")?;
            let prealloc = preallocation(options)?;
            if prealloc == Prealloc::Metadata {
                return Err(Error::invalid("preallocation=metadata: a LUKS image has no metadata"));
            }
            let all = size.checked_add(locking.header_len()).filter(|n| *n <= i64::MAX as u64);
            let all = all.ok_or_else(|| Error::TooBig {
                file: path.clone(),
                what: format!("{size} bytes and a header are more than a file can have"),
            })?;
            let file = file::create_locked(&path, exclusive, lock)?;
            let driver = file.open()?;
            if driver.kind() != "file" {
                if driver.size() < all {
                    return Err(too_small(&path, driver.size(), all));
                }
            } else {
                driver.resize(all, prealloc, true)?;
            }
            let device = Device::new(driver);
            locking.write(&device, 0)?;
            device.driver().close()?;
            file.keep();
            Ok(())
        }
        Kind::Qcow2 => {
            let geometry = qcow2_options(&path, size, options)?;
            let data = match data {
                Some(data) => {
                    // Encrypted sectors are whole.
                    let sector = if geometry.encrypt.is_some() { 512 } else { 1 };
                    let size = size.next_multiple_of(sector);
                    Some(data_file(&path, data, size, exclusive, lock)?)
                }
                None => None,
            };
            let file = file::create_locked(&path, exclusive, lock)?;
            let device = Device::new(file.open()?);
            qcow2::create(&device, size, &geometry)?;
            let data_device = data.as_ref().map(file::Creating::open).transpose()?.map(Device::new);
            if geometry.prealloc != Prealloc::Off {
                let key = if geometry.encrypt.is_some() { key::read(options)? } else { None };
                preallocate(device, data_device, size, geometry.prealloc, key)?;
            } else {
                device.driver().close()?;
            }
            if let Some(data) = data {
                data.keep();
            }
            file.keep();
            Ok(())
        }
    }
}

/// Options for creating qcow2, and nothing else.
const QCOW2_ONLY: &[&str] = &[
    "cluster-size",
    "compat",
    "compression-type",
    "data-file",
    "data-file-raw",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.format",
    "encrypt.hash-alg",
    "encrypt.iter-time",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encryption",
    "extended-l2",
    "lazy-refcounts",
    "refcount-bits",
    "backing-file",
    "backing-fmt",
];
/// Options for creating LUKS, and nothing else.
const LUKS_ONLY: &[&str] =
    &["cipher-alg", "cipher-mode", "hash-alg", "iter-time", "ivgen-alg", "ivgen-hash-alg"];

/// What new data is encrypted with: `key`, and the options with `prefix` before their names.
fn locking(path: &Name, options: &Options, prefix: &str) -> Result<luks::Locking> {
    let key = |name: &str| format!("{prefix}{name}");
    let text = |name: &str| options.text(&key(name));
    let names = luks::Names {
        cipher_alg: text("cipher-alg")?,
        cipher_mode: text("cipher-mode")?,
        ivgen_alg: text("ivgen-alg")?,
        ivgen_hash_alg: text("ivgen-hash-alg")?,
        hash_alg: text("hash-alg")?,
    };
    // As long as QEMU and cryptsetup take; no more than what an opening still takes for honest.
    let ms = options.number(&key("iter-time"), 1..=60_000)?.unwrap_or(2000);
    let passphrase = key::read(options)?.ok_or_else(|| Error::NeedKey(path.clone()))?;
    luks::Locking::new(&names, ms.into(), passphrase)
}

fn too_small(path: &Name, has: u64, wants: u64) -> Error {
    Error::invalid(format!("{path}: the device has {has} bytes, too few for {wants}"))
}

/// Give a new, empty image its clusters.
fn preallocate(
    device: Device,
    data: Option<Device>,
    size: u64,
    prealloc: Prealloc,
    key: Option<Secret>,
) -> Result<()> {
    let params = format::Params {
        write: true,
        info_only: false,
        probed: false,
        l2_cache: None,
        untrusted: false,
        snapshot: None,
        key,
        calls: Arc::new(InFlight::default()),
    };
    let mut image = qcow2::Qcow2::open(device, params)?;
    if let Some(data) = data {
        image.attach_data(data);
    }
    image.preallocate(0, size, prealloc)?;
    image.settle()
}

/// The option `preallocation`.
pub(super) fn preallocation(options: &Options) -> Result<Prealloc> {
    let names = ["off", "metadata", "falloc", "full"];
    let i = options.one_of("preallocation", &names)?.unwrap_or(0);
    Ok(Prealloc::parse(names[i]).unwrap_or_default())
}

fn qcow2_options(path: &Name, size: u64, options: &Options) -> Result<qcow2::Geometry> {
    options.refuse("format qcow2, whose options begin with 'encrypt.'", &[LUKS_ONLY])?;
    let encrypt = encryption(path, options)?;
    let v3 = match options.one_of("compat", &["0.10", "v2", "1.1", "v3"])? {
        Some(i) => i >= 2,
        None => true,
    };
    let cluster_size = options.size("cluster-size")?.unwrap_or(65536);
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return Err(Error::invalid(format!(
            "option 'cluster-size': found {cluster_size}, expected a power of two from 512 to 2M"
        )));
    }
    let widths = ["1", "2", "4", "8", "16", "32", "64"];
    let refcount_order = options.one_of("refcount-bits", &widths)?.unwrap_or(4) as u32;
    let lazy = options.switch("lazy-refcounts")?.unwrap_or(false);
    let zstd = options.one_of("compression-type", &["zlib", "zstd"])? == Some(1);
    if !v3 && (refcount_order != 4 || lazy || zstd) {
        return Err(Error::invalid(
            "compat=0.10 has refcount-bits=16, lazy-refcounts=off and compression-type=zlib only",
        ));
    }
    let extended = options.switch("extended-l2")?.unwrap_or(false);
    let data_file = data_file_options(options)?;
    if !v3 && (extended || data_file.is_some()) {
        return Err(Error::invalid("compat=0.10 has extended-l2=off and no data-file"));
    }
    if extended && cluster_size < 16384 {
        return Err(Error::invalid(format!(
            "option 'extended-l2': clusters of {cluster_size} bytes are too small for subclusters (at \
             least 16k)"
        )));
    }
    let backing = match options.get("backing-file") {
        None | Some(b"") if options.get("backing-fmt").is_some() => {
            return Err(Error::invalid("option 'backing-fmt' has no use without 'backing-file'"));
        }
        None | Some(b"") => None,
        Some(name) => Some(backing(path, name, options)?),
    };
    let is_raw = data_file.as_ref().is_some_and(|d| d.raw);
    if is_raw && backing.is_some() {
        return Err(Error::invalid(
            "option 'data-file-raw' with 'backing-file': the data file alone would not hold the data",
        ));
    }
    let prealloc = match preallocation(options)? {
        // Only clusters that are mapped are what the data file says.
        Prealloc::Off if is_raw => Prealloc::Metadata,
        how => how,
    };
    if prealloc != Prealloc::Off && backing.is_some() && !extended {
        return Err(Error::invalid(
            "option 'preallocation' with 'backing-file': allocated clusters would hide the backing file \
             (with 'extended-l2' they do not)",
        ));
    }
    let geometry = qcow2::Geometry {
        v3,
        cluster_bits: cluster_size.trailing_zeros(),
        refcount_order,
        lazy,
        zstd,
        encrypt,
        backing,
        prealloc,
        extended,
        data_file,
    };
    geometry.check(path, size)?;
    Ok(geometry)
}

/// The data file that a new image is to have.
fn data_file_options(options: &Options) -> Result<Option<qcow2::DataFile>> {
    let raw = options.switch("data-file-raw")?.unwrap_or(false);
    match options.get("data-file") {
        None if raw => Err(Error::invalid("option 'data-file-raw' has no use without 'data-file'")),
        None => Ok(None),
        Some(name) => Ok(Some(qcow2::DataFile { name: name.to_vec(), raw })),
    }
}

/// Where the data file of a new image is: where it will be looked for when the image is opened.
fn data_file_name(path: &Name, name: &[u8]) -> Result<Name> {
    if name.is_empty() {
        return Err(Error::invalid("option 'data-file': the name is empty"));
    }
    match chain::parse_name(OsStr::from_bytes(name))? {
        Source::Path(name) => Ok(Name::from(chain::beside(path.as_path(), Path::new(name)))),
        _ => Err(Error::unsupported(path, "making a data file that is not a local one")),
    }
}

/// Make the data file `name` of a new image, as long as that.
fn data_file(
    path: &Name,
    name: Name,
    size: u64,
    exclusive: bool,
    lock: Locking,
) -> Result<file::Creating> {
    let same = |a: &Path, b: &Path| {
        std::fs::canonicalize(a).is_ok_and(|a| std::fs::canonicalize(b).is_ok_and(|b| a == b))
    };
    if name.as_path() == path.as_path() || same(name.as_path(), path.as_path()) {
        return Err(Error::invalid(format!("{path}: can not be its own data file")));
    }
    let file = file::create_locked(&name, exclusive, lock)?;
    let driver = file.open()?;
    if driver.kind() == "file" {
        driver.resize(size, Prealloc::Off, true)?;
    } else if driver.size() < size {
        return Err(too_small(&name, driver.size(), size));
    }
    driver.close()?;
    Ok(file)
}

/// What the data of a new qcow2 image is encrypted with.
fn encryption(path: &Name, options: &Options) -> Result<Option<luks::Locking>> {
    let old = options.switch("encryption")?.unwrap_or(false);
    match options.get("encrypt.format") {
        None | Some(b"off") if !old => {
            options.refuse("no option 'encrypt.format'", &[&["key", "key-file"]])?;
            let only: Vec<&str> = QCOW2_ONLY
                .iter()
                .copied()
                .filter(|k| k.starts_with("encrypt.") && *k != "encrypt.format")
                .collect();
            options.refuse("no option 'encrypt.format'", &[&only])?;
            Ok(None)
        }
        Some(b"luks") if !old => locking(path, options, "encrypt.").map(Some),
        // Images that there are can be used; it is too weak to make more of them.
        None | Some(b"aes" | b"off" | b"luks") => Err(Error::unsupported(
            path,
            "creating with the old AES encryption (encrypt.format=luks is)",
        )),
        Some(other) => Err(Error::invalid(format!(
            "option 'encrypt.format': found {}, expected luks",
            quoted(other)
        ))),
    }
}

/// The backing file to record, which must be there, and its format: given, or found now, when it is
/// still the caller's word and not a guest's.
fn backing(path: &Name, name: &[u8], options: &Options) -> Result<format::BackingRef> {
    let local = name.strip_prefix(b"file:").unwrap_or(name);
    let below = chain::beside(path.as_path(), Path::new(OsStr::from_bytes(local)));
    // As a path, whatever it begins with.
    let mut below_name = OsString::from("file:");
    below_name.push(&below);
    let mut how = Options::new();
    if let Some(fmt) = options.get("backing-fmt") {
        how.set("format", Some(fmt));
    }
    let image = super::Image::open(&below_name, &how, OpenFlags::INFO_ONLY)?;
    chain::refuse_loop(path, below.as_os_str(), &how)?;
    let format = image.info()?.format.as_bytes().to_vec();
    Ok(format::BackingRef { name: name.to_vec(), format: Some(format) })
}
