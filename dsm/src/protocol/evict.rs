//! Copies go home: a node that wants room asks the home of a page to take it away.
//!
//! `Evict` is a hint. Home forgets it if the page is busy, and otherwise makes of it what it has in any
//! case: the newest copy it requests for itself, as if somebody there were about to touch the page; a
//! copy that is not the newest it has invalidated. So no message that is on its way can miss the page.

use super::directory::Busy;
use super::engine::{Access, Engine, Output, ProtocolError};
use super::memory::Memory;
use super::message::{MAX_RUN, Message, NodeId};
use super::place::Place;

impl<const W: usize> Engine<W> {
    /// Asks the homes of pages to take their copies away from here. Pages at home, replicas and pages under
    /// way stay.
    pub(super) fn evict(&mut self, pages: &[u32], memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let mut run: Option<(NodeId, u32, u32)> = None;
        for &page in pages {
            let copy = matches!(self.access[page as usize], Access::Shared | Access::Exclusive);
            let home = self.geometry.home(page);
            if !copy || home == self.me || self.pending.contains_key(&page) || self.is_block_asked(page) {
                continue;
            }
            self.counters.evictions += 1;
            run = match run {
                Some((of, first, count)) if of == home && first + count == page && count < MAX_RUN => Some((of, first, count + 1)),
                before => {
                    self.send_evict(before, memory, out);
                    Some((home, page, 1))
                }
            };
        }
        self.send_evict(run, memory, out);
    }

    fn send_evict(&mut self, run: Option<(NodeId, u32, u32)>, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if let Some((home, page, count)) = run {
            self.send(home, Message::Evict { page, count }, memory, out);
        }
    }

    /// As home: `from` wants to be rid of its copies of pages.
    pub(super) fn home_evict_run(
        &mut self,
        from: NodeId,
        page: u32,
        count: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let end = page.checked_add(count).filter(|end| *end <= self.geometry.pages() && (1..=MAX_RUN).contains(&count));
        let Some(end) = end else { return Err(ProtocolError { from, what: "an Evict of too much", page }) };
        (page..end).try_for_each(|page| self.home_evict(from, page, memory, out))
    }

    /// As home: `from` wants to be rid of its copy.
    fn home_evict(
        &mut self,
        from: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Evict")?;
        if from == self.me || self.directory.busy.contains_key(&page) || self.pending.contains_key(&page) {
            return Ok(());
        }
        let place = self.directory.place(page).clone();
        if !place.names(from) {
            return Ok(());
        }
        let Ok((mut owner, mut sharers)) = place.into_owned() else { return Ok(()) };
        if owner == from && !sharers.contains(self.me) {
            // Others who read it go on doing so; then home has a copy, too, the next time it is asked.
            self.request(page, sharers.is_empty(), memory, out);
            return Ok(());
        }
        if owner == from {
            owner = self.me;
        }
        sharers.remove(from);
        sharers.remove(owner);
        *self.directory.place(page) = Place::owned(owner, sharers);
        self.directory.busy.insert(page, Busy::Eviction { node: from });
        self.send(from, Message::Invalidate { page, requester: self.me }, memory, out);
        Ok(())
    }

    /// As home: whether this acknowledges that a copy is gone because home wanted that itself. Meanwhile home
    /// has no request for the page that others acknowledge.
    pub(super) fn home_acknowledged(
        &mut self,
        from: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<bool, ProtocolError> {
        match self.directory.busy.get_mut(&page) {
            Some(Busy::Eviction { node }) if *node == from => {
                // The owner may have been lost meanwhile.
                self.resume(page, memory, out)?;
            }
            Some(Busy::Freeing { by, id, waiting }) if waiting.contains(from) => {
                waiting.remove(from);
                if waiting.is_empty() {
                    let (by, id) = (*by, *id);
                    self.home_page_freed(page, by, id, memory, out)?;
                }
            }
            Some(Busy::Recall { waiting, .. }) if waiting.contains(from) => {
                waiting.remove(from);
                self.finish_recall(page, memory, out)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}
