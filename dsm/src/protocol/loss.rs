//! The loss of a node: after it nobody waits for that node, and every request ends.
//!
//! Whoever learns of a loss tells everybody else before anything it sends from then on, so nobody acts on a
//! message from after the loss without knowing of it. ARCHITECTURE.md has the argument.

use super::Bug;
use super::directory::{Busy, Request};
use super::engine::{Access, Engine, Output, ProtocolError};
use super::memory::Memory;
use super::message::{Message, NodeId};
use super::node_set::NodeSet;
use super::place::Place;

impl<const W: usize> Engine<W> {
    /// Nodes known here to be lost.
    pub fn lost(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.gone.iter()
    }

    /// `node` is lost. Told again, nothing happens.
    pub(super) fn lose(
        &mut self,
        node: NodeId,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        if node == self.me || usize::from(node) >= self.geometry.nodes() || self.gone.contains(node) {
            return Ok(());
        }
        self.gone.insert(node);
        out.lost.push(node);
        for to in 0..self.geometry.nodes() as NodeId {
            if to != self.me {
                self.send(to, Message::NodeLost { node }, memory, out);
            }
        }
        // What is changed in a replica reaches nobody any more without its home.
        for page in self.tables.held() {
            if self.geometry.home(page) == node {
                memory.discard(page);
                self.access[page as usize] = Access::Invalid;
                self.tables.remove(&self.geometry, page);
            }
        }
        self.fence_lost(node, out);
        let parts: Vec<u32> = self.freeing.iter().filter(|(_, homes)| homes.contains(node)).map(|(id, _)| *id).collect();
        for id in parts {
            self.freed(node, id, out)?;
        }
        self.end_requests(node, memory, out)?;
        self.home_lost(node, memory, out)
    }

    /// A request ends without the page.
    pub(super) fn fail(&mut self, page: u32, out: &mut Output<W>) {
        self.counters.failures += 1;
        out.failed.push(page);
    }

    /// As requester: no request waits for `node`, be it home, owner or sharer.
    fn end_requests(
        &mut self,
        node: NodeId,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let asked: Vec<u32> = self.ahead.keys().copied().filter(|page| self.geometry.home(*page) == node).collect();
        for page in asked {
            if self.ahead.remove(&page).is_some_and(|asked| asked.waits.is_some()) {
                self.fail(page, out);
            }
        }
        self.end_blocks(node, out);
        self.end_taking(node);
        let pages: Vec<u32> = self.pending.keys().copied().collect();
        for page in pages {
            let home = self.geometry.home(page);
            let Some(pending) = self.pending.get_mut(&page) else { continue };
            if home == node {
                self.pending.remove(&page);
                self.fail(page, out);
            } else if pending.answer.is_none() {
                // Only home knows who was to answer.
                let write = pending.write;
                let table = self.wanted_as_table(page);
                self.send(home, Message::Retry { page, lost: node, write, table }, memory, out);
            } else if self.bug != Some(Bug::AwaitLostSharer) && pending.acks.remove(node) {
                self.complete(node, page, memory, out)?;
            }
        }
        Ok(())
    }

    /// As home: `node` has no page, waits for none, and is not waited for.
    fn home_lost(
        &mut self,
        node: NodeId,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.directory.queues.retain(|_, queue| {
            queue.retain(|request| request.from != node);
            !queue.is_empty()
        });
        let first = self.directory.first;
        let named = |(n, place): (usize, &Place)| place.names(node).then_some(first + n as u32);
        let mut named: Vec<u32> = self.directory.places.iter().enumerate().filter_map(named).collect();
        // Busy ones wait for what the others in it say.
        named.retain(|page| !self.directory.busy.contains_key(page));
        named.into_iter().for_each(|page| self.forget_lost(page));
        let left = self.directory.masters.iter_mut().filter_map(|(page, master)| master.holders.remove(node).then_some(*page));
        let left: Vec<u32> = left.collect();
        let busy: Vec<u32> = self.directory.busy.keys().copied().collect();
        for page in busy {
            self.home_lost_busy(node, page, memory, out)?;
        }
        for page in left {
            self.home_holder_gone(page, memory, out);
        }
        Ok(())
    }

    fn home_lost_busy(
        &mut self,
        node: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let Some(busy) = self.directory.busy.get_mut(&page) else { return Ok(()) };
        match busy {
            Busy::Request { by, owner, acks } if *by == node && by != owner && !self.gone.contains(*owner) => {
                let (owner, mut waiting) = (*owner, std::mem::take(acks));
                // Home's own copy has gone by now.
                waiting.remove(self.me);
                waiting.remove_all(&self.gone);
                if self.bug == Some(Bug::SharersOfLostForgotten) {
                    waiting = NodeSet::new();
                }
                *busy = Busy::Recall { requester: node, owner, kept: None, waiting: waiting.clone() };
                self.send(owner, Message::Recall { page, requester: node }, memory, out);
                // They tell the lost node, or have told it, that they have dropped their copies. Until home knows, nobody
                // may write.
                for sharer in waiting.iter() {
                    self.send(sharer, Message::Invalidate { page, requester: self.me }, memory, out);
                }
                Ok(())
            }
            Busy::Request { by, .. } if *by == node => self.resume(page, memory, out),
            // The requester has the page by now, and says Done; or it has not, and says Retry.
            Busy::Request { .. } => Ok(()),
            Busy::Recall { owner, .. } if *owner == node => self.resume(page, memory, out),
            Busy::Recall { waiting, .. } => {
                if waiting.remove(node) { self.finish_recall(page, memory, out) } else { Ok(()) }
            }
            Busy::Eviction { node: of } if *of == node => self.resume(page, memory, out),
            Busy::Eviction { .. } => Ok(()),
            Busy::Freeing { by, id, waiting } => {
                let (by, id) = (*by, *id);
                if waiting.remove(node) && waiting.is_empty() { self.home_page_freed(page, by, id, memory, out) } else { Ok(()) }
            }
            Busy::Demotion { owner, waiting, .. } => {
                if *owner == Some(node) {
                    *owner = None;
                }
                waiting.remove(node);
                self.finish_demotion(node, page, memory, out)
            }
        }
    }

