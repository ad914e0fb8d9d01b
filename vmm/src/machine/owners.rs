//! Who owns each vCPU, at work: [`Ownership`] joined to KVM, to the vCPUs' threads and to the other nodes.
//!
//! A vCPU's ownership is under a lock of its own, under which events are raised in its LAPIC: their order is
//! that of the state machine's steps. Messages are sent after it is released, as sending may deliver others;
//! the state machine needs no order of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use krg_scheduler::Placement;
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use super::counters::Counters;
use super::error::MachineError;
use super::fabric::{End, Event, Fabric};
use super::kick;
use super::layout::LAPIC_BASE;
use super::move_times::{Part, Stopwatch};
use super::proxy::StartupVectors;
use crate::ownership::{Input, Message, Outcome, Output, Ownership};

/// Called with what came of a move.
pub type MoveReply = Box<dyn FnOnce(Outcome) + Send>;

/// Why a move is not even begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// No such vCPU.
    #[error("ESRCH: there is no vCPU {0}")]
    NoVcpu(u32),
    /// No such node.
    #[error("EINVAL: there is no node {0}")]
    NoNode(usize),
}

/// What the thread of a vCPU is asked for.
#[derive(Default)]
pub(crate) struct Duty {
    /// Save the vCPU and hand it over.
    pub leave: AtomicBool,
    /// Restore the vCPU.
    pub arrive: AtomicBool,
    state: Mutex<Option<Vec<u8>>>,
    /// When its parts were done, of the last move.
    pub times: Stopwatch,
    /// The thread; 0: it has none.
    pub thread: AtomicI32,
}

struct Seat {
    ownership: Mutex<Ownership>,
    duty: Duty,
}

/// All vCPUs' owners as this node knows them.
pub(crate) struct Owners {
    vm: Arc<VmFd>,
    node: usize,
    seats: Vec<Seat>,
    fabric: Arc<dyn Fabric>,
    counters: Arc<Vec<Counters>>,
    pub startup: StartupVectors,
    ends: Sender<End>,
    replies: Mutex<HashMap<u64, MoveReply>>,
    next_move: AtomicU64,
}

