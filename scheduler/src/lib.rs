//! Decides where vCPUs and memory live. Pure: measurements in, decisions out; no I/O, no clock.

mod placement;

pub use placement::{HostOffer, HostShare, Placement, PlacementError, Request};
