//! Memory of a server under load and after it.

use std::time::Duration;

use super::blast::{Clients, Load, Until};
use super::servers::Launch;
use crate::work::{Res, Sample};

/// Four connections with sixteen requests of 1 MiB each.
const LOAD: Load = Load { block: 1 << 20, depth: 16, connections: 4, write: false };
/// How long clients that are still there ask for nothing.
const IDLE: Duration = Duration::from_secs(4);

/// What a server needed, KiB.
#[derive(Clone, Copy, Debug)]
pub struct Needed {
    /// Most that was resident.
    pub peak: u64,
    /// Resident after the load, its clients connected still.
    pub idle: u64,
    /// Of that, what is mapped from files: the program, libraries.
    pub files: u64,
}

/// Load a server with reads, and with writes if it takes any.
pub fn needed(launch: &Launch, idle: bool) -> Res<Needed> {
    let server = launch.start()?;
    let mut clients = Clients::connect(&server.socket, &LOAD)?;
    let mut run =
        |load: Load| clients.run(&load, Until::Ops(256)).map(drop).map_err(|e| server.explain(e));
    run(LOAD)?;
    if launch.write {
        run(Load { write: true, ..LOAD })?;
    }
    if idle {
        std::thread::sleep(IDLE);
    }
    let rss = server.status_kib("VmRSS")?;
    Ok(Needed {
        peak: server.status_kib("VmHWM")?,
        idle: rss,
        files: server.status_kib("RssFile")?,
    })
}

/// As a sample.
pub fn sample(kib: u64) -> Sample {
    Sample { value: kib as f64 / 1024.0, cpu_us: 0.0, foreign: 0.0 }
}