impl Owners {
    pub fn new(
        vm: Arc<VmFd>,
        node: usize,
        placement: &Placement,
        fabric: Arc<dyn Fabric>,
        counters: Arc<Vec<Counters>>,
        ends: Sender<End>,
    ) -> Result<Self, MachineError> {
        let nodes = placement.hosts.len();
        let seat = |owner| Seat {
            ownership: Mutex::new(Ownership::new(node, nodes, owner)),
            duty: Duty::default(),
        };
        let seats = (0..placement.cpus())
            .map(|vcpu| placement.owner(vcpu).map(seat))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| MachineError::Config("vCPU numbers of the placement have gaps".into()))?;
        Ok(Owners {
            vm,
            node,
            seats,
            fabric,
            counters,
            startup: StartupVectors::default(),
            ends,
            replies: Mutex::default(),
            next_move: AtomicU64::new(0),
        })
    }

    /// This node.
    pub fn node(&self) -> usize {
        self.node
    }

    pub fn count(&self) -> u32 {
        self.seats.len() as u32
    }

    /// The node that runs `vcpu` as far as this one knows, and its epoch.
    pub fn owner(&self, vcpu: u32) -> Option<(usize, u64)> {
        let ownership = self.ownership(vcpu)?;
        Some((ownership.owner(), ownership.epoch()))
    }

    /// Whether `vcpu` runs here.
    pub fn runs_here(&self, vcpu: u32) -> bool {
        self.ownership(vcpu).is_some_and(|ownership| ownership.runs_here())
    }

    /// Whether the thread that has stopped is still wanted to save.
    pub fn is_leaving(&self, vcpu: u32) -> bool {
        self.ownership(vcpu).is_some_and(|ownership| ownership.is_leaving())
    }

    pub fn duty(&self, vcpu: u32) -> &Duty {
        &self.seats[vcpu as usize].duty
    }

    /// The state that the thread was asked to restore.
    pub fn take_state(&self, vcpu: u32) -> Option<Vec<u8>> {
        lock(&self.duty(vcpu).state).take()
    }

    /// What is saved.
    ///
    /// # Errors
    /// When a vCPU is moving.
    pub fn save(&self) -> Result<Vec<Ownership>, MachineError> {
        let save = |(id, seat): (usize, &Seat)| {
            let ownership = lock(&seat.ownership).clone();
            ownership.at_rest().map_err(|error| MachineError::State {
                object: format!("vCPU {id}"),
                reason: error.to_string(),
            })?;
            Ok(ownership)
        };
        self.seats.iter().enumerate().map(save).collect()
    }

    /// Takes over what was saved and has been checked.
    pub fn restore(&self, saved: &[Ownership]) {
        for (seat, saved) in self.seats.iter().zip(saved) {
            *lock(&seat.ownership) = saved.clone();
        }
    }

    /// Raises `event` on `vcpu`, wherever it runs. Unknown numbers are dropped.
    pub fn raise(&self, vcpu: u32, event: Event) {
        self.step(vcpu, Input::Raise(event));
    }

    /// Takes a message of another node about `vcpu`. Unknown numbers are dropped.
    pub fn receive(&self, from: usize, vcpu: u32, message: Message) {
        if matches!(message, Message::Event { .. }) {
            if let Some(counters) = self.counters.get(vcpu as usize) {
                Counters::count(&counters.received);
            }
        }
        self.step(vcpu, Input::Message { from, message });
    }

    /// Has `vcpu` moved to node `to`, and `reply` called with what came of it, by any thread. It isn't called
    /// if the machine ends first.
    pub fn migrate(&self, vcpu: u32, to: usize, nodes: usize, reply: MoveReply) -> Result<(), MoveError> {
        if vcpu >= self.count() {
            return Err(MoveError::NoVcpu(vcpu));
        }
        if to >= nodes {
            return Err(MoveError::NoNode(to));
        }
        let id = self.next_move.fetch_add(1, Ordering::Relaxed);
        lock(&self.replies).insert(id, reply);
        self.step(vcpu, Input::Move { id, to });
        Ok(())
    }

    /// A node is lost.
    pub fn lose(&self, node: usize) {
        (0..self.count()).for_each(|vcpu| self.step(vcpu, Input::Lost(node)));
    }

    /// Forgets who waits for moves: they learn it by their replies being dropped.
    pub fn forget_moves(&self) {
        lock(&self.replies).clear();
    }

    /// One step of a vCPU's ownership and all that follows from it.
    pub fn step(&self, vcpu: u32, input: Input) {
        let Some(seat) = self.seats.get(vcpu as usize) else {
            return;
        };
        let mut out = Output::default();
        let result = {
            let mut ownership = lock(&seat.ownership);
            let result = ownership.step(input, &mut out);
            out.deliver.drain(..).for_each(|event| self.raise_here(vcpu, event));
            if let Some(leave) = out.leave {
                seat.duty.leave.store(leave, Ordering::SeqCst);
            }
            if let Some(state) = out.restore.take() {
                seat.duty.times.over(Part::Came);
                *lock(&seat.duty.state) = Some(state);
                seat.duty.arrive.store(true, Ordering::SeqCst);
                kick::kick_thread(seat.duty.thread.load(Ordering::SeqCst));
            } else if out.leave == Some(true) {
                seat.duty.times.over(Part::Asked);
                kick::kick_thread(seat.duty.thread.load(Ordering::SeqCst));
            }
            result
        };
        for (to, message) in out.sends {
            if let Message::Event { event, .. } = &message {
                if event.origin == self.node {
                    Counters::count(&self.counters[vcpu as usize].sent);
                }
            }
            self.fabric.send(to, vcpu, message);
        }
        for (id, outcome) in out.answers {
            let reply = lock(&self.replies).remove(&id);
            if let Some(reply) = reply {
                reply(outcome);
            }
        }
        if let Some(epoch) = out.arrived {
            Counters::count(&self.counters[vcpu as usize].arrivals);
            self.fabric.arrived(vcpu, epoch);
        }
        if let Err(error) = result {
            // The receiver is gone when the machine is ending already.
            let _ = self.ends.send(End::Error(format!("vCPU {vcpu}: {error}")));
        }
    }

    fn raise_here(&self, vcpu: u32, event: Event) {
        if let Event::Sipi(vector) = event {
            self.startup.learn(vector);
        }
        // Delivery mode in bits 10-8; level asserted (bit 14), which INIT needs.
        let data = match event {
            Event::Fixed(vector) => 0x4000 | u32::from(vector),
            Event::Nmi => 0x4400,
            Event::Init => 0x4500,
            Event::Sipi(vector) => 0x4600 | u32::from(vector),
        };
        // With KVM_X2APIC_API_USE_32BIT_IDS bits 31-8 of the APIC id go to address_hi.
        let msi = kvm_msi {
            address_lo: LAPIC_BASE as u32 | (vcpu & 0xff) << 12,
            address_hi: vcpu & !0xff,
            data,
            ..Default::default()
        };
        // EPERM: the LAPIC didn't take it, because the guest has switched it off or INIT has. A
        // real one drops it without a word too.
        match self.vm.signal_msi(msi) {
            Ok(_) => {}
            Err(e) if e.errno() == libc::EPERM => {}
            Err(e) => tracing::error!("KVM_SIGNAL_MSI (vCPU {vcpu}, {event:?}): {e}"),
        }
    }

    fn ownership(&self, vcpu: u32) -> Option<MutexGuard<'_, Ownership>> {
        self.seats.get(vcpu as usize).map(|seat| lock(&seat.ownership))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
