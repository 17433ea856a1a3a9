//! Persistent dirty bitmaps, in both directions with QEMU: what it makes is kept right here and read
//! there, and the other way round; against a model of what is dirty; and when nobody closes.

#[path = "bitmaps/changes.rs"]
mod changes;
mod common;
#[path = "bitmaps/crash.rs"]
mod crash;
#[path = "bitmaps/model.rs"]
mod model;
#[path = "bitmaps/nbd.rs"]
mod nbd;
#[path = "bitmaps/peers.rs"]
mod peers;
#[path = "bitmaps/qemu.rs"]
mod qemu;
