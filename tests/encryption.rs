//! Encrypted images, beside those of qemu-img and cryptsetup: LUKS by itself, LUKS and the old AES
//! inside qcow2. What they make is read to the byte here, what is made here opens there.

mod common;
#[path = "encryption/hostile.rs"]
mod hostile;
#[path = "encryption/luks.rs"]
mod luks;
#[path = "encryption/qcow2.rs"]
mod qcow2;

use std::ffi::OsStr;
use std::path::Path;

use common::*;
use qblk::{Error, Image, OpenFlags, Options, ReqFlags};

/// The passphrase of most images here. QEMU takes it as `data=`, so it is plain text.
const KEY: &str = "open sesame";

/// The key that QEMU is given, and how an image's options name it.
fn secret(key: &str) -> String {
    format!("secret,id=s,data={key}")
}

/// How QEMU opens an encrypted image.
fn image_opts(path: &Path, format: &str) -> String {
    let path = path.display();
    match format {
        "luks" => format!("driver=luks,key-secret=s,file.driver=file,file.filename={path}"),
        "aes" => {
            format!(
                "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,file.driver=file,file.filename={path}"
            )
        }
        _ => format!(
            "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={path}"
        ),
    }
}

/// `qemu-io` commands on an encrypted image, which must succeed.
fn qemu_io_key(path: &Path, format: &str, commands: &[&str]) -> String {
    let (secret, image) = (secret(KEY), image_opts(path, format));
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"--object", &secret, &"--image-opts"];
    for c in commands {
        args.push(&"-c");
        args.push(c);
    }
    args.push(&image);
    let out = run_ok("qemu-io", &args);
    assert!(!out.contains("failed"), "qemu-io {commands:?}: {out}");
    out
}

/// QEMU reads exactly these bytes from an encrypted image.
fn qemu_reads(path: &Path, format: &str, bytes: &[u8], scratch: &Path) {
    let (secret, image) = (secret(KEY), image_opts(path, format));
    let out: &dyn AsRef<OsStr> = &scratch;
    run_ok(
        "qemu-img",
        &[&"convert", &"--object", &secret, &"--image-opts", &image, &"-O", &"raw", out],
    );
    let got = std::fs::read(scratch).unwrap();
    assert_eq!(got.len(), bytes.len());
    let differs = got.iter().zip(bytes).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{} differs", path.display());
}

/// QEMU makes an encrypted image.
fn qemu_create(path: &Path, format: &str, opts: &str, size: &str) {
    let secret = secret(KEY);
    run_ok(
        "qemu-img",
        &[&"create", &"-q", &"--object", &secret, &"-f", &format, &"-o", &opts, &path, &size],
    );
}

fn with_key(key: &str) -> Options {
    Options::new().with("key", key)
}

fn open_key(path: &Path, flags: OpenFlags) -> Image {
    open_with(path, &with_key(KEY), flags)
}

/// Random writes of all sizes and alignments to an image and to `model`, some with FUA, and reads.
fn scribble(image: &Image, model: &mut [u8], rng: &mut Rng, count: usize) {
    for _ in 0..count {
        let len = match rng.below(4) {
            0 => rng.range(1, 600),
            1 => 512 * rng.range(1, 9),
            2 => rng.range(1, 70_000),
            _ => 4096 * rng.range(1, 100),
        };
        let len = len.min(model.len() as u64);
        let mut at = rng.below(model.len() as u64 - len + 1);
        if rng.one_in(2) {
            at &= !511;
        }
        let range = at as usize..(at + len) as usize;
        let flags = if rng.one_in(8) { ReqFlags::FUA } else { NONE };
        match rng.below(8) {
            0..4 => {
                let data = rng.bytes(len as usize);
                image.write_at(&data, at, flags).unwrap();
                model[range].copy_from_slice(&data);
            }
            4 => {
                let may_trim = if rng.one_in(2) { ReqFlags::MAY_TRIM } else { NONE };
                image.zero(at, len, may_trim).unwrap();
                model[range].fill(0);
            }
            5 => {
                let before = read_range(image, at, len);
                image.trim(at, len, NONE).unwrap();
                let after = read_range(image, at, len);
                for ((b, a), m) in before.iter().zip(&after).zip(&mut model[range]) {
                    assert!(a == b || *a == 0, "a trim made bytes up");
                    *m = *a;
                }
            }
            _ => assert!(read_range(image, at, len) == model[range], "read {len}@{at}"),
        }
    }
    assert_same(&read_all(image), model, 0, "after all");
}

fn error(path: &Path, options: &Options, flags: OpenFlags) -> Error {
    open_error(path, options, flags)
}
