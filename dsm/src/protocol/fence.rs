//! Messages that wait until the merges before them are in place everywhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::engine::{Engine, Output};
use super::message::{Message, NodeId};

/// A merge passed on for another node: who waits for it, and for whom it waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Relay {
    origin: NodeId,
    origin_id: u32,
    due: u64,
}

/// Outstanding merges and demotions of this node, and the messages behind them. While anything is
/// outstanding, every message that does not bypass the fence is held, so their order stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Fence<const W: usize> {
    next: u32,
    /// Our own merges: id to the set of nodes that have not confirmed it.
    merges: BTreeMap<u32, u64>,
    relays: BTreeMap<u32, Relay>,
    demoting: BTreeSet<u32>,
    held: VecDeque<(NodeId, Message<W>)>,
}

impl<const W: usize> Fence<W> {
    pub(super) fn is_open(&self) -> bool {
        self.merges.is_empty() && self.demoting.is_empty()
    }

    /// Merge numbers start again while none is in use.
    #[cfg(test)]
    pub(super) fn forget_history(&mut self) {
        if self.merges.is_empty() && self.relays.is_empty() {
            self.next = 0;
        }
    }

    pub(super) fn hold(&mut self, to: NodeId, message: Message<W>) {
        self.held.push_back((to, message));
    }

    pub(super) fn next_id(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1).max(1);
        self.next
    }

    pub(super) fn await_merge(&mut self, id: u32, nodes: u64) {
        if nodes != 0 {
            *self.merges.entry(id).or_default() |= nodes;
        }
    }

    pub(super) fn await_relay(&mut self, id: u32, origin: NodeId, origin_id: u32, nodes: u64) {
        self.relays.insert(id, Relay { origin, origin_id, due: nodes });
    }

    pub(super) fn await_demotion(&mut self, page: u32) {
        self.demoting.insert(page);
    }
}

impl<const W: usize> Engine<W> {
    /// Node `from` has merge `id` in place.
    pub(super) fn fence_merged(&mut self, from: NodeId, id: u32, out: &mut Output<W>) {
        let bit = 1 << from;
        if let Some(due) = self.fence.merges.get_mut(&id) {
            *due &= !bit;
            if *due == 0 {
                self.fence.merges.remove(&id);
                self.release_held(out);
            }
        } else if let Some(relay) = self.fence.relays.get_mut(&id) {
            relay.due &= !bit;
            if relay.due == 0 {
                let relay = self.fence.relays.remove(&id).expect("just seen");
                out.sends.push((relay.origin, Message::Merged { id: relay.origin_id }));
            }
        }
    }

    /// The demotion of `page` this node waited for is over.
    pub(super) fn fence_demoted(&mut self, page: u32, out: &mut Output<W>) {
        if self.fence.demoting.remove(&page) {
            self.release_held(out);
        }
    }

    fn release_held(&mut self, out: &mut Output<W>) {
        if self.fence.is_open() {
            out.sends.extend(self.fence.held.drain(..));
        }
    }
}
