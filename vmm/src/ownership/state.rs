//! The ownership written down, with the rest of a node's machine.

use super::machine::{Ownership, Place};

/// Why a saved ownership can't be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// Another machine's, or damaged.
    #[error("who owns the vCPU is not of this machine")]
    Shape,
    /// The vCPU was on its way.
    #[error("the vCPU is moving; save when it has arrived")]
    Moving,
}

impl Ownership {
    /// Whether it can be saved: messages between nodes are in no state.
    ///
    /// # Errors
    /// [`OwnershipError::Moving`].
    pub fn at_rest(&self) -> Result<(), OwnershipError> {
        let quiet = match &self.place {
            Place::Away => true,
            Place::Here(streams) => streams.is_quiet(),
            Place::Leaving(_) | Place::Arriving(_) => false,
        };
        match quiet && self.early.is_empty() && self.moves.is_empty() && self.asked.is_empty() {
            true => Ok(()),
            false => Err(OwnershipError::Moving),
        }
    }

    /// Checks what was read back against the machine it is for.
    ///
    /// # Errors
    /// [`OwnershipError::Shape`] or [`OwnershipError::Moving`].
    pub fn check(&self, me: usize, nodes: usize) -> Result<(), OwnershipError> {
        self.at_rest()?;
        let here = match &self.place {
            Place::Here(streams) => streams.fits(nodes) && self.owner == me,
            _ => self.owner != me,
        };
        let known = self.told.iter().chain(&self.lost).all(|node| *node < nodes);
        match here && known && self.me == me && self.nodes == nodes && self.owner < nodes {
            true => Ok(()),
            false => Err(OwnershipError::Shape),
        }
    }
}
