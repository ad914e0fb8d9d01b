//! Machines over two and three nodes, all of them on this machine's own KVM.

mod kernel;
mod program;
