//! Conventional PCI, bus 0: configuration space through ECAM, BARs, MSI-X.

mod bar;
pub mod config;
mod decode;
pub mod function;
pub mod host_bridge;
pub mod msix;
mod root;

pub use function::PciFunction;
pub use root::{ECAM_SIZE, PciRoot};
