//! The command line: what may be given, and the help that says so. No command does work here.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::units::{parse_byte, parse_nonzero_size, parse_size};

/// Look into disk images, make them, copy, resize, read, write, measure and serve them.
#[derive(Parser)]
#[command(name = "qblk", version, disable_help_subcommand = true, after_help = AFTER)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
Sizes and offsets are bytes, or take k, M, G, T, P, E (times 1024 each): 64k, 10G.
Exit status: 0 done, 1 failed, 2 called wrongly, 128+N ended by signal N.
See qblk(1) for everything, and for the keys of -o.";

#[derive(Subcommand)]
pub enum Command {
    /// Say what an image is
    Info(InfoArgs),
    /// Make a new, empty image
    Create(CreateArgs),
    /// Say, or draw, where an image's bytes live
    Map(MapArgs),
    /// Copy an image into a new one, keeping holes
    Copy(CopyArgs),
    /// Say whether an image is sound, or repair it
    Check(CheckArgs),
    /// Change an image's size
    Resize(ResizeArgs),
    /// List, make, apply or delete internal snapshots
    Snapshot(SnapshotArgs),
    /// Change what an image is like: its version, refcounts, backing file's name, keys
    Amend(AmendArgs),
    /// Write what an image has into its backing file, and empty it
    Commit(crate::chainwork::CommitArgs),
    /// Put an image on another backing file
    Rebase(crate::chainwork::RebaseArgs),
    /// Read bytes of the disk that an image holds
    Read(ReadArgs),
    /// Write bytes of the disk that an image holds
    Write(WriteArgs),
    /// Measure how fast an image is read or written
    Bench(BenchArgs),
    /// List and change the dirty bitmaps of an image
    Bitmap(crate::bitmap::BitmapArgs),
    /// Say who has an image locked
    Lock(crate::lock::LockArgs),
    /// Serve images by NBD, until a signal or the end of a command
    Serve(Box<ServeArgs>),
    /// List what an NBD server or a plugin exports
    List(ListArgs),
    /// List the layers that can be put on an image, and their settings
    Layers(crate::layers::LayersArgs),
    /// Say what a plugin is and can do
    Plugin(crate::plugin::PluginArgs),
}

/// One `KEY=VALUE`. Keys are text; values are bytes, for they may be names of files.
#[derive(Clone, Debug)]
pub struct Setting {
    pub key: String,
    pub value: Vec<u8>,
}

fn setting() -> impl TypedValueParser<Value = Setting> {
    OsStringValueParser::new().try_map(|text: OsString| {
        let bytes = text.as_bytes();
        let at = bytes.iter().position(|&b| b == b'=').filter(|&at| at > 0);
        let at = at.ok_or("expected KEY=VALUE, as in cluster-size=64k")?;
        match std::str::from_utf8(&bytes[..at]) {
            Ok(key) => Ok(Setting { key: key.to_owned(), value: bytes[at + 1..].to_vec() }),
            Err(_) => Err("the key is not text"),
        }
    })
}

/// An image and the name it is to be exported under.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: Vec<u8>,
    pub image: OsString,
}

fn named() -> impl TypedValueParser<Value = Named> {
    OsStringValueParser::new().try_map(|text: OsString| {
        let bytes = text.as_bytes();
        match bytes.iter().position(|&b| b == b'=') {
            Some(at) if at + 1 < bytes.len() => Ok(Named {
                name: bytes[..at].to_vec(),
                image: OsStr::from_bytes(&bytes[at + 1..]).to_owned(),
            }),
            _ => Err("expected NAME=IMAGE, as in disk=disk.qcow2"),
        }
    })
}

/// How an image is opened.
#[derive(Args, Default)]
pub struct OpenArgs {
    /// Format of the image: qcow2, luks or raw [default: found by probing]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Option for opening the image; may be given again
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = setting())]
    pub options: Vec<Setting>,
    /// The image is hostile: open nothing that it names (needs -f)
    #[arg(long, requires = "format")]
    pub untrusted: bool,
    /// Do not open the backing file: what is not in the image reads as zeroes
    #[arg(long)]
    pub no_backing: bool,
    /// Bypass the page cache
    #[arg(long)]
    pub direct: bool,
    /// Read although a writer has the image
    #[arg(long)]
    pub shared: bool,
    /// Take no locks
    #[arg(long)]
    pub no_lock: bool,
}

