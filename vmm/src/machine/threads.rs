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
use super::kick;
use super::msi::Interrupts;
use super::owner::{self, OwnerContext};
use super::proxy::{self, ProxyContext, StartupVectors};
use super::vcpu::{Role, Vcpu};

/// Pause between two kicks of a thread that hasn't ended.
const KICK_AGAIN: Duration = Duration::from_millis(1);
/// Stack of a vCPU thread: its loop is shallow, and a machine may have a thousand.
const STACK_SIZE: usize = 512 << 10;

/// What all vCPU threads of a node share.
pub(crate) struct Shared {
    pub interrupts: Arc<Interrupts>,
    pub bus: Option<Bus>,
    pub fabric: Arc<dyn Fabric>,
    pub counters: Arc<Vec<Counters>>,
    /// Last page-table root of each vCPU.
    pub roots: Vec<AtomicU64>,
    pub startup: StartupVectors,
    ends: Sender<End>,
}

impl Shared {
    pub fn new(
        interrupts: Arc<Interrupts>,
        bus: Option<Bus>,
        fabric: Arc<dyn Fabric>,
        counters: Arc<Vec<Counters>>,
        ends: Sender<End>,
    ) -> Self {
        let roots = counters.iter().map(|_| AtomicU64::new(0)).collect();
        Shared {
            interrupts,
            bus,
            fabric,
            counters,
            roots,
            startup: StartupVectors::default(),
            ends,
        }
    }

    /// Runs `vcpu` in its role until `stop` is set or the machine ends.
    fn run(&self, vcpu: &mut Vcpu, stop: &AtomicBool) {
        let id = vcpu.id as usize;
        let (counters, root) = (&self.counters[id], &self.roots[id]);
        let result = match vcpu.role {
            Role::Owner => {
                let (bus, fabric) = (self.bus.as_ref(), self.fabric.as_ref());
                owner::run(
                    vcpu,
                    &OwnerContext {
                        bus,
                        fabric,
                        stop,
                        counters,
                        root,
                    },
                )
            }
            Role::Proxy => {
                let (interrupts, startup) = (self.interrupts.as_ref(), &self.startup);
                proxy::run(
                    vcpu,
                    &ProxyContext {
                        interrupts,
                        startup,
                        stop,
                        counters,
                    },
                )
                .map(|()| None)
            }
        };
        let end = match result {
            Ok(None) => return,
            Ok(Some(end)) => end,
            Err(e) => End::Error(e.to_string()),
        };
        // The receiver is gone when the machine is ending already.
        let _ = self.ends.send(end);
    }
}

/// A vCPU and its thread, if it has one.
enum Slot {
    Stopped(Box<Vcpu>),
    Running {
        thread: JoinHandle<Box<Vcpu>>,
        stop: Arc<AtomicBool>,
        role: Role,
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
        let name = match role {
            Role::Owner => format!("vcpu{id}"),
            Role::Proxy => format!("proxy{id}"),
        };
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
        *slot = Slot::Running { thread, stop, role };
        Ok(())
    }

    /// Stops all threads: owners, then proxies.
    pub fn stop(&self) {
        for role in [Role::Owner, Role::Proxy] {
            self.stop_role(role);
        }
    }

    fn stop_role(&self, wanted: Role) {
        loop {
            let mut left = false;
            for id in 0..self.slots.len() {
                let mut slot = self.lock(id);
                let Slot::Running { thread, stop, role } = &*slot else {
                    continue;
                };
                if *role != wanted {
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
            if let Slot::Running {
                thread,
                role: Role::Owner,
                ..
            } = &*self.lock(id)
            {
                kick::kick(thread);
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
