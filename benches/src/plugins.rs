//! What plugins and layers add to a call, and a C plugin that is served. The difference of two loops is
//! taken in turns within each sample, so that what the machine does meanwhile cancels out.

use std::ffi::{CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use qblk::{Image, OpenFlags, Options};

use crate::Plan;
use crate::images::{Images, On};
use crate::load::Load;
use crate::nbd;
use crate::qemu::missing;
use crate::row::{Against::*, Contender, Row, Unit, Who};
use crate::rows::to_reach;
use crate::work::{Res, Sample};

/// Calls in a turn.
const TURN: u32 = 20_000;
/// Bytes of a call.
const BLOCK: usize = 4096;

/// Compile one of the plugins of benches/plugin/.
fn built(images: &Images, name: &str) -> Res<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let object = images.dir(On::Tmpfs).join(format!("{name}.so"));
    let out = Command::new("cc")
        .args(["-O2", "-shared", "-fPIC", "-I"])
        .arg(here.join("../include"))
        .arg("-o")
        .arg(&object)
        .arg(here.join("plugin").join(format!("{name}.c")))
        .output()
        .map_err(|e| missing("cc", &e))?;
    match out.status.success() {
        true => Ok(object),
        false => Err(format!("cc: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

fn open(name: &str, layers: &str) -> Res<Image> {
    let mut options = Options::new().with("format", "raw");
    if !layers.is_empty() {
        options.set("layers", Some(layers.as_bytes()));
    }
    Image::open(name.as_ref(), &options, OpenFlags::default()).map_err(|e| e.to_string())
}

/// Nanoseconds of one call.
fn each(mut call: impl FnMut(u64) -> Res<()>) -> Res<f64> {
    let begun = Instant::now();
    for i in 0..TURN {
        call(u64::from(i) * BLOCK as u64)?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e9 / f64::from(TURN))
}

/// What `with` takes longer than `without`, nanoseconds.
fn difference(
    plan: &Plan,
    mut with: impl FnMut() -> Res<f64>,
    mut without: impl FnMut() -> Res<f64>,
) -> Res<Sample> {
    let start = Load::now();
    let mut all = Vec::new();
    while start.elapsed() < plan.seconds || all.len() < 5 {
        let (a, b) = (with()?, without()?);
        all.push(a - b);
    }
    all.sort_by(f64::total_cmp);
    let value = all[all.len() / 2];
    Ok(Sample { value, cpu_us: value / 1e3, foreign: start.used().foreign })
}

fn cost<'a>(run: impl FnMut() -> Res<Sample> + 'a, at_most: f64) -> Row<'a> {
    Row {
        unit: Unit::Nanos,
        contenders: vec![Contender { who: Who::Ours, run: Box::new(run) }],
        targets: vec![to_reach(AtMost(at_most), at_most)],
        remarks: Vec::new(),
    }
}

fn reads(image: &Image) -> impl FnMut() -> Res<f64> {
    let mut buf = vec![0; BLOCK];
    move || each(|at| image.read_at(&mut buf, at).map_err(|e| e.to_string()))
}

/// The function that the empty plugin reads by, for a call with nothing between.
type Pread = unsafe extern "C" fn(*mut c_void, *mut c_void, u64, u64, u32) -> c_int;

fn direct(object: &Path) -> Res<Pread> {
    let path = CString::new(object.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: an object of ours, which is never unloaded; the function has this type.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let symbol = match handle.is_null() {
            true => handle,
            false => libc::dlsym(handle, c"bench_pread".as_ptr()),
        };
        match symbol.is_null() {
            true => Err(format!("{}: no bench_pread in it", object.display())),
            false => Ok(std::mem::transmute::<*mut c_void, Pread>(symbol)),
        }
    }
}

/// A read through an empty C plugin, beside a call of its function.
pub fn one<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let object = built(images, "empty")?;
    let pread = direct(&object)?;
    let image = open(&format!("plugin:{}", object.display()), "")?;
    let run = move || {
        let mut buf = vec![0u8; BLOCK];
        let call = || {
            each(|at| {
                // SAFETY: it does not look at what it is given.
                let rc = unsafe {
                    pread(std::ptr::null_mut(), buf.as_mut_ptr().cast(), BLOCK as u64, at, 0)
                };
                if rc == 0 { Ok(()) } else { Err("it failed".to_owned()) }
            })
        };
        difference(plan, reads(&image), call)
    };
    Ok(cost(run, 60.0))
}

/// A read through three layers that change nothing, beside what is below them.
pub fn three<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let object = built(images, "empty")?;
    let name = format!("plugin:{}", object.display());
    let (stack, below) = (open(&name, "offset,offset,offset")?, open(&name, "")?);
    let run = move || difference(plan, reads(&stack), reads(&below));
    Ok(cost(run, 100.0))
}

/// A C plugin with a disk in memory behind our server, beside nbdkit and its own.
pub fn served<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let object = built(images, "memory")?;
    let name = format!("plugin:{}?size={}", object.display(), images.served);
    Ok(Row {
        unit: Unit::PerSecond,
        contenders: nbd::memory_disks(images, plan, &name, images.served),
        targets: vec![to_reach(Nbdkit, 1.3)],
        remarks: vec!["Both disks are in memory that was never written.".to_owned()],
    })
}
