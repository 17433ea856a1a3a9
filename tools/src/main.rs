//! qblk(1): look into disk images, make them, copy, resize, read, write, measure and serve them.
//!
//! Exit status (but of `check`, which has that of qemu-img check): 0 done, 1 it failed, 2 it was called wrongly, 128 + N ended by signal N. Whatever is
//! wrong is said on standard error, with the file's name, after "qblk: ".

mod amend;
mod bench;
mod bitmap;
mod chainwork;
mod check;
mod cli;
mod copy;
mod create;
mod failure;
mod histogram;
mod info;
mod json;
mod layers;
mod list;
mod lock;
mod map;
mod open;
mod place;
mod plugin;
mod progress;
mod read;
mod resize;
mod runner;
mod serve;
mod signals;
mod snapshot;
mod svg;
mod tally;
mod target;
mod units;
mod write;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use failure::Failure;

fn main() -> ExitCode {
    // A file size limit is to be an error of the write that meets it, not the end of the process
    // with a half-made target left behind.
    signals::ignore(libc::SIGXFSZ);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let result = match cli.command {
        Command::Info(args) => info::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Copy(args) => copy::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Amend(args) => amend::run(&args),
        Command::Commit(args) => chainwork::commit(&args),
        Command::Rebase(args) => chainwork::rebase(&args),
        Command::Read(args) => read::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Write(args) => write::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Bitmap(args) => bitmap::run(&args),
        Command::Lock(args) => lock::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::List(args) => list::run(&args),
        Command::Layers(args) => layers::run(&args),
        Command::Plugin(args) => plugin::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

/// What the parser has to say: help and version are answers, all else is a wrong call.
fn usage(e: &clap::Error) -> ExitCode {
    let text = e.render().to_string();
    if !e.use_stderr() {
        // Whoever reads the help may stop reading it.
        use std::io::Write;
        let _ = std::io::stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        say(&text);
    } else {
        say(&format!("qblk: {}", text.strip_prefix("error: ").unwrap_or(&text)));
    }
    // There 2 says that the image is corrupt.
    let check = std::env::args_os().nth(1).is_some_and(|command| command == "check");
    ExitCode::from(if check { 1 } else { failure::USAGE })
}

fn report(failure: &Failure) -> ExitCode {
    if let Some(text) = failure.text() {
        say(&format!("qblk: {text}\n"));
    }
    ExitCode::from(failure.status())
}

/// Write to standard error, where nothing can be done about a failure.
fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(text.as_bytes());
}
