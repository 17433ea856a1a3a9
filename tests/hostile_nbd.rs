//! Clients that mean no good, scripted byte by byte, against the server: whatever they say, leave out
//! or take for ever, it keeps its memory, threads and descriptors, tells the truth, and serves others
//! at once. Each defect that was seen elsewhere (docs: D1 to D13, CVE numbers) has its scenario.

#[path = "hostile_nbd/certs.rs"]
mod certs;
#[path = "hostile_nbd/client.rs"]
mod client;
mod common;
#[path = "hostile_nbd/devices.rs"]
mod devices;
#[path = "hostile_nbd/garbage.rs"]
mod garbage;
#[path = "hostile_nbd/hangups.rs"]
mod hangups;
#[path = "hostile_nbd/load.rs"]
mod load;
#[path = "hostile_nbd/options.rs"]
mod options;
#[path = "hostile_nbd/ranges.rs"]
mod ranges;
#[path = "hostile_nbd/requests.rs"]
mod requests;
#[path = "hostile_nbd/resources.rs"]
mod resources;
#[path = "hostile_nbd/scene.rs"]
mod scene;
#[path = "hostile_nbd/starttls.rs"]
mod starttls;
#[path = "hostile_nbd/wire.rs"]
mod wire;
