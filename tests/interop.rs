//! Images beside those of qemu-img and qemu-io: what they make is read to the byte here, what is
//! made and written here is sound and the same there.

#[path = "interop/chain.rs"]
mod chain;
mod common;
#[path = "interop/compressed.rs"]
mod compressed;
#[path = "interop/data_file.rs"]
mod data_file;
#[path = "interop/extents.rs"]
mod extents;
#[path = "interop/features.rs"]
mod features;
#[path = "interop/growth.rs"]
mod growth;
#[path = "interop/header.rs"]
mod header;
#[path = "interop/matrix.rs"]
mod matrix;
#[path = "interop/subclusters.rs"]
mod subclusters;
