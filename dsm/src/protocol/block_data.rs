//! The content of a whole block on its way from one node to another, wherever it lies.

use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::memory::{PageData, pages};

/// Memory that holds the content of a block.
pub trait BlockMemory<const W: usize>: Send + Sync {
    /// The pages, in order.
    fn pages(&self) -> &[PageData<W>];
    /// Host address of the content, if its memory itself may become guest memory: whoever has the block may
    /// move it away.
    fn movable(&self) -> Option<u64> {
        None
    }
    /// The memory has been moved away, all or a part.
    fn moved(&mut self) {}
}

impl<const W: usize> BlockMemory<W> for Vec<PageData<W>> {
    fn pages(&self) -> &[PageData<W>] {
        self
    }
}

/// What home answers to who asked for a whole block, or an owner whom home asked for one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BlockContent<const W: usize> {
    /// The block stays where it is.
    Stays,
    /// Nobody wrote any of it.
    Zeros,
    /// What it holds.
    Pages(BlockData<W>),
}

/// The content of a block. Its memory is its owner's alone: a clone is a copy.
pub struct BlockData<const W: usize>(Box<dyn BlockMemory<W>>);

impl<const W: usize> BlockData<W> {
    /// Content in any memory.
    pub fn new(memory: impl BlockMemory<W> + 'static) -> Self {
        BlockData(Box::new(memory))
    }

    /// The pages, in order.
    pub fn pages(&self) -> &[PageData<W>] {
        self.0.pages()
    }

    /// See [`BlockMemory::movable`].
    pub fn movable(&self) -> Option<u64> {
        self.0.movable()
    }

    /// See [`BlockMemory::moved`].
    pub fn moved(&mut self) {
        self.0.moved();
    }
}

impl<const W: usize> Clone for BlockData<W> {
    fn clone(&self) -> Self {
        BlockData::new(self.pages().to_vec())
    }
}

impl<const W: usize> fmt::Debug for BlockData<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.pages().len())
    }
}

impl<const W: usize> PartialEq for BlockData<W> {
    fn eq(&self, other: &Self) -> bool {
        self.pages() == other.pages()
    }
}

impl<const W: usize> Eq for BlockData<W> {}

impl<const W: usize> Hash for BlockData<W> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.pages().hash(state);
    }
}

impl<const W: usize> Serialize for BlockData<W> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        pages::serialize(self.pages(), serializer)
    }
}

impl<'de, const W: usize> Deserialize<'de> for BlockData<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        pages::deserialize(deserializer).map(BlockData::new)
    }
}
