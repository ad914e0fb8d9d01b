//! The vCPUs' threads: one a vCPU, started and stopped together or one by one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use super::bus::Bus;
use super::counters::Counters;
use super::error::MachineError;
use super::fabric::{End, Fabric};
use super::gate::Gate;
use super::move_times::Part;
use super::msi::Interrupts;
use super::owner::{self, OwnerContext};
use super::owners::Owners;
use super::proxy::{self, ProxyContext};
use super::{kick, migrate};
use super::vcpu::{Role, Vcpu};

/// Pause between two kicks of a thread that hasn't ended.
const KICK_AGAIN: Duration = Duration::from_millis(1);
/// Stack of a vCPU thread: its loop is shallow, and a machine may have a thousand.
const STACK_SIZE: usize = 512 << 10;

/// What all vCPU threads of a node share.
pub(crate) struct Shared {
    pub interrupts: Arc<Interrupts>,
    pub owners: Arc<Owners>,
    pub bus: Option<Bus>,
    pub fabric: Arc<dyn Fabric>,
    pub counters: Arc<Vec<Counters>>,
    pub gate: Gate,
    /// Last page-table root of each vCPU.
    pub roots: Vec<AtomicU64>,
    /// MSRs that are a vCPU's state.
    pub msrs: Vec<u32>,
    /// Whether each vCPU's thread runs it, rather than a proxy.
    runs: Vec<AtomicBool>,
    /// Whether each vCPU's proxy waits for SIPI: a vCPU of this node is about to send it.
    pub awaiting: Vec<AtomicBool>,
    /// No vCPU arrives: the machine is stopping.
    paused: AtomicBool,
    ends: Sender<End>,
}

impl Shared {
    pub fn new(
        owners: Arc<Owners>,
        interrupts: Arc<Interrupts>,
        bus: Option<Bus>,
        fabric: Arc<dyn Fabric>,
        counters: Arc<Vec<Counters>>,
        msrs: Vec<u32>,
        ends: Sender<End>,
    ) -> Self {
        Shared {
            owners,
            interrupts,
            bus,
            fabric,
            gate: Gate::new(counters.len()),
            roots: counters.iter().map(|_| AtomicU64::new(0)).collect(),
            awaiting: counters.iter().map(|_| AtomicBool::new(false)).collect(),
            runs: counters.iter().map(|_| AtomicBool::new(false)).collect(),
            msrs,
            paused: AtomicBool::new(false),
            counters,
            ends,
        }
    }

    /// Runs `vcpu` in its role until `stop` is set or the machine ends.
    fn run(&self, vcpu: &mut Vcpu, stop: &AtomicBool) {
        let duty = self.owners.duty(vcpu.id);
        duty.thread.store(kick::this_thread(), Ordering::SeqCst);
        let result = self.run_roles(vcpu, stop);
        duty.thread.store(0, Ordering::SeqCst);
        let end = match result {
            Ok(None) => return,
            Ok(Some(end)) => end,
            Err(e) => End::Error(e.to_string()),
        };
        // The receiver is gone when the machine is ending already.
        let _ = self.ends.send(end);
    }

    fn run_roles(&self, vcpu: &mut Vcpu, stop: &AtomicBool) -> Result<Option<End>, MachineError> {
        let id = vcpu.id as usize;
        let (counters, root, duty) = (&self.counters[id], &self.roots[id], self.owners.duty(vcpu.id));
        loop {
            match vcpu.role {
                Role::Owner => {
                    let context = OwnerContext {
                        bus: self.bus.as_ref(),
                        fabric: self.fabric.as_ref(),
                        stop,
                        leave: &duty.leave,
                        gate: &self.gate,
                        counters,
                        root,
                    };
                    duty.times.over(Part::Entered);
                    match owner::run(vcpu, &context)? {
                        owner::Left::Stopped => return Ok(None),
                        owner::Left::End(end) => return Ok(Some(end)),
                        owner::Left::Leave => migrate::leave(self, vcpu)?,
                    }
                }
                Role::Proxy => {
                    let number = vcpu.id;
                    vcpu.note_present(&self.msrs)?;
                    let context = ProxyContext {
                        sink: &|event| self.owners.raise(number, event),
                        startup: &self.owners.startup,
                        stop,
                        arrive: &|| self.may_arrive(id),
                        awaiting: &self.awaiting[id],
                        counters,
                    };
                    match proxy::run(vcpu, &context)? {
                        proxy::Left::Stopped => return Ok(None),
                        proxy::Left::Arrive => migrate::arrive(self, vcpu)?,
                    }
                }
            }
            self.runs[id].store(vcpu.role == Role::Owner, Ordering::SeqCst);
            name_thread(&thread_name(vcpu.role, id));
        }
    }

