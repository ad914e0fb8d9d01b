//! What each vCPU did, for statistics.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Running counts of one vCPU; written by its thread, read by anyone.
#[derive(Debug, Default)]
pub struct Counters {
    pub(crate) ports: AtomicU64,
    pub(crate) memory: AtomicU64,
    pub(crate) remote: AtomicU64,
    pub(crate) kicks: AtomicU64,
    pub(crate) other: AtomicU64,
    pub(crate) drains: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) arrivals: AtomicU64,
}

/// A reading of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStatistics {
    /// Exits for I/O ports.
    pub ports: u64,
    /// Exits for device memory.
    pub memory: u64,
    /// Device accesses of either kind that node 0 had to answer.
    pub remote: u64,
    /// KVM_RUN interrupted by a signal.
    pub kicks: u64,
    /// All other returns of KVM_RUN.
    pub other: u64,
    /// Times the proxy of this vCPU was entered to see what is pending.
    pub drains: u64,
    /// Events for this vCPU that this node sent to another one.
    pub sent: u64,
    /// Events for this vCPU that came from other nodes, passed on or not.
    pub received: u64,
    /// Times it came to run on this node.
    pub arrivals: u64,
}

impl VcpuStatistics {
    /// All returns of KVM_RUN.
    pub fn exits(&self) -> u64 {
        self.ports + self.memory + self.kicks + self.other
    }
}

impl Counters {
    /// Reads all counts. They are not taken at one instant.
    pub fn read(&self) -> VcpuStatistics {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        VcpuStatistics {
            ports: get(&self.ports),
            memory: get(&self.memory),
            remote: get(&self.remote),
            kicks: get(&self.kicks),
            other: get(&self.other),
            drains: get(&self.drains),
            sent: get(&self.sent),
            received: get(&self.received),
            arrivals: get(&self.arrivals),
        }
    }

    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
