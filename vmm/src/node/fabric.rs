//! The machine's way to the other nodes, over the shared memory's message streams.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use krg_dsm::node::{Client, Dsm, DsmError};

use super::Happening;
use super::wire::Wire;
use crate::machine::{Access, Direction, Fabric, Machine, Touch};
use crate::ownership::Message;

/// Node that has the devices.
const DEVICES: usize = 0;

/// The other nodes, for the machine; this node, for their messages.
pub(super) struct Cluster {
    dsm: OnceLock<Weak<Dsm>>,
    machine: OnceLock<Weak<Machine>>,
    happenings: Sender<Happening>,
    /// Accesses under way, by number.
    asked: Mutex<HashMap<u64, SyncSender<u64>>>,
    next: AtomicU64,
    closed: AtomicBool,
}

impl Cluster {
    pub(super) fn new(happenings: Sender<Happening>) -> Arc<Self> {
        Arc::new(Cluster {
            dsm: OnceLock::new(),
            machine: OnceLock::new(),
            happenings,
            asked: Mutex::default(),
            next: AtomicU64::new(1),
            closed: AtomicBool::new(false),
        })
    }

    /// Joins the two sides; each once, before the machine runs.
    pub(super) fn join(&self, dsm: &Arc<Dsm>, machine: &Arc<Machine>) {
        // Set once by the only caller.
        let _ = self.dsm.set(Arc::downgrade(dsm));
        let _ = self.machine.set(Arc::downgrade(machine));
    }

    /// No access is answered any more: those who wait go on without.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn send_wire(&self, to: usize, message: Wire) {
        if let Some(dsm) = self.dsm.get().and_then(Weak::upgrade) {
            dsm.send(to, message.encode());
        }
    }
}

impl Fabric for Cluster {
    fn send(&self, to: usize, vcpu: u32, message: Message) {
        self.send_wire(to, Wire::Vcpu { vcpu, message });
    }

    fn announce(&self, to: usize, touches: &[Touch]) {
        self.send_wire(to, Wire::Announce { touches: touches.to_vec() });
    }

    fn arrived(&self, vcpu: u32, epoch: u64) {
        let _ = self.happenings.send(Happening::Arrived { vcpu, epoch });
    }

    fn io(&self, access: Access) -> Option<u64> {
        if matches!(access.direction, Direction::Posted(_)) {
            self.send_wire(DEVICES, Wire::Access { id: 0, access });
            return (!self.closed.load(Ordering::SeqCst)).then_some(0);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = sync_channel(1);
        {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock, so that close() either sees this access or is seen by it.
            if self.closed.load(Ordering::SeqCst) {
                return None;
            }
            asked.insert(id, answer);
        }
        self.send_wire(DEVICES, Wire::Access { id, access });
        answered.recv().ok()
    }
}

impl Client for Cluster {
    fn machine(&self, from: usize, bytes: &[u8]) {
        let Some(machine) = self.machine.get().and_then(Weak::upgrade) else { return };
        match Wire::decode(bytes) {
            Some(Wire::Vcpu { vcpu, message }) => machine.receive(from, vcpu, message),
            Some(Wire::Access { id, access }) => {
                let value = machine.serve(access);
                if !matches!(access.direction, Direction::Posted(_)) {
                    self.send_wire(from, Wire::Answer { id, value });
                }
            }
            Some(Wire::Answer { id, value }) => {
                let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(asked) = asked {
                    // Nobody waits any more if the machine is being stopped.
                    let _ = asked.send(value);
                }
            }
            Some(Wire::Announce { touches }) => {
                if let Some(dsm) = self.dsm.get().and_then(Weak::upgrade) {
                    touches.iter().for_each(|touch| dsm.prefetch(touch.gpa, 1, touch.write));
                }
            }
            None => {
                let _ = self.happenings.send(Happening::Nonsense(from));
            }
        }
    }

    fn setup(&self, from: usize, bytes: &[u8]) {
        let _ = self.happenings.send(Happening::Setup(from, bytes.to_vec()));
    }

    fn roots(&self) -> Vec<u64> {
        let Some(machine) = self.machine.get().and_then(Weak::upgrade) else { return Vec::new() };
        machine.sample_roots();
        machine.page_table_roots().into_iter().map(|(_, root)| (root & 0x000f_ffff_ffff_f000) >> 12).collect()
    }

    fn failed(&self, error: DsmError) {
        let _ = self.happenings.send(Happening::Dsm(error));
    }
}

/// A machine of one node has nobody to talk to.
pub(super) struct Alone;

impl Fabric for Alone {
    fn send(&self, _: usize, _: u32, _: Message) {}

    fn io(&self, _: Access) -> Option<u64> {
        None
    }
}
