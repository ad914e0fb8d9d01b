//! What the nodes' ends mean together: one cause, one line, one exit status.
//!
//! A lost host shows in many places within milliseconds (its own connection, its peers' reports,
//! the reports about those peers when they stop), in any order. The cause is found from all.

use crate::node::NodeEnd;

/// How a machine's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU of the guest triple-faulted.
    TripleFault,
    /// A node or its host is gone.
    Lost {
        /// Which node.
        node: usize,
        /// How that was noticed.
        reason: String,
    },
    /// A node could not go on.
    Failed {
        /// Which node.
        node: usize,
        /// Its line.
        line: String,
    },
    /// Somebody asked for the end.
    Stopped(String),
}

/// What was heard of each node so far.
#[derive(Debug)]
pub struct Ends {
    nodes: Vec<Option<Heard>>,
    /// Nodes in the order in which they were heard of.
    order: Vec<usize>,
    names: Vec<String>,
    told: bool,
}

#[derive(Debug)]
enum Heard {
    Ended(NodeEnd),
    /// Stopped because we said so.
    Obeyed,
    Lost(String),
}

impl Ends {
    /// Nothing heard yet of the nodes on hosts `names`.
    pub fn new(names: Vec<String>) -> Self {
        Self {
            nodes: names.iter().map(|_| None).collect(),
            order: Vec::new(),
            names,
            told: false,
        }
    }

    /// Node `node` says that it ended.
    pub fn ended(&mut self, node: usize, end: NodeEnd) {
        let obeyed = self.told && matches!(end, NodeEnd::Stopped(_) | NodeEnd::PeerEnded(_));
        self.hear(node, if obeyed { Heard::Obeyed } else { Heard::Ended(end) });
    }

    /// The connection to node `node` is lost.
    pub fn lost(&mut self, node: usize, reason: String) {
        self.hear(node, Heard::Lost(reason));
    }

    /// The nodes are told to stop: that they do says nothing about the cause from here on.
    pub fn tell(&mut self) {
        self.told = true;
    }

    fn hear(&mut self, node: usize, heard: Heard) {
        if let Some(place @ None) = self.nodes.get_mut(node) {
            *place = Some(heard);
            self.order.push(node);
        }
    }

    /// Whether anything was heard.
    pub fn any(&self) -> bool {
        !self.order.is_empty()
    }

    /// Whether every node was heard of.
    pub fn all(&self) -> bool {
        self.order.len() == self.nodes.len()
    }

    /// Whether every node said itself that it ended, so that all can run again.
    pub fn all_reported(&self) -> bool {
        self.nodes
            .iter()
            .all(|heard| matches!(heard, Some(Heard::Ended(_) | Heard::Obeyed)))
    }

    /// Whether node 0, or some node and no other end so far, says that the guest ended by itself.
    pub fn guest_ended(&self) -> bool {
        let by_itself = |node: &usize| {
            matches!(
                &self.nodes[*node],
                Some(Heard::Ended(NodeEnd::PowerOff | NodeEnd::Reset(_)))
            )
        };
        self.any() && (by_itself(&0) || self.order.iter().all(by_itself))
    }

    /// Whether all that was heard is that nodes ended because another did, which has not said why yet.
    pub fn only_followers(&self) -> bool {
        let follows = |node: &usize| match &self.nodes[*node] {
            Some(Heard::Ended(NodeEnd::PeerEnded(first))) => self.nodes.get(*first).is_some_and(Option::is_none),
            _ => false,
        };
        self.any() && self.order.iter().all(follows)
    }

    /// Whether node 0 was heard of.
    pub fn node_0(&self) -> bool {
        self.nodes.first().is_some_and(Option::is_some)
    }

