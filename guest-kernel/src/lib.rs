//! What the machine boots.
//!
//! [`find`] looks for kernel, initrd and command line in an unmodified disk image, and
//! [`kernel::Kernel`] makes the kernel file ready to be loaded. Neither trusts what it reads.
//! `micro` (a cargo feature) builds small machine-code guests for tests.

mod config;
mod filesystem;
mod find;
mod image;
pub mod kernel;
#[cfg(feature = "micro")]
pub mod micro;
mod partition;

pub use find::{BootFiles, FindError, find};
