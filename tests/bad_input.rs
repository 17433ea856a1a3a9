//! Bad input gets a clear error, and nothing is lost: files that are no images, headers and tables
//! that contradict their format, disks that are full, writers that are killed.

#[path = "bad_input/bitmaps.rs"]
mod bitmaps;
mod common;
#[path = "bad_input/extended.rs"]
mod extended;
#[path = "bad_input/files.rs"]
mod files;
#[path = "bad_input/full_disk.rs"]
mod full_disk;
#[path = "bad_input/headers.rs"]
mod headers;
#[path = "bad_input/killed.rs"]
mod killed;
#[path = "bad_input/snapshots.rs"]
mod snapshots;
#[path = "bad_input/tables.rs"]
mod tables;
