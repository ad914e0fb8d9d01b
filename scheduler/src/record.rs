//! Decisions with what they were made from, to be looked at and made again.

use serde::{Deserialize, Serialize};

use crate::load::{BadLoad, Load};
use crate::policy::{Decision, Policy, named};

/// Version of [`Record`].
pub const VERSION: u32 = 1;

/// One decision of a policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// Name of the policy.
    pub policy: String,
    /// What it was given.
    pub load: Load,
    /// What it decided.
    pub decisions: Vec<Decision>,
}

/// Why records can't be replayed, or not to the same end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// Written by another version.
    #[error("record {at}: version {version} is not known here")]
    Version {
        /// Its place.
        at: usize,
        /// Its version.
        version: u32,
    },
    /// There is no such policy.
    #[error("record {at}: there is no policy {name}")]
    Policy {
        /// Its place.
        at: usize,
        /// The name.
        name: String,
    },
    /// The measurement is none.
    #[error("record {at}: {reason}")]
    Load {
        /// Its place.
        at: usize,
        /// What is wrong.
        reason: BadLoad,
    },
    /// The same measurements led elsewhere.
    #[error("record {at}: decided {then:?} then, {now:?} now")]
    Differs {
        /// Its place.
        at: usize,
        /// As recorded.
        then: Vec<Decision>,
        /// As decided now.
        now: Vec<Decision>,
    },
}

/// Has `policy` decide, and writes it down.
///
/// # Errors
/// A measurement that is none; nothing is decided then.
pub fn decide(policy: &mut dyn Policy, load: Load) -> Result<Record, BadLoad> {
    load.check()?;
    let decisions = policy.decide(&load);
    Ok(Record { version: VERSION, policy: policy.name().into(), load, decisions })
}

/// Decides everything again, from the start on; a change of policy starts with an empty memory.
///
/// # Errors
/// The first record that can't be replayed, or leads to other decisions.
pub fn replay(records: &[Record]) -> Result<(), ReplayError> {
    let mut policy: Option<Box<dyn Policy>> = None;
    for (at, record) in records.iter().enumerate() {
        if record.version != VERSION {
            return Err(ReplayError::Version { at, version: record.version });
        }
        record.load.check().map_err(|reason| ReplayError::Load { at, reason })?;
        if policy.as_ref().is_none_or(|policy| policy.name() != record.policy) {
            policy = named(&record.policy);
        }
        let name = || record.policy.clone();
        let now = policy.as_mut().ok_or_else(|| ReplayError::Policy { at, name: name() })?.decide(&record.load);
        if now != record.decisions {
            return Err(ReplayError::Differs { at, then: record.decisions.clone(), now });
        }
    }
    Ok(())
}
