//! The messages between nodes and their form on the wire.
//!
//! Little-endian; a tag byte, the page (u32), then the fields in order. Page data travel as plain
//! words. Nothing read from a peer is trusted: lengths are checked here, page numbers, node numbers
//! and the message's place in the protocol by the engine.

use zerocopy::IntoBytes;

use super::block_data::{BlockContent, BlockData};
use super::memory::{PageData, pages, words};
use super::node_set::NodeSet;

/// A node's number: its place in the hosts file.
pub type NodeId = u16;

/// Most nodes one machine can have.
pub const MAX_NODES: usize = 1024;

/// A changed word of a replicated page-table page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Change {
    /// Page index.
    pub page: u32,
    /// Word in the page.
    pub word: u16,
    /// Value at the last merge.
    pub old: u64,
    /// Value now.
    pub new: u64,
}

/// What somebody expects to do with pages nobody there has touched yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Intent {
    /// Read them.
    Read,
    /// Write them, but is not so sure of it that the pages should be taken from who has written them.
    WriteUntouched,
    /// Write them.
    Write,
}

impl Intent {
    /// Of somebody who is so `sure` of what it expects that a page may be taken from who has written it, or not.
    pub fn of(write: bool, sure: bool) -> Self {
        match (write, sure) {
            (false, _) => Intent::Read,
            (true, false) => Intent::WriteUntouched,
            (true, true) => Intent::Write,
        }
    }

    /// Whether it is to write.
    pub fn writes(self) -> bool {
        self != Intent::Read
    }

    fn encode(self) -> u8 {
        match self {
            Intent::Read => 0,
            Intent::WriteUntouched => 1,
            Intent::Write => 2,
        }
    }

    fn decode(byte: u8) -> Result<Self, Malformed> {
        match byte {
            0 => Ok(Intent::Read),
            1 => Ok(Intent::WriteUntouched),
            2 => Ok(Intent::Write),
            _ => Err(Malformed),
        }
    }
}

