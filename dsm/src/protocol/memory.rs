//! What the protocol asks of the guest memory of its own node.

use std::ops::Range;

use super::block_data::BlockData;

/// The content of one page: `W` 64-bit words (512 on x86; a few in the model checker).
pub type PageData<const W: usize> = [u64; W];

/// How page data is written down: a sequence of its words.
pub(super) mod words {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use super::PageData;

    pub fn serialize<S: Serializer, const W: usize>(data: &PageData<W>, serializer: S) -> Result<S::Ok, S::Error> {
        data[..].serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const W: usize>(deserializer: D) -> Result<Box<PageData<W>>, D::Error> {
        let words = Vec::<u64>::deserialize(deserializer)?.into_boxed_slice();
        words.try_into().map_err(|words: Box<[u64]>| D::Error::invalid_length(words.len(), &"the words of a page"))
    }
}

/// How the data of several pages are written down: one sequence of all words.
pub(super) mod pages {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use super::PageData;

    pub fn serialize<S: Serializer, const W: usize>(data: &[PageData<W>], serializer: S) -> Result<S::Ok, S::Error> {
        data.as_flattened().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const W: usize>(deserializer: D) -> Result<Vec<PageData<W>>, D::Error> {
        let words = Vec::<u64>::deserialize(deserializer)?;
        if words.len() % W != 0 {
            return Err(D::Error::invalid_length(words.len(), &"the words of whole pages"));
        }
        Ok(words.chunks_exact(W).map(|page| page.try_into().expect("chunks of a page")).collect())
    }
}

/// Guest memory of one node, page by page. Page numbers are dense indices over the RAM ranges.
///
/// The running guest (vCPUs, hardware page walks, device threads) reads and writes present pages at
/// any time; `compare_exchange` and `load` are atomic against it. `protect` and `discard` return
/// only when no vCPU can write (or touch) the page any more.
pub trait Memory<const W: usize> {
    /// Present and writable becomes present and read-only: writers fault.
    fn protect(&mut self, page: u32);
    /// [`Memory::protect`] of every page of a range.
    fn protect_range(&mut self, pages: Range<u32>) {
        pages.for_each(|page| self.protect(page));
    }
    /// Whether protecting a page would part a huge mapping, which is dear to all around it.
    fn is_in_huge_mapping(&self, _page: u32) -> bool {
        false
    }
    /// Present and read-only becomes writable; waiters are woken.
    fn unprotect(&mut self, page: u32);
    /// The content of a present page, each word read atomically.
    fn read(&self, page: u32) -> Box<PageData<W>>;
    /// The same, into memory of the caller's.
    fn read_into(&self, page: u32, data: &mut PageData<W>) {
        *data = *self.read(page);
    }
    /// Absent becomes present with `data`; waiters are woken.
    fn install(&mut self, page: u32, data: &PageData<W>, writable: bool);
    /// [`Memory::install`] of neighbouring pages from `first` on.
    fn install_range(&mut self, first: u32, data: &[PageData<W>], writable: bool) {
        (first..).zip(data).for_each(|(page, data)| self.install(page, data, writable));
    }
    /// Absent becomes present, all zero and writable, for every page of a range; waiters are woken.
    fn install_zeros(&mut self, pages: Range<u32>);
    /// Present becomes absent: whoever touches it faults.
    fn discard(&mut self, page: u32);
    /// The same for pages in a row.
    fn discard_run(&mut self, pages: Range<u32>) {
        pages.for_each(|page| self.discard(page));
    }
    /// Present becomes absent for all pages of a block, and what they held when they could be written no more is
    /// returned.
    fn take_out(&mut self, block: Range<u32>) -> BlockData<W> {
        self.protect_range(block.clone());
        let data: Vec<PageData<W>> = block.clone().map(|page| *self.read(page)).collect();
        self.discard_run(block);
        BlockData::new(data)
    }
    /// Absent becomes present and writable for all pages of a block; waiters are woken.
    fn install_block(&mut self, first: u32, data: BlockData<W>) {
        self.install_range(first, data.pages(), true);
    }
    /// Lets waiters on a page try again.
    fn wake(&mut self, page: u32);
    /// One word of a present page.
    fn load(&self, page: u32, word: usize) -> u64;
    /// Changes one word of a present, writable page if it still holds `old`.
    ///
    /// # Errors
    /// The word's value, if it is not `old`.
    fn compare_exchange(&mut self, page: u32, word: usize, old: u64, new: u64) -> Result<u64, u64>;
    /// Appends (word, value now) for every word of a present page that differs from `twin`.
    fn differences(&self, page: u32, twin: &PageData<W>, out: &mut Vec<(u16, u64)>);
}

/// Memory without a guest, for tests in which only the engine matters.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Quiet {
    /// All pages lie in huge mappings.
    pub huge: bool,
}

#[cfg(test)]
impl<const W: usize> Memory<W> for Quiet {
    fn protect(&mut self, _: u32) {}
    fn is_in_huge_mapping(&self, _: u32) -> bool {
        self.huge
    }
    fn unprotect(&mut self, _: u32) {}
    fn read(&self, _: u32) -> Box<PageData<W>> {
        Box::new([0; W])
    }
    fn install(&mut self, _: u32, _: &PageData<W>, _: bool) {}
    fn install_zeros(&mut self, _: Range<u32>) {}
    fn discard(&mut self, _: u32) {}
    fn wake(&mut self, _: u32) {}
    fn load(&self, _: u32, _: usize) -> u64 {
        0
    }
    fn compare_exchange(&mut self, _: u32, _: usize, old: u64, _: u64) -> Result<u64, u64> {
        Ok(old)
    }
    fn differences(&self, _: u32, _: &PageData<W>, _: &mut Vec<(u16, u64)>) {}
}
