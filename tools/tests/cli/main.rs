//! The command line as a user meets it: the built binary is run, and judged by its output, its exit
//! status and what qemu-img says of the images.

mod amend;
mod bench;
mod bitmap;
mod chainwork;
mod check;
mod copy;
mod create;
mod data;
mod docs;
mod info;
mod layers;
mod lock;
mod map;
mod nbd;
mod plugin;
mod remote;
mod resize;
mod serve;
mod snapshot;
mod support;
mod usage;