/// What a command that changes something says of it.
#[derive(Args)]
pub struct Told {
    /// Say what was done as JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args)]
pub struct InfoArgs {
    /// The image
    pub image: OsString,
    #[command(flatten)]
    pub open: OpenArgs,
    /// Also tell of the images below it
    #[arg(long, conflicts_with_all = ["untrusted", "no_backing"])]
    pub backing_chain: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct CreateArgs {
    /// The image to make
    pub image: OsString,
    /// Size of the disk, as in 10G [default: that of the backing file]
    #[arg(value_parser = parse_size, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// Format of the image: qcow2, luks or raw
    #[arg(short, long, value_name = "FMT", default_value = "qcow2")]
    pub format: String,
    /// What is not written in the image is read from FILE (relative to the image's directory)
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<OsString>,
    /// Format of the backing file [default: found by probing, now, and recorded]
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    pub backing_format: Option<String>,
    /// Option for the image, as qemu-img create has them; may be given again
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = setting())]
    pub options: Vec<Setting>,
    /// Overwrite a file that is not empty
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub told: Told,
}

#[derive(Args)]
pub struct MapArgs {
    /// The image
    pub image: OsString,
    #[command(flatten)]
    pub open: OpenArgs,
    /// Begin at this offset
    #[arg(long, value_name = "OFFSET", value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// So many bytes [default: to the end]
    #[arg(long, value_name = "LENGTH", value_parser = parse_size)]
    pub length: Option<u64>,
    /// Stop after so many extents
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_extents: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Draw it: an SVG picture in FILE (- for standard output)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "max_extents"])]
    pub svg: Option<OsString>,
}

#[derive(Args)]
pub struct CopyArgs {
    /// The image to copy
    pub source: OsString,
    /// The image to make, or with --no-create to write into; an NBD export is always written into
    pub target: OsString,
    /// Format of the source: qcow2, luks or raw [default: found by probing]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Format of the target: qcow2, luks or raw [default: that of the source]
    #[arg(short = 'O', long, value_name = "FMT")]
    pub target_format: Option<String>,
    /// Option for making the target (with --no-create: for opening it); may be given again
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = setting())]
    pub options: Vec<Setting>,
    /// Option for opening the source; may be given again
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting())]
    pub source_option: Vec<Setting>,
    /// Make the target an overlay of FILE that holds only what differs from it
    #[arg(short, long, value_name = "FILE", conflicts_with = "no_create")]
    pub backing: Option<OsString>,
    /// Format of the backing file [default: found by probing, now, and recorded]
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    pub backing_format: Option<String>,
    /// Write into the target that is there; it must be at least as large
    #[arg(long)]
    pub no_create: bool,
    /// Overwrite a file that is not empty
    #[arg(long, conflicts_with = "no_create")]
    pub force: bool,
    /// Shortest run of zeroes in data that is kept as a hole, a multiple of 4k; 0 writes all out
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_sparse, default_value = "4k")]
    pub sparse: u64,
    /// Threads that copy [default: one a processor, at least 2]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
    /// Write clusters in compressed form (qcow2; -o compression-type=zstd is quicker than zlib)
    #[arg(short, long)]
    pub compress: bool,
    /// The source is hostile: open nothing that it names (needs -f)
    #[arg(long, requires = "format")]
    pub untrusted: bool,
    /// Do not open the source's backing file: copy only what is in the source itself
    #[arg(long)]
    pub no_backing: bool,
    /// Bypass the page cache
    #[arg(long)]
    pub direct: bool,
    /// Read although a writer has the source
    #[arg(long)]
    pub shared: bool,
    /// Take no locks
    #[arg(long)]
    pub no_lock: bool,
    /// Show progress even if standard error is no terminal (as lines)
    #[arg(short, long, conflicts_with = "quiet")]
    pub progress: bool,
    #[command(flatten)]
    pub told: Told,
}

fn parse_sparse(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size if size.is_multiple_of(4096) && size <= 2 << 20 => Ok(size),
        _ => Err("expected 0 or a multiple of 4k up to 2M".into()),
    }
}

