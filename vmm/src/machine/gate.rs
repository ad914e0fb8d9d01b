//! Keeps this node's vCPUs out of KVM_RUN for a moment.
//!
//! KVM_SET_LAPIC overwrites what another vCPU's IPI puts into the local APIC at the same time. IPIs between
//! vCPUs of one node are sent inside the kernel, so the only way to have none is to have no vCPU there. Proxies
//! need no holding: the stubs send nothing.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::kick;

/// Pause between two kicks of a vCPU that doesn't come out: it may wait for a page.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// The way into KVM_RUN of all vCPUs that run on this node.
pub(crate) struct Gate {
    closed: AtomicBool,
    /// The thread that has each vCPU in KVM_RUN; 0: none.
    inside: Vec<AtomicI32>,
    /// One holds at a time.
    turn: Mutex<()>,
    /// Guards nothing but the waits.
    waits: Mutex<()>,
    changed: Condvar,
}

/// While it lives, no vCPU of this node runs.
pub(crate) struct Held<'a> {
    gate: &'a Gate,
    _turn: MutexGuard<'a, ()>,
}

impl Gate {
    pub fn new(vcpus: usize) -> Self {
        Gate {
            closed: AtomicBool::new(false),
            inside: (0..vcpus).map(|_| AtomicI32::new(0)).collect(),
            turn: Mutex::new(()),
            waits: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// Called by a vCPU's thread before KVM_RUN; waits while the gate is held.
    pub fn enter(&self, id: u32) {
        let place = &self.inside[id as usize];
        loop {
            place.store(kick::this_thread(), Ordering::SeqCst);
            // Either the holder sees this thread inside, or this thread sees the gate closed.
            if !self.closed.load(Ordering::SeqCst) {
                return;
            }
            self.leave(id);
            let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
            while self.closed.load(Ordering::SeqCst) {
                waits = self.changed.wait(waits).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Called after KVM_RUN.
    pub fn leave(&self, id: u32) {
        self.inside[id as usize].store(0, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            self.notify();
        }
    }

    /// Gets every vCPU out of KVM_RUN and keeps it out. A vCPU that waits for a page comes when the page has.
    pub fn hold(&self) -> Held<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::SeqCst);
        let is_inside = |place: &AtomicI32| place.load(Ordering::SeqCst) != 0;
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        while self.inside.iter().any(is_inside) {
            self.inside
                .iter()
                .for_each(|place| kick::kick_thread(place.load(Ordering::SeqCst)));
            (waits, _) = self
                .changed
                .wait_timeout(waits, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(waits);
        Held {
            gate: self,
            _turn: turn,
        }
    }

    fn notify(&self) {
        drop(self.waits.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
        self.gate.notify();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn nobody_is_inside_while_it_is_held() {
        kick::install().unwrap();
        let (gate, inside, stop) = (Gate::new(3), AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for id in 0..3 {
                let (gate, inside, stop) = (&gate, &inside, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        gate.enter(id);
                        inside.fetch_add(1, Ordering::SeqCst);
                        std::hint::spin_loop();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        gate.leave(id);
                    }
                });
            }
            for _ in 0..200 {
                let held = gate.hold();
                for _ in 0..100 {
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                }
                drop(held);
                std::thread::yield_now();
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}
