//! Which pages there are and whose home they have.

use std::ops::Range;

use super::message::{MAX_NODES, NodeId};

/// The machine's RAM as pages: guest-physical ranges, numbered densely, and the home of each page.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// (first page frame number, pages, index of the first page), ascending.
    ranges: Vec<(u64, u32, u32)>,
    /// First page index whose home is node i; ascending, one a node, then the number of pages.
    homes: Vec<u32>,
}

impl Geometry {
    /// `ranges`: (first page frame number, pages) of each RAM range, ascending. `shares`: pages whose
    /// home is each node, in page order.
    ///
    /// # Panics
    /// If the two don't add up to the same number of pages, or there are more than [`MAX_NODES`] shares:
    /// both come from one placement.
    pub fn new(ranges: &[(u64, u32)], shares: &[u32]) -> Self {
        let mut next = 0;
        let ranges = ranges
            .iter()
            .map(|&(frame, pages)| {
                let first = next;
                next += pages;
                (frame, pages, first)
            })
            .collect();
        let mut homes = vec![0];
        for share in shares {
            homes.push(homes[homes.len() - 1] + share);
        }
        assert!(shares.len() <= MAX_NODES, "more nodes than a machine can have");
        assert_eq!(homes.last(), Some(&next), "homes don't cover the RAM");
        Geometry { ranges, homes }
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        self.homes[self.homes.len() - 1]
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.homes.len() - 1
    }

    /// The home of a page that exists.
    pub fn home(&self, page: u32) -> NodeId {
        (self.homes.partition_point(|&first| first <= page) - 1).min(self.nodes() - 1) as NodeId
    }

    /// The page with this page frame number, if it is RAM.
    pub fn page_of_frame(&self, frame: u64) -> Option<u32> {
        self.ranges
            .iter()
            .find(|&&(first, pages, _)| frame >= first && frame - first < u64::from(pages))
            .map(|&(first, _, index)| index + (frame - first) as u32)
    }

    /// The pages whose home is `node`, which exists.
    pub fn homed(&self, node: NodeId) -> Range<u32> {
        self.homes[usize::from(node)]..self.homes[usize::from(node) + 1]
    }

    /// The page frame number of a page that exists.
    pub fn frame_of_page(&self, page: u32) -> Option<u64> {
        self.ranges
            .iter()
            .find(|&&(_, pages, index)| page >= index && page - index < pages)
            .map(|&(first, _, index)| first + u64::from(page - index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_dense_over_the_hole_and_homes_follow_the_shares() {
        let g = Geometry::new(&[(0, 8), (0x100, 8)], &[4, 12]);
        assert_eq!((g.pages(), g.nodes()), (16, 2));
        assert_eq!((g.home(0), g.home(3), g.home(4), g.home(15)), (0, 0, 1, 1));
        assert_eq!(g.page_of_frame(7), Some(7));
        assert_eq!(g.page_of_frame(8), None);
        assert_eq!(g.page_of_frame(0x101), Some(9));
        assert_eq!(g.frame_of_page(9), Some(0x101));
        assert_eq!(g.frame_of_page(16), None);
        let g = Geometry::new(&[(0, 8)], &[0, 4, 0, 4, 0]);
        for node in 0..5 {
            assert!(g.homed(node).all(|page| g.home(page) == node));
        }
        assert_eq!(g.homed(3), 4..8);
    }
}
