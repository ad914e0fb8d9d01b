//! What home keeps of every page: who has it. Two words a page, whatever the number of nodes.

use serde::{Deserialize, Serialize};

use super::message::NodeId;
use super::node_set::{Few, Many, Members, NodeSet};

/// Where a page is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// Nobody wrote it yet: it reads as zero.
    #[default]
    Untouched,
    /// `owner` has the newest copy; with no sharers it may write, else all of them read. Made by
    /// [`Place::owned`].
    Owned { owner: NodeId, sharers: Few },
    /// The same with more sharers than a page has room for.
    Crowded { owner: NodeId, sharers: Box<Many> },
    /// A page table with a replica at each holder; those and the master copy are kept apart.
    Replicated,
    /// The newest copy was lost with its node.
    Lost,
}

/// The same, as it is written down.
#[derive(Serialize, Deserialize)]
enum Written {
    Untouched,
    Owned { owner: NodeId, sharers: NodeSet },
    Replicated,
    Lost,
}

impl Place {
    /// The page is `owner`'s, and `sharers` read it.
    pub(super) fn owned(owner: NodeId, sharers: NodeSet) -> Self {
        match sharers.0 {
            Members::Few(sharers) => Place::Owned { owner, sharers },
            Members::Many(sharers) => Place::Crowded { owner, sharers },
        }
    }

    /// Owner and sharers, if it is somebody's.
    pub(super) fn into_owned(self) -> Result<(NodeId, NodeSet), Place> {
        match self {
            Place::Owned { owner, sharers } => Ok((owner, NodeSet(Members::Few(sharers)))),
            Place::Crowded { owner, sharers } => Ok((owner, NodeSet(Members::Many(sharers)))),
            other => Err(other),
        }
    }

    /// Whether `node` may read or write the page where it is.
    pub(super) fn names(&self, node: NodeId) -> bool {
        match self {
            Place::Owned { owner, sharers } => *owner == node || sharers.contains(node),
            Place::Crowded { owner, sharers } => *owner == node || sharers.contains(node),
            Place::Untouched | Place::Replicated | Place::Lost => false,
        }
    }

    /// Memory it takes beside its own place.
    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Place::Crowded { .. } => size_of::<Many>(),
            _ => 0,
        }
    }
}

impl Serialize for Place {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = match self.clone().into_owned() {
            Ok((owner, sharers)) => Written::Owned { owner, sharers },
            Err(Place::Replicated) => Written::Replicated,
            Err(Place::Lost) => Written::Lost,
            Err(_) => Written::Untouched,
        };
        written.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Written::deserialize(deserializer)? {
            Written::Untouched => Place::Untouched,
            Written::Owned { owner, sharers } => Place::owned(owner, sharers),
            Written::Replicated => Place::Replicated,
            Written::Lost => Place::Lost,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_takes_two_words_of_the_directory() {
        assert_eq!(size_of::<Place>(), 16);
    }

    #[test]
    fn any_number_of_sharers_comes_back() {
        for count in [0, 1, 5, 6, 1000] {
            let sharers: NodeSet = (7..7 + count).collect();
            let place = Place::owned(3, sharers.clone());
            assert!(place.names(3) && !place.names(6) && place.names(7) == (count > 0));
            assert_eq!(place.heap_bytes(), sharers.heap_bytes());
            let text = serde_json::to_string(&place).unwrap();
            assert_eq!(serde_json::from_str::<Place>(&text).unwrap(), place);
            assert_eq!(place.into_owned(), Ok((3, sharers)));
        }
        assert_eq!(Place::Lost.into_owned(), Err(Place::Lost));
    }
}
