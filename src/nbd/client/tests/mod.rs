//! The client against peers that follow a script, in this process.

mod handshakes;
mod lives;
mod peer;
mod replies;
mod secure;
mod threads;
