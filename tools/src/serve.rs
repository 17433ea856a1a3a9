//! `qblk serve`: images as NBD exports, until a signal or the end of a command says stop.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qblk::block::{ErrorKind, quoted};
use qblk::nbd::server::{Export, Server, Totals};
use qblk::{Image, OpenFlags};
use serde_json::json;

use crate::cli::{ServeArgs, Setting};
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::{name_of, path_of, value};
use crate::place::{self, Place, Private};
use crate::runner;
use crate::signals::Held;
use crate::units::{human_and_exact, shown};

/// The name that stands for all names.
const ANY: &[u8] = b"*";
/// Where to listen unless something else is said.
const DEFAULT: &str = "nbd://localhost";

/// What is to be exported.
struct Wanted<'a> {
    name: Vec<u8>,
    image: &'a OsStr,
}

pub fn run(args: &ServeArgs) -> Result<()> {
    // First of all, for it changes the environment.
    let mut places = place::handed_over()?;
    for text in &args.uris {
        places.push(Place::parse(text)?);
    }
    places.extend(args.unix.iter().map(|path| Place::unix(path)));
    let wanted = wanted(args)?;
    check_names(&places, &wanted)?;
    let settings = settings(args, &places)?;
    if args.open.shared && !args.read_only {
        return Err(Failure::usage("--shared is for reading only: it needs --read-only"));
    }
    let server = Server::new()?;
    for s in &settings {
        server.set(&s.key, &s.value)?;
    }
    let images = export(args, &server, &wanted)?;

    let private = match (&args.run, places.is_empty()) {
        (Some(_), true) => Some(Private::new()?),
        _ => None,
    };
    if let Some(private) = &private {
        places.push(private.place());
    } else if places.is_empty() {
        places.push(Place::parse(OsStr::new(DEFAULT))?);
    }
    let held = Held::new();
    let tls = value(&settings, "tls") == Some(b"required");
    for place in &mut places {
        place.listen(&server).map_err(|e| hint(args, e))?;
    }
    let pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    let ended = match &args.run {
        Some(command) => run_command(command, &wanted, &places, tls, &held),
        None => announce(args, &wanted, &places, tls).map(|()| {
            while held.wait().signal == libc::SIGCHLD {}
            0
        }),
    };
    // Nobody is to come any more, and if a second signal ends us now, nothing is left behind.
    drop((pid_file, private));
    held.release();
    let stopped = stop(args, server, images);
    match ended {
        Ok(0) => stopped,
        Ok(status) => {
            if let Err(e) = stopped {
                say(&e.text().unwrap_or_default());
            }
            Err(Failure::Command(status))
        }
        Err(e) => Err(e),
    }
}

/// The exports that the command line asks for, by their names.
fn wanted(args: &ServeArgs) -> Result<Vec<Wanted<'_>>> {
    let one = args.images.len() + args.exports.len() == 1;
    let single = [
        (args.name.is_some(), "--name"),
        (args.description.is_some(), "--description"),
        (args.bitmap.is_some(), "--bitmap"),
    ];
    if let Some((_, flag)) = single.iter().find(|(given, _)| *given && !one) {
        return Err(Failure::usage(format!(
            "{flag} is for one image; of several, each has its name by --export NAME=IMAGE"
        )));
    }
    let name = |image: &OsStr| match (&args.name, one) {
        (Some(name), _) => name.as_bytes().to_vec(),
        (None, true) => ANY.to_vec(),
        (None, false) => {
            let path = path_of(image);
            let file = path.as_deref().and_then(Path::file_name).map(OsStr::as_bytes);
            file.unwrap_or_else(|| name_of(image)).to_vec()
        }
    };
    let plain = args.images.iter().map(|image| Wanted { name: name(image), image });
    let named =
        args.exports.iter().map(|e| Wanted { name: e.name.clone(), image: e.image.as_os_str() });
    let all: Vec<_> = plain.chain(named).collect();
    for (i, w) in all.iter().enumerate() {
        if all[..i].iter().any(|other| other.name == w.name) {
            return Err(Failure::usage(format!(
                "two exports have the name {}; --export NAME=IMAGE gives them others",
                quoted(&w.name)
            )));
        }
    }
    Ok(all)
}

