//! NBD beside the others: our server with the clients of QEMU, libnbd, nbdkit and fio, our client
//! with the servers of QEMU and nbdkit, and both of ours with each other; plain and with TLS, by
//! Unix sockets and TCP, and over a network whose cable is pulled.
//!
//! Every peer is started here and ends here; nothing leaves this machine.

#[path = "interop_nbd/client_faults.rs"]
mod client_faults;
#[path = "interop_nbd/client_model.rs"]
mod client_model;
#[path = "interop_nbd/client_nbdkit.rs"]
mod client_nbdkit;
#[path = "interop_nbd/client_qemu.rs"]
mod client_qemu;
mod common;
#[path = "interop_nbd/data_file.rs"]
mod data_file;
#[path = "interop_nbd/network.rs"]
mod network;
#[path = "interop_nbd/own.rs"]
mod own;
#[path = "interop_nbd/peers.rs"]
mod peers;
#[path = "interop_nbd/reconnect.rs"]
mod reconnect;
#[path = "interop_nbd/server_fio.rs"]
mod server_fio;
#[path = "interop_nbd/server_layers.rs"]
mod server_layers;
#[path = "interop_nbd/server_libnbd.rs"]
mod server_libnbd;
#[path = "interop_nbd/server_map.rs"]
mod server_map;
#[path = "interop_nbd/server_nbdsh.rs"]
mod server_nbdsh;
#[path = "interop_nbd/server_qemu.rs"]
mod server_qemu;
#[path = "interop_nbd/server_tls.rs"]
mod server_tls;