    /// The cause of it all; `None` while nothing was heard.
    pub fn verdict(&self) -> Option<Ending> {
        let heard = || {
            self.order
                .iter()
                .filter_map(|node| Some((*node, self.nodes[*node].as_ref()?)))
        };
        let guest = |heard: &Heard| match heard {
            Heard::Ended(NodeEnd::PowerOff) => Some(Ending::PowerOff),
            Heard::Ended(NodeEnd::Reset(false)) => Some(Ending::Reset),
            Heard::Ended(NodeEnd::Reset(true)) => Some(Ending::TripleFault),
            _ => None,
        };
        // Node 0 has the device that the guest ends itself with: its word is final.
        if let Some(ending) = self.nodes.first().and_then(|node| guest(node.as_ref()?)) {
            return Some(ending);
        }
        let lost = heard().find_map(|(node, heard)| match heard {
            Heard::Lost(reason) => Some(Ending::Lost {
                node,
                reason: reason.clone(),
            }),
            Heard::Ended(_) | Heard::Obeyed => None,
        });
        let failed = || {
            heard().find_map(|(node, heard)| match heard {
                Heard::Ended(NodeEnd::Failed(line)) => Some(Ending::Failed {
                    node,
                    line: line.clone(),
                }),
                _ => None,
            })
        };
        let reports = || {
            heard().filter_map(|(by, heard)| match heard {
                Heard::Ended(NodeEnd::PeerLost(node)) => Some((by, *node)),
                _ => None,
            })
        };
        let blame = |(by, node): (usize, usize)| {
            let name = self.names.get(by).map_or("?", String::as_str);
            Ending::Lost {
                node,
                reason: format!("node {by} ({name}) lost its connection to it"),
            }
        };
        // A peer that reported an end itself was alive: that report is only a consequence.
        let silent = || {
            reports()
                .find(|(_, node)| self.nodes.get(*node).is_none_or(Option::is_none))
                .map(blame)
        };
        let stopped = || {
            heard().find_map(|(_, heard)| match heard {
                Heard::Ended(NodeEnd::Stopped(reason)) => Some(Ending::Stopped(reason.clone())),
                _ => None,
            })
        };
        let others = || heard().find_map(|(_, heard)| guest(heard));
        let followed = || {
            heard().find_map(|(_, heard)| match heard {
                Heard::Ended(NodeEnd::PeerEnded(node)) => Some(Ending::Stopped(format!("node {node} has ended"))),
                _ => None,
            })
        };
        lost.or_else(failed)
            .or_else(silent)
            .or_else(stopped)
            .or_else(|| reports().next().map(blame))
            .or_else(others)
            .or_else(followed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Ends {
        Ends::new(vec!["a".into(), "b".into(), "c".into()])
    }

    #[test]
    fn the_guests_own_end_outweighs_what_follows_from_it() {
        let mut ends = three();
        assert_eq!(ends.verdict(), None);
        ends.ended(1, NodeEnd::PeerLost(0));
        ends.ended(0, NodeEnd::PowerOff);
        ends.lost(2, "gone".into());
        assert_eq!(ends.verdict(), Some(Ending::PowerOff));
        assert!(ends.all() && !ends.all_reported());
    }

    #[test]
    fn who_ended_because_another_did_says_nothing_about_the_cause() {
        let mut ends = three();
        assert!(!ends.only_followers());
        ends.ended(1, NodeEnd::PeerEnded(0));
        assert!(ends.only_followers());
        assert_eq!(ends.verdict(), Some(Ending::Stopped("node 0 has ended".into())));
        ends.ended(0, NodeEnd::PowerOff);
        assert!(!ends.only_followers() && ends.guest_ended());
        assert_eq!(ends.verdict(), Some(Ending::PowerOff));
        let mut ends = three();
        ends.ended(2, NodeEnd::PeerEnded(99));
        ends.ended(1, NodeEnd::PeerEnded(2));
        assert!(!ends.only_followers());
        ends.ended(0, NodeEnd::Failed("no memory".into()));
        assert!(matches!(ends.verdict(), Some(Ending::Failed { node: 0, .. })));
    }

    #[test]
    fn a_lost_connection_outweighs_reports_about_it() {
        let mut ends = three();
        ends.ended(0, NodeEnd::PeerLost(1));
        ends.lost(2, "the connection was closed".into());
        ends.ended(1, NodeEnd::PeerLost(2));
        assert_eq!(
            ends.verdict(),
            Some(Ending::Lost {
                node: 2,
                reason: "the connection was closed".into()
            })
        );
    }

    #[test]
    fn the_silent_one_is_to_blame() {
        let mut ends = three();
        ends.ended(0, NodeEnd::PeerLost(1));
        ends.ended(1, NodeEnd::PeerLost(2));
        let Some(Ending::Lost { node: 2, reason }) = ends.verdict() else {
            panic!("{:?}", ends.verdict())
        };
        assert!(reason.contains("node 1 (b)"), "{reason}");
    }

    #[test]
    fn a_failure_is_the_cause_of_what_its_peers_report() {
        let mut ends = three();
        ends.ended(0, NodeEnd::PeerLost(1));
        ends.ended(1, NodeEnd::Failed("no memory".into()));
        ends.ended(2, NodeEnd::Stopped("told".into()));
        assert_eq!(
            ends.verdict(),
            Some(Ending::Failed {
                node: 1,
                line: "no memory".into()
            })
        );
        assert!(ends.all_reported());
    }

    #[test]
    fn a_stop_that_we_asked_for_is_no_cause() {
        let mut ends = three();
        ends.ended(0, NodeEnd::PeerLost(1));
        ends.tell();
        ends.ended(2, NodeEnd::Stopped("told".into()));
        ends.ended(1, NodeEnd::PeerLost(0));
        assert!(matches!(ends.verdict(), Some(Ending::Lost { node: 1, .. })));
        let mut ends = three();
        ends.ended(0, NodeEnd::PeerLost(1));
        ends.ended(1, NodeEnd::Stopped("SIGTERM".into()));
        assert_eq!(ends.verdict(), Some(Ending::Stopped("SIGTERM".into())));
    }

    #[test]
    fn a_number_that_is_no_node_is_harmless() {
        let mut ends = three();
        ends.ended(7, NodeEnd::PowerOff);
        assert!(!ends.any());
        ends.ended(1, NodeEnd::PeerLost(99));
        assert!(matches!(ends.verdict(), Some(Ending::Lost { node: 99, .. })));
    }
}