#[derive(Args)]
pub struct CheckArgs {
    /// The image; those below it are not looked at
    pub image: OsString,
    /// Repair leaks, or all that can be repaired
    #[arg(long, value_name = "WHAT", value_parser = ["leaks", "all"])]
    pub repair: Option<String>,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

#[derive(Args)]
pub struct ResizeArgs {
    /// The image
    pub image: OsString,
    /// The new size, as in 20G; +SIZE grows and -SIZE shrinks by so much
    #[arg(allow_hyphen_values = true, value_parser = parse_new_size)]
    pub size: NewSize,
    /// Allow the image to become smaller, which loses what lies beyond
    #[arg(long)]
    pub shrink: bool,
    /// Room for what is added: off, metadata, falloc or full
    #[arg(long, value_name = "HOW")]
    pub preallocation: Option<String>,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

/// A new size, perhaps told by the difference.
#[derive(Clone, Copy, Debug)]
pub enum NewSize {
    To(u64),
    By(u64),
    Less(u64),
}

fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(size) = text.strip_prefix('+') {
        parse_size(size).map(NewSize::By)
    } else if let Some(size) = text.strip_prefix('-') {
        parse_size(size).map(NewSize::Less)
    } else {
        parse_size(text).map(NewSize::To)
    }
}

#[derive(Args)]
pub struct SnapshotArgs {
    /// What to do
    pub action: SnapshotAction,
    /// The image
    pub image: OsString,
    /// The snapshot's name; to apply or delete it, its ID does as well
    pub name: Option<OsString>,
    /// What a new snapshot is told: id, date, vm-clock or icount; may be given again
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting())]
    pub set: Vec<Setting>,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SnapshotAction {
    /// List the snapshots
    List,
    /// Keep the disk as it is now in a new one
    Create,
    /// Make the disk what it was in one
    Apply,
    /// Forget one
    Delete,
}

#[derive(Args)]
pub struct AmendArgs {
    /// The image
    pub image: OsString,
    /// Format of the image: qcow2 or luks [default: found by probing]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// What is to be, as qemu-img amend has it: compat=1.1, refcount-bits=64...; may be given again
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = setting())]
    pub options: Vec<Setting>,
    /// Option for opening the image; may be given again
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting())]
    pub open_option: Vec<Setting>,
    #[command(flatten)]
    pub told: Told,
}

impl AmendArgs {
    /// Open the image.
    pub fn open(&self, flags: qblk::OpenFlags) -> crate::failure::Result<qblk::Image> {
        let settings = crate::open::with_format(&self.open_option, self.format.as_deref());
        Ok(qblk::Image::open(&self.image, &crate::open::options(&settings), flags)?)
    }
}

#[derive(Args)]
pub struct ReadArgs {
    /// The image
    pub image: OsString,
    /// Where to begin
    #[arg(value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// How many bytes [default: to the end]
    #[arg(value_parser = parse_size)]
    pub length: Option<u64>,
    /// Put them in FILE instead of on standard output
    #[arg(long, value_name = "FILE", visible_alias = "output")]
    pub to: Option<OsString>,
    /// Print a hexadecimal dump (as is done on a terminal)
    #[arg(long)]
    pub hex: bool,
    /// Print the bytes as they are, even on a terminal
    #[arg(long, conflicts_with = "hex")]
    pub raw: bool,
    #[command(flatten)]
    pub open: OpenArgs,
}

