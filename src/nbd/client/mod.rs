//! The client: an NBD export as a driver.
#![allow(missing_docs, dead_code)]
use std::{ffi::OsString, os::fd::OwnedFd, time::Duration};

use super::{tls::ClientTls, uri::Address};
use crate::block::*;

pub struct Settings {
    pub write: bool,
    pub connections: Option<u32>,
    pub timeout: Option<Duration>,
    pub reconnect: Duration,
    pub connect_timeout: Duration,
    pub contexts: Vec<Vec<u8>>,
    pub tls: Option<ClientTls>,
}
pub enum Target {
    Address(Address),
    Socket(OwnedFd),
    Command { argv: Vec<OsString>, activation: bool },
}
pub struct Listed {
    pub name: Vec<u8>,
    pub description: Vec<u8>,
}
pub fn open(_t: Target, _e: &[u8], name: &Name, _s: Settings) -> Result<Box<dyn Driver>> {
    Err(Error::unsupported(name, "NBD"))
}
pub fn list(_t: Target, name: &Name, _s: Settings) -> Result<Vec<Listed>> {
    Err(Error::unsupported(name, "NBD"))
}