/// One protocol message. *Home*, *owner*, *sharer* and *holder* (of a replica) are roles; see the
/// module documentation of [`super`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Message<const W: usize> {
    /// Requester to home: I need this page. `table`: I reach it as a page table.
    Get { page: u32, write: bool, table: bool },
    /// Home to owner: send your copy to `requester`; the sharers `acks` will acknowledge to it. `alone`:
    /// there are no sharers, so a table may be promoted. `done`: home waits for the requester's Done.
    /// `migratory`: the requester only reads, but the page's readers have been its next writers.
    Fetch { page: u32, requester: NodeId, write: bool, acks: NodeSet, alone: bool, table: bool, done: bool, migratory: bool },
    /// Owner to requester: the page. `migratory`: as in the Fetch; without `write` then, the owner had
    /// not written it after all and keeps a copy.
    Data { page: u32, write: bool, acks: NodeSet, done: bool, migratory: bool, #[serde(with = "words")] data: Box<PageData<W>> },
    /// Home to requester: no data needed. `zero`: nobody wrote this page yet; else: your copy is valid.
    Grant { page: u32, zero: bool, acks: NodeSet, done: bool },
    /// Home to sharer: drop your copy and tell `requester`.
    Invalidate { page: u32, requester: NodeId },
    /// Sharer to requester: dropped.
    InvalidateAck { page: u32 },
    /// Requester to home: my request is complete. `shared`: the owner of a migratory page kept a copy.
    Done { page: u32, shared: bool },
    /// Owner to home: the page is a page table that `requester` walks too; keep it replicated.
    Promote { page: u32, requester: NodeId, level: u8, #[serde(with = "words")] data: Box<PageData<W>> },
    /// Home to a new holder: your replica.
    Replica { page: u32, level: u8, #[serde(with = "words")] data: Box<PageData<W>> },
    /// Holder to home, home to the other holders: words changed since the last merge.
    Merge { id: u32, changes: Vec<Change> },
    /// The merge `id` is in place at everybody it concerns.
    Merged { id: u32 },
    /// Holder to home: no longer a page table here, or nobody else has it; I want to be its owner.
    Demote { page: u32 },
    /// Home to holder: give up your replica.
    Drop { page: u32 },
    /// Holder to home: given up; the last words changed here. Also without a Drop, of a replica nobody there uses.
    Dropped { page: u32, changes: Vec<Change> },
    /// Home to the new owner: you alone have it; the last words changed elsewhere.
    Demoted { page: u32, changes: Vec<Change> },
    /// Home to who has given up a replica when asked: no other is left, and the page has one owner or will have.
    Settled { page: u32 },
    /// Home to the last holder: nobody else has a replica any more.
    Alone { page: u32 },
    /// To everybody, before anything else: `node` is lost.
    NodeLost { node: NodeId },
    /// Requester to home: `lost` will not answer my request; if it was to, serve it again. The rest as in
    /// the Get.
    Retry { page: u32, lost: NodeId, write: bool, table: bool },
    /// Home to requester: the newest copy was lost with its node.
    Gone { page: u32 },
    /// Home to owner: `requester`, to whom you were to send the page, is lost. Do you have it still?
    Recall { page: u32, requester: NodeId },
    /// Owner to home: whether it has the page still.
    Kept { page: u32, requester: NodeId, copy: bool },
    /// To home: I have no room for my copies of `count` pages from this one on.
    Evict { page: u32, count: u32 },
    /// Home to owner: send me your pages, `count` from this one on. As so many a Fetch with `alone` and `done`, for
    /// home itself.
    FetchRun { page: u32, count: u32, write: bool },
    /// Owner to home: the pages. As so many a Data with `done`.
    DataRun { page: u32, write: bool, #[serde(with = "pages")] data: Vec<PageData<W>> },
    /// Home to sharer: drop your copies of `count` pages from this one on. As so many an Invalidate.
    InvalidateRun { page: u32, count: u32, requester: NodeId },
    /// Sharer to requester: all of them dropped. As so many an InvalidateAck.
    InvalidateAckRun { page: u32, count: u32 },
    /// Home to owner: send me your pages of the block that starts with this one. As so many a Fetch to write with
    /// `alone` and `done`, for home itself; answered by a GivenBlock, or by the page.
    FetchBlock { page: u32 },
    /// Requester to home: I expect to use these pages, from `page` on: bit n of `wanted` is the nth. Give me those
    /// that cost nobody anything.
    Ask { page: u32, wanted: u64, intent: Intent },
    /// Home to requester: the pages of `given`, as copies to read or, with `write`, as yours; none of the others I
    /// was asked for. Those of `zeros`, which are yours, nobody wrote; `data` has the rest in order.
    Given { page: u32, wanted: u64, given: u64, zeros: u64, write: bool, #[serde(with = "pages")] data: Vec<PageData<W>> },
    /// Requester to home: I expect to use this whole block, which starts with `page`, and more. Make it mine if that
    /// costs nobody anything.
    AskBlock { page: u32, intent: Intent },
    /// Home to requester, or owner to home: whether the block is yours now, all of it, to write.
    GivenBlock { page: u32, content: BlockContent<W> },
    /// To home: the guest has no use for these pages; tell me when nobody has them any more.
    Free { id: u32, first: u32, count: u32 },
    /// From home: that is done.
    Freed { id: u32 },
    /// Not ours: an interrupt, I/O, anything the machine sends. Ordered with, and released like, data.
    Machine(Vec<u8>),
}

/// A peer sent something that is not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed protocol message")]
pub struct Malformed;

/// Most changes in one message; a flush with more is split.
pub const MAX_CHANGES: usize = 8192;

/// Most pages of a [`Message::FetchRun`], a [`Message::DataRun`], a [`Message::InvalidateRun`], its answer and a
/// [`Message::Evict`].
pub const MAX_RUN: u32 = 64;

impl<const W: usize> Message<W> {
    /// Appends the wire form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        use Message::*;
        let head = |out: &mut Vec<u8>, tag: u8, page: u32| {
            out.push(tag);
            out.extend(page.to_le_bytes());
        };
        match self {
            Get { page, write, table } => {
                head(out, 1, *page);
                out.push(u8::from(*write) | u8::from(*table) << 1);
            }
            Fetch { page, requester, write, acks, alone, table, done, migratory } => {
                head(out, 2, *page);
                out.extend(requester.to_le_bytes());
                put_nodes(out, acks);
                let flags = [*write, *table, *alone, *done, *migratory];
                out.push(flags.iter().rev().fold(0, |bits, flag| bits << 1 | u8::from(*flag)));
            }
            Data { page, write, acks, done, migratory, data } => {
                head(out, 3, *page);
                put_nodes(out, acks);
                out.push(u8::from(*write) | u8::from(*done) << 3 | u8::from(*migratory) << 4);
                put_words(out, data);
            }
            Grant { page, zero, acks, done } => {
                head(out, 4, *page);
                put_nodes(out, acks);
                out.push(u8::from(*zero) | u8::from(*done) << 3);
            }
            Invalidate { page, requester } => {
                head(out, 5, *page);
                out.extend(requester.to_le_bytes());
            }
            InvalidateAck { page } => head(out, 6, *page),
            Done { page, shared } => {
                head(out, 7, *page);
                out.push(u8::from(*shared));
            }
            Promote { page, requester, level, data } => {
                head(out, 8, *page);
                out.extend(requester.to_le_bytes());
                out.push(*level);
                put_words(out, data);
            }
            Replica { page, level, data } => {
                head(out, 9, *page);
                out.push(*level);
                put_words(out, data);
            }
            Merge { id, changes } => {
                head(out, 10, *id);
                put_changes(out, changes);
            }
            Merged { id } => head(out, 11, *id),
            Demote { page } => head(out, 12, *page),
            Drop { page } => head(out, 13, *page),
            Dropped { page, changes } => {
                head(out, 14, *page);
                put_changes(out, changes);
            }
            Demoted { page, changes } => {
                head(out, 15, *page);
                put_changes(out, changes);
            }
            Alone { page } => head(out, 34, *page),
            Settled { page } => head(out, 35, *page),
            NodeLost { node } => {
                out.push(17);
                out.extend(node.to_le_bytes());
            }
            Retry { page, lost, write, table } => {
                head(out, 18, *page);
                out.extend(lost.to_le_bytes());
                out.push(u8::from(*write) | u8::from(*table) << 1);
            }
            Gone { page } => head(out, 19, *page),
            Recall { page, requester } => {
                head(out, 20, *page);
                out.extend(requester.to_le_bytes());
            }
            Kept { page, requester, copy } => {
                head(out, 21, *page);
                out.extend(requester.to_le_bytes());
                out.push(u8::from(*copy));
            }
            Evict { page, count } => {
                head(out, 22, *page);
                out.extend(count.to_le_bytes());
            }
            FetchRun { page, count, write } => {
                head(out, 29, *page);
                out.extend(count.to_le_bytes());
                out.push(u8::from(*write));
            }
            FetchBlock { page } => head(out, 31, *page),
            InvalidateRun { page, count, requester } => {
                head(out, 32, *page);
                out.extend(count.to_le_bytes());
                out.extend(requester.to_le_bytes());
            }
            InvalidateAckRun { page, count } => {
                head(out, 33, *page);
                out.extend(count.to_le_bytes());
            }
            DataRun { page, write, data } => {
                head(out, 30, *page);
                out.push(u8::from(*write));
                out.extend((data.len() as u32).to_le_bytes());
                data.iter().for_each(|words| put_words(out, words));
            }
            Ask { page, wanted, intent } => {
                head(out, 23, *page);
                out.extend(wanted.to_le_bytes());
                out.push(intent.encode());
            }
            Given { page, wanted, given, zeros, write, data } => {
                head(out, 24, *page);
                for bits in [wanted, given, zeros] {
                    out.extend(bits.to_le_bytes());
                }
                out.push(u8::from(*write));
                data.iter().for_each(|words| put_plain_words(out, words));
            }
            Free { id, first, count } => {
                head(out, 25, *id);
                out.extend(first.to_le_bytes());
                out.extend(count.to_le_bytes());
            }
            Freed { id } => head(out, 26, *id),
            AskBlock { page, intent } => {
                head(out, 27, *page);
                out.push(intent.encode());
            }
            GivenBlock { page, content } => {
                head(out, 28, *page);
                match content {
                    BlockContent::Stays => out.push(0),
                    BlockContent::Zeros => out.push(1),
                    BlockContent::Pages(data) => {
                        out.push(2);
                        out.extend((data.pages().len() as u32).to_le_bytes());
                        data.pages().iter().for_each(|words| put_plain_words(out, words));
                    }
                }
            }
            Machine(bytes) => {
                out.push(16);
                out.extend(bytes);
            }
        }
    }

    /// Reads one message that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`] when the tag is unknown or the length is not exactly right.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        use Message::*;
        let mut r = Reader(bytes);
        let tag = r.u8()?;
        if tag == 16 {
            return Ok(Machine(r.0.to_vec()));
        }
        if tag == 17 {
            let node = r.u16()?;
            return if r.0.is_empty() { Ok(NodeLost { node }) } else { Err(Malformed) };
        }
        let page = r.u32()?;
        let flag = |f: u8, bit: u8| f >> bit & 1 != 0;
        let message = match tag {
            1 => {
                let f = r.u8()?;
                Get { page, write: flag(f, 0), table: flag(f, 1) }
            }
            2 => {
                let (requester, acks, f) = (r.u16()?, r.nodes()?, r.u8()?);
                Fetch {
                    page,
                    requester,
                    acks,
                    write: flag(f, 0),
                    table: flag(f, 1),
                    alone: flag(f, 2),
                    done: flag(f, 3),
                    migratory: flag(f, 4),
                }
            }
            3 => {
                let (acks, f) = (r.nodes()?, r.u8()?);
                Data { page, acks, write: flag(f, 0), done: flag(f, 3), migratory: flag(f, 4), data: r.words()? }
            }
            4 => {
                let (acks, f) = (r.nodes()?, r.u8()?);
                Grant { page, acks, zero: flag(f, 0), done: flag(f, 3) }
            }
            5 => Invalidate { page, requester: r.u16()? },
            6 => InvalidateAck { page },
            7 => Done { page, shared: flag(r.u8()?, 0) },
            8 => Promote { page, requester: r.u16()?, level: r.u8()?, data: r.words()? },
            9 => Replica { page, level: r.u8()?, data: r.words()? },
            10 => Merge { id: page, changes: r.changes()? },
            11 => Merged { id: page },
            12 => Demote { page },
            13 => Drop { page },
            14 => Dropped { page, changes: r.changes()? },
            22 => Evict { page, count: r.u32()? },
            29 => FetchRun { page, count: r.u32()?, write: flag(r.u8()?, 0) },
            31 => FetchBlock { page },
            32 => InvalidateRun { page, count: r.u32()?, requester: r.u16()? },
            33 => InvalidateAckRun { page, count: r.u32()? },
            30 => {
                let (write, count) = (flag(r.u8()?, 0), r.u32()?);
                if count > MAX_RUN {
                    return Err(Malformed);
                }
                let data: Result<_, _> = (0..count).map(|_| r.words().map(|words| *words)).collect();
                DataRun { page, write, data: data? }
            }
            25 => Free { id: page, first: r.u32()?, count: r.u32()? },
            26 => Freed { id: page },
            27 => AskBlock { page, intent: Intent::decode(r.u8()?)? },
            28 => {
                let content = match r.u8()? {
                    0 => BlockContent::Stays,
                    1 => BlockContent::Zeros,
                    2 => {
                        let count = r.u32()?;
                        BlockContent::Pages(BlockData::new(r.pages::<W>(count)?))
                    }
                    _ => return Err(Malformed),
                };
                GivenBlock { page, content }
            }
            34 => Alone { page },
            35 => Settled { page },
            15 => Demoted { page, changes: r.changes()? },
            18 => {
                let (lost, f) = (r.u16()?, r.u8()?);
                Retry { page, lost, write: flag(f, 0), table: flag(f, 1) }
            }
            19 => Gone { page },
            20 => Recall { page, requester: r.u16()? },
            21 => Kept { page, requester: r.u16()?, copy: flag(r.u8()?, 0) },
            23 => Ask { page, wanted: r.u64()?, intent: Intent::decode(r.u8()?)? },
            24 => {
                let (wanted, given, zeros, write) = (r.u64()?, r.u64()?, r.u64()?, flag(r.u8()?, 0));
                Given { page, wanted, given, zeros, write, data: r.pages((given & !zeros).count_ones())? }
            }
            _ => return Err(Malformed),
        };
        if r.0.is_empty() { Ok(message) } else { Err(Malformed) }
    }

    /// Whether what this message tells may let another host's guest act on what this host's guest
    /// did: page tables must be merged before it leaves.
    pub(super) fn releases(&self) -> bool {
        matches!(
            self,
            Message::Data { .. }
                | Message::DataRun { .. }
                | Message::Given { .. }
                | Message::GivenBlock { content: BlockContent::Pages(_), .. }
                | Message::InvalidateAck { .. }
                | Message::InvalidateAckRun { .. }
                | Message::Machine(_)
        )
    }

    /// Whether this message may overtake those that wait for a merge to be in place: requests, and
    /// everything that a merge or a demotion itself needs to complete.
    pub(super) fn bypasses_fence(&self) -> bool {
        use Message::*;
        !matches!(
            self,
            Data { .. }
                | DataRun { .. }
                | Given { .. }
                | GivenBlock { .. }
                | Grant { .. }
                | Fetch { .. }
                | FetchRun { .. }
                | FetchBlock { .. }
                | Invalidate { .. }
                | InvalidateRun { .. }
                | InvalidateAck { .. }
                | InvalidateAckRun { .. }
                | Done { .. }
                | Gone { .. }
                | Recall { .. }
                | Machine(_)
        )
    }

    /// The page it is about, if it is about one.
    pub fn page(&self) -> Option<u32> {
        use Message::*;
        match *self {
            Get { page, .. } | Fetch { page, .. } | Data { page, .. } | Grant { page, .. } | Invalidate { page, .. } => Some(page),
            InvalidateRun { page, .. } | InvalidateAckRun { page, .. } => Some(page),
            InvalidateAck { page } | Done { page, .. } | Promote { page, .. } | Replica { page, .. } | Demote { page } => Some(page),
            Settled { page } | Alone { page } | Drop { page } | Dropped { page, .. } | Demoted { page, .. } | Retry { page, .. } | Gone { page } => Some(page),
            Recall { page, .. } | Kept { page, .. } | Evict { page, .. } | FetchRun { page, .. } | DataRun { page, .. } => Some(page),
            Ask { page, .. } | Given { page, .. } | AskBlock { page, .. } | GivenBlock { page, .. } | FetchBlock { page } => Some(page),
            Merge { .. } | Merged { .. } | NodeLost { .. } | Free { .. } | Freed { .. } | Machine(_) => None,
        }
    }
}

/// A page of zeros is one byte.
fn put_words<const W: usize>(out: &mut Vec<u8>, words: &PageData<W>) {
    let zero = words.iter().all(|w| *w == 0);
    out.push(u8::from(!zero));
    if !zero {
        put_plain_words(out, words);
    }
}

/// All words of a page, whatever they are. In memory they are little-endian, too: guests are x86.
fn put_plain_words<const W: usize>(out: &mut Vec<u8>, words: &PageData<W>) {
    out.extend_from_slice(words.as_bytes());
}

/// A page of which `bytes` are all words.
fn plain_words<const W: usize>(bytes: &[u8]) -> PageData<W> {
    let mut words = [0; W];
    words.as_mut_bytes().copy_from_slice(bytes);
    words
}

fn put_nodes(out: &mut Vec<u8>, nodes: &NodeSet) {
    out.extend((nodes.len() as u16).to_le_bytes());
    out.extend(nodes.iter().flat_map(NodeId::to_le_bytes));
}

fn put_changes(out: &mut Vec<u8>, changes: &[Change]) {
    out.extend((changes.len() as u32).to_le_bytes());
    for c in changes {
        out.extend(c.page.to_le_bytes());
        out.extend(c.word.to_le_bytes());
        out.extend(c.old.to_le_bytes());
        out.extend(c.new.to_le_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    /// Ascending, as they were written: every set has one form.
    fn nodes(&mut self) -> Result<NodeSet, Malformed> {
        let (mut nodes, mut next) = (NodeSet::new(), 0);
        for _ in 0..self.u16()? {
            let node = self.u16()?;
            if node < next || usize::from(node) >= MAX_NODES {
                return Err(Malformed);
            }
            nodes.insert(node);
            next = node + 1;
        }
        Ok(nodes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn pages<const W: usize>(&mut self, count: u32) -> Result<Vec<PageData<W>>, Malformed> {
        let len = (count as usize).checked_mul(W * 8).ok_or(Malformed)?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(bytes.chunks_exact(W * 8).map(plain_words).collect())
    }

    fn words<const W: usize>(&mut self) -> Result<Box<PageData<W>>, Malformed> {
        match self.u8()? {
            0 => Ok(Box::new([0; W])),
            1 => {
                let (bytes, rest) = self.0.split_at_checked(W * 8).ok_or(Malformed)?;
                self.0 = rest;
                Ok(Box::new(plain_words(bytes)))
            }
            _ => Err(Malformed),
        }
    }

    fn changes(&mut self) -> Result<Vec<Change>, Malformed> {
        let count = self.u32()? as usize;
        if count > MAX_CHANGES {
            return Err(Malformed);
        }
        (0..count)
            .map(|_| {
                Ok(Change {
                    page: self.u32()?,
                    word: self.u16()?,
                    old: u64::from_le_bytes(self.take()?),
                    new: u64::from_le_bytes(self.take()?),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message<2>> {
        use Message::*;
        let change = Change { page: 9, word: 1, old: 3, new: u64::MAX };
        vec![
            Get { page: 7, write: true, table: false },
            Fetch { page: 7, requester: 300, write: false, acks: (1..9).collect(), alone: true, table: true, done: false, migratory: true },
            Data { page: 1, write: true, acks: [4, 1023].into_iter().collect(), done: true, migratory: false, data: Box::new([5, 6]) },
            Data { page: 1, write: false, acks: NodeSet::new(), done: true, migratory: true, data: Box::new([0, 0]) },
            Grant { page: 1, zero: true, acks: NodeSet::new(), done: false },
            Invalidate { page: 2, requester: 1023 },
            InvalidateAck { page: 2 },
            Done { page: u32::MAX, shared: true },
            Promote { page: 3, requester: 1, level: 4, data: Box::new([0, 1]) },
            Replica { page: 3, level: 2, data: Box::new([7, 8]) },
            Merge { id: 77, changes: vec![change, change] },
            Merged { id: 77 },
            Demote { page: 4 },
            Drop { page: 4 },
            Dropped { page: 4, changes: vec![] },
            Demoted { page: 4, changes: vec![change] },
            Alone { page: 4 },
            Settled { page: 4 },
            NodeLost { node: 515 },
            Retry { page: 4, lost: 2, write: true, table: true },
            Gone { page: 4 },
            Recall { page: 4, requester: 999 },
            Kept { page: 4, requester: 999, copy: true },
            Evict { page: 4, count: 3 },
            FetchRun { page: 4, count: 64, write: true },
            DataRun { page: 4, write: false, data: vec![[3, 4], [0, 0], [5, 6]] },
            Ask { page: 9, wanted: 0b101, intent: Intent::Read },
            Ask { page: 9, wanted: 1 << 63, intent: Intent::Write },
            Ask { page: 9, wanted: 1, intent: Intent::WriteUntouched },
            Given { page: 9, wanted: 0b101, given: 0b100, zeros: 0, write: false, data: vec![[3, 4]] },
            Given { page: 9, wanted: 7, given: 7, zeros: 2, write: true, data: vec![[3, 4], [5, 6]] },
            InvalidateRun { page: 4, count: 64, requester: 999 },
            InvalidateAckRun { page: 4, count: 64 },
            FetchBlock { page: 512 },
            AskBlock { page: 512, intent: Intent::Read },
            AskBlock { page: 512, intent: Intent::WriteUntouched },
            GivenBlock { page: 512, content: BlockContent::Stays },
            GivenBlock { page: 512, content: BlockContent::Zeros },
            GivenBlock { page: 512, content: BlockContent::Pages(BlockData::new(vec![[3, 4], [5, 6]])) },
            Free { id: 5, first: 512, count: 1024 },
            Freed { id: 5 },
            Machine(b"anything".to_vec()),
        ]
    }

    #[test]
    fn every_message_survives_the_wire_and_no_prefix_of_one_parses() {
        for message in all() {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            assert_eq!(Message::decode(&bytes), Ok(message.clone()));
            if !matches!(message, Message::Machine(_)) {
                for cut in 0..bytes.len() {
                    assert_eq!(Message::<2>::decode(&bytes[..cut]), Err(Malformed), "{message:?} cut at {cut}");
                }
                bytes.push(0);
                assert_eq!(Message::<2>::decode(&bytes), Err(Malformed));
            }
        }
    }

    #[test]
    fn a_set_of_nodes_has_one_form_and_names_no_node_beyond_the_largest_machine() {
        let grant = |nodes: &[u16]| {
            let mut bytes = vec![4, 0, 0, 0, 0];
            bytes.extend((nodes.len() as u16).to_le_bytes());
            bytes.extend(nodes.iter().flat_map(|n| n.to_le_bytes()));
            bytes.push(0);
            Message::<2>::decode(&bytes)
        };
        let acks = [2, 1023].into_iter().collect();
        assert_eq!(grant(&[2, 1023]), Ok(Message::Grant { page: 0, zero: false, acks, done: false }));
        for bad in [&[2, 2][..], &[3, 2], &[1024], &[u16::MAX]] {
            assert_eq!(grant(bad), Err(Malformed), "{bad:?}");
        }
    }

    #[test]
    fn a_huge_count_is_refused_before_anything_is_allocated() {
        let mut bytes = vec![10, 0, 0, 0, 0];
        bytes.extend(u32::MAX.to_le_bytes());
        assert_eq!(Message::<2>::decode(&bytes), Err(Malformed));
    }
}