#[derive(Args)]
pub struct WriteArgs {
    /// The image
    pub image: OsString,
    /// Where to begin
    #[arg(value_parser = parse_size)]
    pub offset: u64,
    /// Write what FILE holds (- for standard input, which is also the default)
    #[arg(long, value_name = "FILE", group = "what")]
    pub from: Option<OsString>,
    /// Write this byte over and over, as in 0x5a
    #[arg(long, value_name = "BYTE", value_parser = parse_byte, group = "what", requires = "length")]
    pub pattern: Option<u8>,
    /// Make the range read as zeroes
    #[arg(long, group = "what", requires = "length")]
    pub zero: bool,
    /// Give the range back: what it reads as afterwards is the image's choice
    #[arg(long, group = "what", requires = "length")]
    pub trim: bool,
    /// How many bytes [default, for a file: to its end]
    #[arg(long, value_parser = parse_size)]
    pub length: Option<u64>,
    /// --zero may leave a hole
    #[arg(long, requires = "zero")]
    pub may_trim: bool,
    /// Each write is on stable storage before the next begins
    #[arg(long)]
    pub fua: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

#[derive(Args)]
pub struct BenchArgs {
    /// The image; mem:SIZE measures the library alone
    pub image: OsString,
    /// Write instead of reading. DESTROYS what is in the range
    #[arg(long)]
    pub write: bool,
    /// Bytes of a request
    #[arg(short, long, value_name = "SIZE", value_parser = parse_block_size, default_value = "4k")]
    pub block_size: u64,
    /// Threads, each with one request at a time
    #[arg(short, long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// Where requests go
    #[arg(short, long, value_name = "P", default_value = "random")]
    pub pattern: Pattern,
    /// How long [default: 5, unless --count is given]
    #[arg(short, long, value_name = "S", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
    /// How many requests, of all threads together
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Flush after every N writes of a thread
    #[arg(long, value_name = "N", requires = "write", value_parser = clap::value_parser!(u64).range(1..))]
    pub flush_every: Option<u64>,
    /// Begin of the range that is used
    #[arg(long, value_name = "OFFSET", value_parser = parse_size, default_value = "0")]
    pub offset: u64,
    /// Length of the range that is used [default: to the end]
    #[arg(long, value_name = "LENGTH", value_parser = parse_nonzero_size)]
    pub length: Option<u64>,
    /// Start of the random numbers: the same gives the same offsets
    #[arg(long, value_name = "N", default_value = "1")]
    pub seed: u64,
    #[command(flatten)]
    pub open: OpenArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    Random,
    Sequential,
}

fn parse_block_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size @ 1..=0x1000_0000 => Ok(size),
        _ => Err("expected 1 to 256M".into()),
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0.001 to 1000000".into()),
    }
}

#[derive(Args)]
pub struct ServeArgs {
    /// The images
    #[arg(value_name = "IMAGE", required_unless_present = "exports")]
    pub images: Vec<OsString>,
    /// Serve IMAGE under NAME; may be given again
    #[arg(short, long = "export", value_name = "NAME=IMAGE", value_parser = named())]
    pub exports: Vec<Named>,
    /// Name of the one image [default: any name leads to it; of several: their files' names]
    #[arg(short, long, conflicts_with = "exports")]
    pub name: Option<OsString>,
    /// Tell clients that list the exports what the one image is
    #[arg(long, value_name = "TEXT")]
    pub description: Option<OsString>,
    /// Tell clients of the dirty bitmap NAME only [default: of all that are consistent]
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Option<OsString>,
    /// Do not let clients write
    #[arg(short, long)]
    pub read_only: bool,
    /// Listen at URI [default: nbd://localhost]; may be given again
    #[arg(short, long = "uri", value_name = "URI")]
    pub uris: Vec<OsString>,
    /// Listen at the Unix socket PATH; may be given again
    #[arg(short = 'U', long, value_name = "PATH")]
    pub unix: Vec<OsString>,
    /// Encryption: off, on (clients may ask for it) or required
    #[arg(long, value_name = "HOW")]
    pub tls: Option<OsString>,
    /// Certificate of the server, a PEM file
    #[arg(long, value_name = "FILE")]
    pub tls_certificate: Option<OsString>,
    /// Its key, a PEM file
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<OsString>,
    /// Authorities that sign clients' certificates, a PEM file
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<OsString>,
    /// A directory with all three: server-cert.pem, server-key.pem, ca-cert.pem
    #[arg(long, value_name = "DIR")]
    pub tls_certificates: Option<OsString>,
    /// Whether clients need a certificate: on or off
    #[arg(long, value_name = "ON")]
    pub tls_verify_peer: Option<OsString>,
    /// Another setting of the server, as in max-connections=10; may be given again
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = setting())]
    pub settings: Vec<Setting>,
    /// Run CMD with the URI in $uri, and stop when it ends
    #[arg(long, value_name = "CMD")]
    pub run: Option<OsString>,
    /// When stopping, wait so long for requests that are under way
    #[arg(long, value_name = "SECONDS", value_parser = parse_drain, default_value = "5")]
    pub drain: Duration,
    /// Put our process id into FILE once clients can come
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<OsString>,
    /// At the end, say on standard error what was done
    #[arg(long)]
    pub stats: bool,
    /// Say it on standard output, as JSON
    #[arg(long, requires = "stats")]
    pub json: bool,
    /// Do not say what is served where
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub open: OpenArgs,
}

fn parse_drain(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds from 0 to 1000000".into()),
    }
}

#[derive(Args)]
pub struct ListArgs {
    /// The server, as in nbd://localhost
    pub uri: OsString,
    /// Option for connecting, as in tls-ca=FILE; may be given again
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = setting())]
    pub options: Vec<Setting>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
