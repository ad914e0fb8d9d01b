//! Messages that wait until the merges before them are in place everywhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::engine::{Engine, Output};
use super::geometry::Geometry;
use super::message::{Message, NodeId};
use super::node_set::NodeSet;

/// A merge passed on for another node: who waits for it, and for whom it waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Relay {
    origin: NodeId,
    origin_id: u32,
    due: NodeSet,
}

/// Outstanding merges and demotions of this node, and the messages behind them. While anything is
/// outstanding, every message that does not bypass the fence is held, so their order stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Fence<const W: usize> {
    next: u32,
    /// Our own merges: id to the set of nodes that have not confirmed it.
    merges: BTreeMap<u32, NodeSet>,
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

    pub(super) fn await_merge(&mut self, id: u32, nodes: NodeSet) {
        if !nodes.is_empty() {
            self.merges.insert(id, nodes);
        }
    }

    pub(super) fn await_relay(&mut self, id: u32, origin: NodeId, origin_id: u32, nodes: NodeSet) {
        self.relays.insert(id, Relay { origin, origin_id, due: nodes });
    }

    /// Whether all of this is about nodes and pages of the machine.
    pub(super) fn fits(&self, me: NodeId, geometry: &Geometry) -> bool {
        let nodes = geometry.nodes();
        let other = |node: NodeId| usize::from(node) < nodes && node != me;
        let due_fits = |due: &NodeSet| !due.is_empty() && due.fits(nodes) && !due.contains(me);
        self.merges.values().all(due_fits)
            && self.relays.values().all(|relay| other(relay.origin) && due_fits(&relay.due))
            && self.demoting.iter().all(|page| *page < geometry.pages())
            && self.held.iter().all(|(to, message)| other(*to) && message.page().is_none_or(|page| page < geometry.pages()))
            && (self.held.is_empty() || !self.is_open())
    }

    pub(super) fn await_demotion(&mut self, page: u32) {
        self.demoting.insert(page);
    }
}

impl<const W: usize> Engine<W> {
    /// Node `from` has merge `id` in place.
    pub(super) fn fence_merged(&mut self, from: NodeId, id: u32, out: &mut Output<W>) {
        if let Some(due) = self.fence.merges.get_mut(&id) {
            due.remove(from);
            if due.is_empty() {
                self.fence.merges.remove(&id);
                self.release_held(out);
            }
        } else if let Some(relay) = self.fence.relays.get_mut(&id) {
            relay.due.remove(from);
            if relay.due.is_empty() {
                let relay = self.fence.relays.remove(&id).expect("just seen");
                out.sends.push((relay.origin, Message::Merged { id: relay.origin_id }));
            }
        }
    }

    /// Nothing is waited for from `node` any more, nor kept for it.
    pub(super) fn fence_lost(&mut self, node: NodeId, out: &mut Output<W>) {
        let geometry = &self.geometry;
        self.fence.merges.retain(|_, due| {
            due.remove(node);
            !due.is_empty()
        });
        self.fence.relays.retain(|_, relay| {
            relay.due.remove(node);
            if relay.due.is_empty() && relay.origin != node {
                out.sends.push((relay.origin, Message::Merged { id: relay.origin_id }));
            }
            !relay.due.is_empty() && relay.origin != node
        });
        self.fence.demoting.retain(|page| geometry.home(*page) != node);
        self.fence.held.retain(|(to, _)| *to != node);
        self.release_held(out);
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
