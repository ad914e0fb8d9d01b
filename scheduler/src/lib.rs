//! Decides where vCPUs and memory live. Pure: measurements in, decisions out; no I/O, no clock.

mod load;
mod placement;
mod policy;
mod record;

pub use load::{BadLoad, Fight, HostLoad, Load, VcpuLoad};
pub use placement::{HostOffer, HostShare, Placement, PlacementError, Request};
pub use policy::{Affinity, Balance, Decision, NAMES, Policy, Reason, Static, named};
pub use record::{Record, ReplayError, VERSION, decide, replay};
