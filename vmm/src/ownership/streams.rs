//! The order of each origin's events.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Bug, Numbered, ProtocolError};
use crate::machine::Event;

/// Most events of all origins together that wait for earlier ones. Each is one that overtook another on
/// its way: there are as many as fit into the time a message takes.
const MOST_WAITING: usize = 1 << 16;

/// What the owner knows of each origin's events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Streams {
    /// The number that is due; origins that have sent nothing are left out.
    next: BTreeMap<usize, u64>,
    /// Events ahead of their turn.
    waiting: BTreeMap<usize, BTreeMap<u64, Event>>,
    /// A node was lost: numbers may be missing for ever.
    lossy: bool,
}

impl Streams {
    /// As a handover has them.
    pub fn new(next: &[(usize, u64)], lossy: bool) -> Self {
        Streams {
            next: next.iter().copied().collect(),
            waiting: BTreeMap::new(),
            lossy,
        }
    }

    /// The number of `origin`'s next event.
    pub fn due(&self, origin: usize) -> u64 {
        self.next.get(&origin).copied().unwrap_or(0)
    }

    /// What a handover says of each origin.
    pub fn all_due(&self) -> Vec<(usize, u64)> {
        self.next.iter().map(|(origin, next)| (*origin, *next)).collect()
    }

    /// Takes an event; what can be delivered now is put to `ready`.
    pub fn take(&mut self, event: Numbered, ready: &mut Vec<Event>, bug: Option<Bug>) -> Result<(), ProtocolError> {
        let Numbered {
            origin,
            sequence,
            event,
        } = event;
        let due = self.due(origin);
        if bug == Some(Bug::OrderIgnored) {
            self.next.insert(origin, due.max(sequence + 1));
            ready.push(event);
            return Ok(());
        }
        if sequence < due {
            // After a loss the gap it was in has been given up.
            return if self.lossy {
                Ok(())
            } else {
                Err(ProtocolError::Twice(origin))
            };
        }
        if self.waiting.values().map(BTreeMap::len).sum::<usize>() >= MOST_WAITING {
            return Err(ProtocolError::Flood(origin));
        }
        if self
            .waiting
            .entry(origin)
            .or_default()
            .insert(sequence, event)
            .is_some()
        {
            return Err(ProtocolError::Twice(origin));
        }
        self.release(origin, ready);
        Ok(())
    }

    /// A node is lost: nothing waits for what may have been lost with it.
    pub fn give_up_gaps(&mut self, ready: &mut Vec<Event>) {
        self.lossy = true;
        let origins: Vec<usize> = self.waiting.keys().copied().collect();
        origins.into_iter().for_each(|origin| self.release(origin, ready));
    }

    /// Takes out all events ahead of their turn.
    pub fn take_waiting(&mut self) -> Vec<Numbered> {
        let all = std::mem::take(&mut self.waiting).into_iter();
        all.flat_map(|(origin, events)| {
            events.into_iter().map(move |(sequence, event)| Numbered {
                origin,
                sequence,
                event,
            })
        })
        .collect()
    }

    fn release(&mut self, origin: usize, ready: &mut Vec<Event>) {
        let Some(waiting) = self.waiting.get_mut(&origin) else {
            return;
        };
        let due = self.next.entry(origin).or_insert(0);
        while let Some(first) = waiting.first_entry() {
            if *first.key() != *due && !self.lossy {
                break;
            }
            *due = first.key().saturating_add(1);
            ready.push(first.remove());
        }
        if waiting.is_empty() {
            self.waiting.remove(&origin);
        }
        if self.next.get(&origin) == Some(&0) {
            self.next.remove(&origin);
        }
    }

    /// Whether numbers may be missing for ever.
    pub fn is_lossy(&self) -> bool {
        self.lossy
    }

    /// Whether every origin is one of `nodes`.
    pub fn fits(&self, nodes: usize) -> bool {
        self.next
            .keys()
            .chain(self.waiting.keys())
            .all(|origin| *origin < nodes)
    }

    /// Whether no event waits.
    pub fn is_quiet(&self) -> bool {
        self.waiting.is_empty()
    }
}
