//! Who moves where, and why.

mod affinity;
mod balance;
mod fixed;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use affinity::Affinity;
pub use balance::Balance;
pub use fixed::Static;

use crate::load::Load;

/// Decides from measurements. It may remember earlier ones, and its own decisions; it has no clock but
/// [`Load::at`], so that the same measurements give the same decisions again.
pub trait Policy: Send {
    /// Its name, as in `krg sched set NAME`.
    fn name(&self) -> &'static str;

    /// The moves to make now, each vCPU at most once. `load` has passed [`Load::check`] and has the hosts and
    /// vCPUs of the calls before. It is for the caller to carry them out; what failed shows in the next
    /// measurement.
    fn decide(&mut self, load: &Load) -> Vec<Decision>;
}

/// Names of all policies; the first is the default.
pub const NAMES: [&str; 3] = ["affinity", "balance", "static"];

/// The policy of that name.
pub fn named(name: &str) -> Option<Box<dyn Policy>> {
    match name {
        "affinity" => Some(Box::<Affinity>::default()),
        "balance" => Some(Box::<Balance>::default()),
        "static" => Some(Box::new(Static)),
        _ => None,
    }
}

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Who moves.
    pub vcpu: u32,
    /// The host it is on.
    pub from: usize,
    /// The host it goes to.
    pub to: usize,
    /// Why.
    pub reason: Reason,
}

/// Why a vCPU moves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reason {
    /// It is pinned there.
    Pinned,
    /// The hosts' loads, as CPUs wanted by CPU, differ too much.
    Imbalance {
        /// Of the host it leaves.
        from_load: f64,
        /// Of the host it goes to.
        to_load: f64,
    },
    /// It fights for pages with a vCPU there.
    Together {
        /// The vCPU it fights with most.
        with: u32,
        /// Faults of both a second.
        per_second: f64,
        /// What the move is expected to bring, in CPUs.
        gain: f64,
    },
    /// It keeps fetching pages from that host.
    Pages {
        /// Faults a second.
        per_second: f64,
        /// What the move is expected to bring, in CPUs.
        gain: f64,
    },
}

impl Decision {
    /// Why it goes there, as a sentence.
    pub fn why(&self) -> String {
        let Decision { from, to, reason, .. } = self;
        match reason {
            Reason::Pinned => "it is pinned there".into(),
            Reason::Imbalance { from_load, to_load } => {
                format!("node {from} has {from_load:.2} CPUs' work for each CPU, node {to} {to_load:.2}")
            }
            Reason::Together { with, per_second, gain } => format!(
                "it and vCPU {with} there take pages from each other, {per_second:.0} a second; together they gain {gain:.2} CPUs"
            ),
            Reason::Pages { per_second, gain } => {
                format!("it fetches {per_second:.0} pages a second from there; close to them it gains {gain:.2} CPUs")
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {} from node {} to node {}: {}", self.vcpu, self.from, self.to, self.why())
    }
}

/// Moves that pins ask for; they come before all others.
fn to_pins(load: &Load) -> Vec<Decision> {
    let moves = (0..).zip(&load.vcpus).filter_map(|(vcpu, v)| {
        let to = v.pin.filter(|pin| *pin != v.host && v.may_migrate && load.hosts[*pin].online)?;
        Some(Decision { vcpu, from: v.host, to, reason: Reason::Pinned })
    });
    moves.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_policy_and_no_other_is() {
        assert!(NAMES.iter().all(|name| named(name).is_some_and(|policy| policy.name() == *name)));
        assert!(named("random").is_none());
    }

    #[test]
    fn reasons_are_sentences() {
        let reason = Reason::Together { with: 7, per_second: 812.4, gain: 0.913 };
        let text = Decision { vcpu: 2, from: 0, to: 1, reason }.to_string();
        assert_eq!(
            text,
            "vCPU 2 from node 0 to node 1: it and vCPU 7 there take pages from each other, 812 a second; together they gain 0.91 CPUs"
        );
    }
}
