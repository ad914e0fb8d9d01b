//! Sets of nodes, small where they are kept for every page.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::message::{MAX_NODES, NodeId};

/// Nodes that are named one by one; a larger set is a bit map.
const FEW: usize = 5;

/// At most [`FEW`] nodes, ascending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Few {
    len: u8,
    nodes: [NodeId; FEW],
}

impl Few {
    fn as_slice(&self) -> &[NodeId] {
        &self.nodes[..usize::from(self.len)]
    }

    pub(super) fn contains(&self, node: NodeId) -> bool {
        self.as_slice().contains(&node)
    }

    /// Whether no other node is in it.
    pub(super) fn is_within(&self, node: NodeId) -> bool {
        self.as_slice().iter().all(|member| *member == node)
    }

    /// Whether there was room for it, or it was there already.
    fn insert(&mut self, node: NodeId) -> bool {
        let len = usize::from(self.len);
        match self.as_slice().binary_search(&node) {
            Ok(_) => true,
            Err(_) if len == FEW => false,
            Err(at) => {
                self.nodes.copy_within(at..len, at + 1);
                self.nodes[at] = node;
                self.len += 1;
                true
            }
        }
    }

    fn remove(&mut self, node: NodeId) -> bool {
        let Ok(at) = self.as_slice().binary_search(&node) else { return false };
        let len = usize::from(self.len);
        self.nodes.copy_within(at + 1..len, at);
        // What is not used is zero, so that equal sets are equal bytes.
        self.nodes[len - 1] = 0;
        self.len -= 1;
        true
    }
}

/// One bit a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Many {
    count: u16,
    bits: [u64; MAX_NODES / 64],
}

impl Many {
    fn bit(node: NodeId) -> (usize, u64) {
        (usize::from(node) / 64, 1 << (node % 64))
    }

    pub(super) fn contains(&self, node: NodeId) -> bool {
        let (word, bit) = Self::bit(node);
        self.bits.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn set(&mut self, node: NodeId) {
        let (word, bit) = Self::bit(node);
        self.count += u16::from(self.bits[word] & bit == 0);
        self.bits[word] |= bit;
    }

    fn clear(&mut self, node: NodeId) -> bool {
        let there = self.contains(node);
        if there {
            let (word, bit) = Self::bit(node);
            self.bits[word] &= !bit;
            self.count -= 1;
        }
        there
    }

    fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.bits.iter().enumerate().flat_map(|(word, &bits)| {
            let mut rest = bits;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some((word * 64) as NodeId + bit as NodeId)
            })
        })
    }
}

/// How the members of a set are kept. A set of at most [`FEW`] is always `Few`, so equal sets are
/// equal in form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Members {
    Few(Few),
    Many(Box<Many>),
}

/// A set of nodes: up to five are kept in place, more in a bit map of their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeSet(pub(super) Members);

impl Default for NodeSet {
    fn default() -> Self {
        NodeSet(Members::Few(Few::default()))
    }
}

impl NodeSet {
    /// The set of no nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The set of one node.
    pub fn of(node: NodeId) -> Self {
        NodeSet(Members::Few(Few { len: 1, nodes: [node, 0, 0, 0, 0] }))
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        match &self.0 {
            Members::Few(few) => usize::from(few.len),
            Members::Many(many) => usize::from(many.count),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `node` is one of them.
    pub fn contains(&self, node: NodeId) -> bool {
        match &self.0 {
            Members::Few(few) => few.contains(node),
            Members::Many(many) => many.contains(node),
        }
    }

    /// Adds a node.
    ///
    /// # Panics
    /// If its number is [`MAX_NODES`] or more: numbers from peers are checked before they get here.
    pub fn insert(&mut self, node: NodeId) {
        assert!(usize::from(node) < MAX_NODES, "node {node} is beyond the largest machine");
        match &mut self.0 {
            Members::Few(few) => {
                if !few.insert(node) {
                    let mut many = Box::new(Many { count: 0, bits: [0; MAX_NODES / 64] });
                    few.as_slice().iter().for_each(|&member| many.set(member));
                    many.set(node);
                    self.0 = Members::Many(many);
                }
            }
            Members::Many(many) => many.set(node),
        }
    }

    /// Takes a node out; returns whether it was in.
    pub fn remove(&mut self, node: NodeId) -> bool {
        match &mut self.0 {
            Members::Few(few) => few.remove(node),
            Members::Many(many) => {
                let there = many.clear(node);
                if usize::from(many.count) <= FEW {
                    let mut few = Few::default();
                    for member in many.iter() {
                        few.insert(member);
                    }
                    self.0 = Members::Few(few);
                }
                there
            }
        }
    }

    /// Takes out all that are in `others`.
    pub fn remove_all(&mut self, others: &NodeSet) {
        for node in others.iter() {
            self.remove(node);
        }
    }

    /// The nodes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        let (few, many) = match &self.0 {
            Members::Few(few) => (few.as_slice(), None),
            Members::Many(many) => (&[][..], Some(many.iter())),
        };
        few.iter().copied().chain(many.into_iter().flatten())
    }

    /// Whether every member is the number of a node of a machine with so many.
    pub fn fits(&self, nodes: usize) -> bool {
        self.iter().all(|node| usize::from(node) < nodes)
    }

    /// Memory a set takes beside its own place.
    pub fn heap_bytes(&self) -> usize {
        match &self.0 {
            Members::Few(_) => 0,
            Members::Many(_) => size_of::<Many>(),
        }
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> Self {
        let mut set = NodeSet::new();
        nodes.into_iter().for_each(|node| set.insert(node));
        set
    }
}

impl Serialize for NodeSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for NodeSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let nodes = Vec::<NodeId>::deserialize(deserializer)?;
        match nodes.iter().find(|node| usize::from(**node) >= MAX_NODES) {
            Some(node) => Err(D::Error::custom(format_args!("node {node} is beyond the largest machine"))),
            None => Ok(nodes.into_iter().collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_set_is_the_same_however_it_came_about() {
        // Numbers that meet again and again, few and many at a time, against a set of the standard library.
        let (mut set, mut model, mut seed) = (NodeSet::new(), BTreeSet::new(), 1u32);
        for step in 0..20_000u32 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let node = (seed >> 16) as NodeId % if step % 4000 < 2000 { 9 } else { MAX_NODES as NodeId };
            if seed & 1 << 9 == 0 {
                set.insert(node);
                model.insert(node);
            } else {
                assert_eq!(set.remove(node), model.remove(&node));
            }
            assert_eq!((set.len(), set.contains(node)), (model.len(), model.contains(&node)));
            if step % 16 == 0 {
                assert!(set.iter().eq(model.iter().copied()));
                assert_eq!(set, model.iter().rev().copied().collect());
                assert_eq!(set.heap_bytes() > 0, model.len() > FEW);
            }
        }
    }

    #[test]
    fn a_saved_set_names_its_nodes_and_none_beyond_the_largest_machine() {
        let set: NodeSet = [3, 1, 1000, 7, 9, 2].into_iter().collect();
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(text, "[1,2,3,7,9,1000]");
        assert_eq!(serde_json::from_str::<NodeSet>(&text).unwrap(), set);
        assert!(set.fits(1001) && !set.fits(1000));
        assert!(serde_json::from_str::<NodeSet>("[1024]").is_err());
    }

    #[test]
    fn a_set_takes_two_words() {
        assert_eq!(size_of::<NodeSet>(), 16);
        assert_eq!(size_of::<Many>(), 136);
    }
}
