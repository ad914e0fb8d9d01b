//! Hosts, sessions and their control.
//!
//! A front end ([`front`]) reads the [`hosts`] file, finds or starts a node [`daemon`] on every
//! host, authenticates with each ([`handshake`], [`secret`]), places the machine and directs the
//! nodes by [`message`]s over a [`link`]. The nodes connect their mesh and run the machine.

mod admin;
pub mod api;
mod attend;
mod console;
mod control;
pub mod daemon;
pub mod errno;
pub mod error;
mod explain;
pub mod frame;
pub mod front;
mod front_session;
mod gather;
pub mod handshake;
pub mod hosts;
pub mod link;
pub mod local;
mod mesh;
pub mod message;
pub mod metrics;
mod node_session;
pub mod offer;
pub mod plan;
mod probe;
pub mod report;
pub mod schedule;
mod scrape;
pub mod secret;
pub mod service;
pub mod size;
pub mod sockets;
pub mod status;
pub mod transport;
pub mod vcpus;
mod verdict;
