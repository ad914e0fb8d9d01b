//! Pages the guest has no use for: their memory is given up everywhere, and nobody wrote them again.
//!
//! The node that is told so by the guest (free page reporting) asks the homes, each for its part. Home
//! drops its own copy, has the others' invalidated, and calls the page untouched when the last of them
//! has said so. Pages that are busy, or replicated, stay as they are. Until all homes have answered the
//! guest is not told that it may use the pages again: what it writes then is not what was given up.

use std::ops::Range;

use super::directory::Busy;
use super::engine::{Access, Engine, Output, ProtocolError};
use super::memory::Memory;
use super::message::{Message, NodeId};
use super::place::Place;

/// A request of a node, as one number: what is written down has no other keys.
pub(super) fn key(by: NodeId, id: u32) -> u64 {
    u64::from(by) << 32 | u64::from(id)
}

impl<const W: usize> Engine<W> {
    /// Has pages that exist given up everywhere; `out.freed` names `id` when that is done.
    pub(super) fn free(&mut self, id: u32, pages: Range<u32>, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let mut parts = Vec::new();
        let mut next = pages.start;
        while next < pages.end {
            let home = self.geometry.home(next);
            let end = (next..pages.end).find(|page| self.geometry.home(*page) != home).unwrap_or(pages.end);
            parts.push((home, next..end));
            next = end;
        }
        parts.retain(|(home, _)| !self.gone.contains(*home));
        if parts.is_empty() {
            return out.freed.push(id);
        }
        self.freeing.insert(id, parts.iter().map(|(home, _)| *home).collect());
        for (home, part) in parts {
            self.send(home, Message::Free { id, first: part.start, count: part.end - part.start }, memory, out);
        }
    }

    /// As home: `from` says that nobody needs these pages.
    pub(super) fn home_free(
        &mut self,
        from: NodeId,
        id: u32,
        pages: Range<u32>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = |what| Err(ProtocolError { from, what, page: pages.start });
        if pages.is_empty() || pages.end > self.geometry.pages() {
            return bad("Free of pages that don't exist");
        }
        if self.geometry.home(pages.start) != self.me || self.geometry.home(pages.end - 1) != self.me {
            return bad("Free");
        }
        if self.directory.freeing.contains_key(&key(from, id)) {
            return bad("a second Free");
        }
        let mut waiting = 0;
        let mut here: Vec<Range<u32>> = Vec::new();
        for page in pages {
            if self.directory.busy.contains_key(&page) || self.pending.contains_key(&page) {
                continue;
            }
            let Ok((owner, mut others)) = self.directory.place(page).clone().into_owned() else { continue };
            others.insert(owner);
            others.remove(self.me);
            if self.access[page as usize] != Access::Invalid {
                self.access[page as usize] = Access::Invalid;
                self.given.remove(&page);
                match here.last_mut() {
                    Some(run) if run.end == page => run.end += 1,
                    _ => here.push(page..page + 1),
                }
            }
            self.directory.write_shared.unmark(page);
            if others.is_empty() {
                *self.directory.place(page) = Place::Untouched;
                self.counters.pages_freed += 1;
                continue;
            }
            waiting += 1;
            for node in others.iter() {
                self.send(node, Message::Invalidate { page, requester: self.me }, memory, out);
            }
            self.directory.busy.insert(page, Busy::Freeing { by: from, id, waiting: others });
        }
        here.into_iter().for_each(|run| memory.discard_run(run));
        if waiting == 0 {
            self.send(from, Message::Freed { id }, memory, out);
        } else {
            self.directory.freeing.insert(key(from, id), waiting);
        }
        Ok(())
    }

    /// As home: a page that is given up is nowhere any more.
    pub(super) fn home_page_freed(
        &mut self,
        page: u32,
        by: NodeId,
        id: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.directory.busy.remove(&page);
        *self.directory.place(page) = Place::Untouched;
        self.counters.pages_freed += 1;
        if let Some(waiting) = self.directory.freeing.get_mut(&key(by, id)) {
            *waiting -= 1;
            if *waiting == 0 {
                self.directory.freeing.remove(&key(by, id));
                self.send(by, Message::Freed { id }, memory, out);
            }
        }
        self.serve_next(page, memory, out)
    }

    /// A home has given up its part.
    pub(super) fn freed(&mut self, from: NodeId, id: u32, out: &mut Output<W>) -> Result<(), ProtocolError> {
        let homes = self.freeing.get_mut(&id);
        let Some(homes) = homes.filter(|homes| homes.contains(from)) else {
            return Err(ProtocolError { from, what: "a Freed nobody waits for", page: 0 });
        };
        homes.remove(from);
        if homes.is_empty() {
            self.freeing.remove(&id);
            out.freed.push(id);
        }
        Ok(())
    }
}
