//! Machines over two and three nodes, all of them on this machine's own KVM.

mod capacity;
#[path = "../machine/guest.rs"]
mod guest;
mod interrupts;
mod kernel;
mod krg;
mod litmus;
mod migration;
mod nodes;
mod program;
mod schedule;
mod tables;