/// The name that a client has to say, if there is one.
fn export_name<'a>(wanted: &'a Wanted<'_>) -> Option<&'a [u8]> {
    (wanted.name != ANY).then_some(&wanted.name)
}

/// A URI that names an export has to name one that there will be.
fn check_names(places: &[Place], wanted: &[Wanted<'_>]) -> Result<()> {
    for uri in places.iter().filter_map(|p| p.uri.as_ref()).filter(|u| !u.export.is_empty()) {
        if !wanted.iter().any(|w| w.name == uri.export || w.name == ANY) {
            let names: Vec<_> = wanted.iter().map(|w| quoted(&w.name)).collect();
            return Err(Failure::usage(format!(
                "--uri {uri}: there is no export of that name, only {}",
                names.join(", ")
            )));
        }
    }
    Ok(())
}

/// The settings of the server, with what the URIs say of TLS.
fn settings(args: &ServeArgs, places: &[Place]) -> Result<Vec<Setting>> {
    let mut all: Vec<Setting> = Vec::new();
    let mut put = |key: &str, value: &[u8]| {
        all.push(Setting { key: key.into(), value: value.to_vec() });
    };
    for uri in places.iter().filter_map(|p| p.uri.as_ref()) {
        if let Some(dir) = &uri.tls_certificates {
            put("tls-certificates", dir.as_os_str().as_bytes());
        }
    }
    // The directory first, so that single files can take the place of what is in it.
    for (key, given) in [
        ("tls", &args.tls),
        ("tls-certificates", &args.tls_certificates),
        ("tls-certificate", &args.tls_certificate),
        ("tls-key", &args.tls_key),
        ("tls-ca", &args.tls_ca),
        ("tls-verify-peer", &args.tls_verify_peer),
    ] {
        if let Some(given) = given {
            put(key, given.as_bytes());
        }
    }
    all.extend(args.settings.iter().cloned());
    let secret = places.iter().any(Place::needs_tls);
    match value(&all, "tls") {
        // Who names a certificate does not want to be served in the clear.
        None if secret || all.iter().any(|s| s.key.starts_with("tls")) => {
            all.push(Setting { key: "tls".into(), value: b"required".to_vec() });
        }
        Some(b"off") if secret => {
            return Err(Failure::usage("--tls off, and a URI that requires TLS (nbds)"));
        }
        Some(b"on") if secret => {
            return Err(Failure::usage(
                "--tls on leaves it to clients, and a URI requires TLS (nbds): say --tls required",
            ));
        }
        _ => {}
    }
    Ok(all)
}

/// Open the images and export them. What is answered has to be closed when the server is gone.
fn export(args: &ServeArgs, server: &Server, wanted: &[Wanted<'_>]) -> Result<Vec<Image>> {
    let write = if args.read_only { OpenFlags::default() } else { OpenFlags::RDWR };
    let mut images = Vec::new();
    for w in wanted {
        let image = args.open.open(w.image, write).map_err(|e| hint(args, e))?;
        let text = args.description.as_deref().unwrap_or_default().as_bytes().to_vec();
        let own = image.own_context()?;
        let mut export = Export::new(w.name.clone(), text, own, Arc::default(), args.read_only)?;
        if let Some(bitmap) = &args.bitmap {
            export.show_bitmap(bitmap.as_bytes())?;
        }
        server.add(export)?;
        images.push(image);
    }
    Ok(images)
}

/// Say what would help.
fn hint(args: &ServeArgs, e: Failure) -> Failure {
    let Failure::Library(e) = e else { return e };
    let text = match e.kind() {
        ErrorKind::Errno(libc::EACCES | libc::EPERM | libc::EROFS)
            if !args.read_only && !matches!(e, qblk::Error::Net { .. }) =>
        {
            "--read-only serves what cannot be written"
        }
        ErrorKind::Errno(libc::EADDRINUSE) => "--uri and --unix choose another place",
        _ => return e.into(),
    };
    Failure::said(format!("{e} ({text})"))
}

/// Run the command of `--run`; it is told of the first export at the first place.
fn run_command(
    command: &OsStr,
    wanted: &[Wanted<'_>],
    places: &[Place],
    tls: bool,
    held: &Held,
) -> Result<u8> {
    let name = wanted.first().and_then(export_name);
    let found = places.iter().find_map(|place| Some((place, place.uri_of(name, tls)?)));
    let Some((place, uri)) = found else {
        return Err(Failure::said("--run: nothing tells the address of the socket handed over"));
    };
    runner::run(command, &uri, place, held)
}

/// Say what is served, and where.
fn announce(args: &ServeArgs, wanted: &[Wanted<'_>], places: &[Place], tls: bool) -> Result<()> {
    if args.quiet {
        return Ok(());
    }
    let mut text = String::new();
    for (place, w) in places.iter().flat_map(|p| wanted.iter().map(move |w| (p, w))) {
        let uri = place.uri_of(export_name(w), tls);
        let how = if args.read_only { " read-only" } else { "" };
        text += &format!(
            "serving {}{how} at {}\n",
            shown(w.image),
            uri.as_deref().unwrap_or("the socket that was handed over")
        );
    }
    if args.json {
        // Standard output is for the JSON.
        let _ = std::io::stderr().write_all(text.as_bytes());
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::from) {
        // Clients can come, whether or not somebody reads of it.
        Err(Failure::OutputGone) => Ok(()),
        result => result,
    }
}

/// Let the requests under way end, and close everything.
fn stop(args: &ServeArgs, server: Server, images: Vec<Image>) -> Result<()> {
    let stopped = server.stop(args.drain);
    let totals = server.stats();
    // A device that does not answer would keep us from ending.
    let hangs = matches!(&stopped, Err(e) if e.kind() == ErrorKind::Errno(libc::ETIMEDOUT));
    let mut result = stopped.map_err(Failure::from);
    if !hangs {
        // The last context of an image is to be ours: closing it tells how it went.
        drop(server);
        for image in images {
            let closed = image.close().map_err(Failure::from);
            result = result.and(closed);
        }
    }
    if args.stats {
        let told = tell(args, &totals);
        result = result.and(told);
    }
    result
}

fn tell(args: &ServeArgs, t: &Totals) -> Result<()> {
    if args.json {
        return json::print(&json!({
            "connections": t.connections,
            "refused": t.refused,
            "reads": t.reads,
            "read_bytes": t.read_bytes,
            "writes": t.writes,
            "write_bytes": t.write_bytes,
            "others": t.others,
            "errors": t.errors,
        }));
    }
    let rows = [
        ("connections", format!("{} ({} refused)", t.connections, t.refused)),
        ("reads", format!("{}, {}", t.reads, human_and_exact(t.read_bytes))),
        ("writes", format!("{}, {}", t.writes, human_and_exact(t.write_bytes))),
        ("other requests", t.others.to_string()),
        ("answered with an error", t.errors.to_string()),
    ];
    let text: String =
        rows.iter().map(|(key, value)| format!("{:<24} {value}\n", format!("{key}:"))).collect();
    let _ = std::io::stderr().write_all(text.as_bytes());
    Ok(())
}

fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("qblk: {text}\n").as_bytes());
}

/// A file that tells our process id for as long as we serve.
struct PidFile(PathBuf);

impl PidFile {
    fn write(name: &OsStr) -> Result<Self> {
        let failed = |e: std::io::Error| Failure::io(quoted(name.as_bytes()), &e);
        // Renamed, so that nobody finds it empty.
        let mut new = name.to_owned();
        new.push(format!(".{}", std::process::id()));
        std::fs::write(&new, format!("{}\n", std::process::id())).map_err(failed)?;
        if let Err(e) = std::fs::rename(&new, name) {
            let _ = std::fs::remove_file(&new);
            return Err(failed(e));
        }
        Ok(Self(name.into()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