    /// Whether a vCPU is to be restored now. If so, its thread counts as running it from then on.
    fn may_arrive(&self, id: usize) -> bool {
        if !self.owners.duty(id as u32).arrive.load(Ordering::SeqCst) {
            return false;
        }
        // Either who stops the machine sees it running, or it sees that the machine is stopping.
        self.runs[id].store(true, Ordering::SeqCst);
        let may = !self.paused.load(Ordering::SeqCst);
        if !may {
            self.runs[id].store(false, Ordering::SeqCst);
        }
        may
    }
}

fn thread_name(role: Role, id: usize) -> String {
    match role {
        Role::Owner => format!("vcpu{id}"),
        Role::Proxy => format!("proxy{id}"),
    }
}

/// Names this thread anew.
fn name_thread(name: &str) {
    if let Ok(name) = std::ffi::CString::new(name) {
        // SAFETY: PR_SET_NAME reads a string that ends with 0, of which it takes 15 bytes.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    }
}

/// A vCPU and its thread, if it has one.
enum Slot {
    Stopped(Box<Vcpu>),
    Running {
        thread: JoinHandle<Box<Vcpu>>,
        stop: Arc<AtomicBool>,
    },
    /// Its thread panicked, or is being started or joined.
    Gone,
}

/// All vCPUs of a node by number.
pub(crate) struct Threads {
    slots: Vec<Mutex<Slot>>,
    shared: Arc<Shared>,
}

impl Threads {
    pub fn new(vcpus: Vec<Vcpu>, shared: Arc<Shared>) -> Self {
        Threads {
            slots: vcpus
                .into_iter()
                .map(|vcpu| Mutex::new(Slot::Stopped(Box::new(vcpu))))
                .collect(),
            shared,
        }
    }

    /// Starts every vCPU that has no thread: proxies first, so that they take what owners send.
    pub fn start(&self) -> Result<(), MachineError> {
        self.shared.paused.store(false, Ordering::SeqCst);
        for role in [Role::Proxy, Role::Owner] {
            for id in 0..self.slots.len() {
                self.start_one(id, role)?;
            }
        }
        Ok(())
    }

    fn start_one(&self, id: usize, role: Role) -> Result<(), MachineError> {
        let mut slot = self.lock(id);
        let vcpu = match std::mem::replace(&mut *slot, Slot::Gone) {
            Slot::Stopped(vcpu) if vcpu.role == role => vcpu,
            other => {
                *slot = other;
                return Ok(());
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, flag) = (self.shared.clone(), stop.clone());
        let name = thread_name(role, id);
        shared.runs[id].store(role == Role::Owner, Ordering::SeqCst);
        let body = move || {
            let mut vcpu = vcpu;
            kick::with_kicks(&mut vcpu, |vcpu| shared.run(vcpu, &flag));
            vcpu
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_SIZE)
            .spawn(body)
            .map_err(|e| MachineError::Os {
                call: "start of a vCPU thread",
                errno: super::error::Errno(e.raw_os_error().unwrap_or(libc::EAGAIN)),
            })?;
        *slot = Slot::Running { thread, stop };
        Ok(())
    }

    /// Stops all threads: owners, then proxies.
    pub fn stop(&self) {
        self.shared.paused.store(true, Ordering::SeqCst);
        for role in [Role::Owner, Role::Proxy] {
            self.stop_role(role);
        }
    }

    fn stop_role(&self, wanted: Role) {
        loop {
            let mut left = false;
            for id in 0..self.slots.len() {
                let mut slot = self.lock(id);
                let Slot::Running { thread, stop } = &*slot else {
                    continue;
                };
                if self.shared.runs[id].load(Ordering::SeqCst) != (wanted == Role::Owner) {
                    continue;
                }
                stop.store(true, Ordering::Release);
                if !thread.is_finished() {
                    kick::kick(thread);
                    left = true;
                } else if let Slot::Running { thread, .. } = std::mem::replace(&mut *slot, Slot::Gone) {
                    match thread.join() {
                        Ok(vcpu) => *slot = Slot::Stopped(vcpu),
                        Err(_) => tracing::error!("thread of vCPU {id} panicked"),
                    }
                }
            }
            if !left {
                return;
            }
            std::thread::sleep(KICK_AGAIN);
        }
    }

    /// Interrupts KVM_RUN of every vCPU that runs here.
    pub fn kick_owners(&self) {
        for id in 0..self.slots.len() {
            match &*self.lock(id) {
                Slot::Running { thread, .. } if self.shared.runs[id].load(Ordering::SeqCst) => kick::kick(thread),
                _ => {}
            }
        }
    }

    /// Does `work` on a vCPU that has no thread.
    pub fn with_stopped<T>(
        &self,
        id: u32,
        work: impl FnOnce(&mut Vcpu) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        let slot = self
            .slots
            .get(id as usize)
            .ok_or_else(|| MachineError::Config(format!("there is no vCPU {id}")))?;
        match &mut *slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Slot::Stopped(vcpu) => work(vcpu),
            _ => Err(MachineError::Config(format!(
                "vCPU {id} is running; stop the machine first"
            ))),
        }
    }

    fn lock(&self, id: usize) -> MutexGuard<'_, Slot> {
        self.slots[id].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}
