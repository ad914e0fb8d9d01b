//! krg-vmm: one large SMP machine over several hosts.

pub mod cluster;
pub mod machine;
pub mod node;
pub mod ownership;