    /// The request a page was busy with is over: what is left of the page goes to the next one.
    pub(super) fn resume(
        &mut self,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.directory.busy.remove(&page);
        self.forget_lost(page);
        self.serve_next(page, memory, out)
    }

    /// A page that is not busy is nobody's who is lost. A sharer's copy is as new as its lost owner's.
    pub(super) fn forget_lost(&mut self, page: u32) {
        if self.gone.is_empty() {
            return;
        }
        let place = std::mem::take(self.directory.place(page));
        *self.directory.place(page) = match place.into_owned() {
            Ok((owner, mut sharers)) => {
                sharers.remove_all(&self.gone);
                let heir = if self.gone.contains(owner) { sharers.iter().next() } else { Some(owner) };
                match heir {
                    Some(owner) => {
                        sharers.remove(owner);
                        Place::owned(owner, sharers)
                    }
                    None => Place::Lost,
                }
            }
            Err(place) => place,
        };
    }

    /// A requester waits in vain if `lost` was to answer it; then its request is served again.
    pub(super) fn home_retry(
        &mut self,
        page: u32,
        lost: NodeId,
        request: Request,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let from = request.from;
        self.check_home(from, page, "Retry")?;
        if !self.gone.contains(lost) {
            return Err(ProtocolError { from, what: "a Retry without a loss", page });
        }
        let vain = matches!(self.directory.busy.get(&page), Some(Busy::Request { by, owner, .. }) if (*by, *owner) == (from, lost));
        if !vain {
            return Ok(());
        }
        self.directory.busy.remove(&page);
        // It was named when the page was on its way to it.
        let place = std::mem::take(self.directory.place(page));
        *self.directory.place(page) = match place.into_owned() {
            Ok((owner, mut sharers)) => {
                sharers.remove(from);
                if owner == from { Place::Lost } else { Place::owned(owner, sharers) }
            }
            Err(place) => place,
        };
        self.forget_lost(page);
        self.serve(page, request, memory, out)?;
        self.serve_next(page, memory, out)
    }

    /// The owner of a page whose requester was lost says whether it has the page still.
    pub(super) fn home_kept(
        &mut self,
        from: NodeId,
        page: u32,
        requester: NodeId,
        copy: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Kept")?;
        if !self.gone.contains(requester) {
            return Err(ProtocolError { from, what: "a Kept nobody waits for", page });
        }
        match self.directory.busy.get_mut(&page) {
            Some(Busy::Recall { requester: r, owner, kept, .. }) if (*r, *owner) == (requester, from) && kept.is_none() => {
                *kept = Some(copy);
                self.finish_recall(page, memory, out)
            }
            // Its Promote said so before.
            _ => Ok(()),
        }
    }

    /// If the owner of a page whose requester was lost has said whether it has it, and nobody else has: that is what is
    /// left of the page.
    pub(super) fn finish_recall(&mut self, page: u32, memory: &mut impl Memory<W>, out: &mut Output<W>) -> Result<(), ProtocolError> {
        let (from, copy) = match self.directory.busy.get(&page) {
            Some(Busy::Recall { owner, kept: Some(copy), waiting, .. }) if waiting.is_empty() => (*owner, *copy),
            _ => return Ok(()),
        };
        let place = std::mem::take(self.directory.place(page));
        *self.directory.place(page) = match place.into_owned() {
            Ok((owner, sharers)) if owner == from && copy => Place::owned(owner, sharers),
            Ok(_) if copy => Place::owned(from, NodeSet::new()),
            _ => Place::Lost,
        };
        self.resume(page, memory, out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Quiet;
    use super::super::{Geometry, Input};
    use super::*;

    #[test]
    fn who_says_that_it_is_lost_itself_breaks_the_protocol() {
        let geometry = Geometry::new(&[(0, 6)], &[2, 2, 2]);
        let hear = |node| {
            let mut engine: Engine<1> = Engine::new(0, geometry.clone(), &[], 0..0, false);
            let input = Input::Message { from: 1, message: Message::NodeLost { node } };
            let result = engine.step(input, &mut Quiet::default(), &mut Output::default()).map_err(|error| error.what);
            (result, engine.lost().collect::<Vec<_>>())
        };
        assert_eq!(hear(2), (Ok(()), vec![2]));
        for node in [0, 1, 3] {
            assert_eq!(hear(node), (Err("a NodeLost"), vec![]), "{node}");
        }
    }
}
