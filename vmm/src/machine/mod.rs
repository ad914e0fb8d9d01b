//! The machine one host runs: vCPUs, interrupts, firmware tables, device bus.
//!
//! [`Machine`] is this host's part: a KVM VM with every vCPU of the whole machine. Those this node
//! owns run; the others are parked proxies ([`proxy`]). Memory, the connection to the other nodes
//! ([`Fabric`]) and the PCI devices ([`DeviceBus`], node 0) are given to it.

pub mod acpi;
pub mod boot;
mod bus;
pub mod command_line;
mod counters;
pub mod cpuid;
pub mod cpuid_common;
mod dsdt;
pub mod emulated;
mod error;
mod fabric;
mod gate;
mod ioapic;
mod kick;
pub mod kvm;
pub mod layout;
mod migrate;
mod move_times;
mod msi;
mod owner;
mod owners;
mod power;
mod proxy;
mod rtc;
mod serial;
pub mod state;
mod stub;
mod threads;
mod topology;
mod transfer;
mod vcpu;

use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use krg_scheduler::Placement;
use vm_memory::GuestMemoryMmap;

use crate::node::CpuidLeaf;
use crate::ownership;

pub use counters::VcpuStatistics;
pub use error::{Errno, MachineError};
pub use fabric::{Access, DeviceBus, Direction, End, Event, Fabric, Space, Touch};
pub use ioapic::{Ioapic, IoapicState};
pub use move_times::{MoveTimes, Part};
pub use msi::{Destination, Interrupts, Message};
pub use owners::{MoveError, MoveReply};
pub use serial::{Com1State, Output};
pub use vcpu::Role;

use bus::Bus;
use counters::Counters;
use kvm::FaultKinds;
use owners::Owners;
use state::MachineState;
use threads::{Shared, Threads};
use vcpu::Vcpu;

/// What a machine is made from.
pub struct MachineConfig {
    /// vCPUs and memory of all hosts.
    pub placement: Placement,
    /// This node's number.
    pub node: usize,
    /// TSC frequency of the guest in kHz; 0: this host's own.
    pub tsc_khz: u32,
    /// What all hosts' CPUs share ([`cpuid_common::common_subset`]); empty: this host's own.
    pub cpuid: Vec<CpuidLeaf>,
    /// Where console output goes; used by node 0.
    pub console: Output,
    /// Where the machine's end is told. A node other than 0 tells its own vCPUs' faults.
    pub ends: Sender<End>,
}

/// One host's part of the machine. Dropping it stops its threads.
pub struct Machine {
    // Dropped first: vCPU threads must be gone before the VM's memory is unmapped.
    threads: Threads,
    shared: Arc<Shared>,
    vm: kvm::Vm,
    kvm: kvm_ioctls::Kvm,
    placement: Placement,
    node: usize,
    tsc_khz: u32,
}

impl Machine {
    /// Builds the VM with all vCPUs, stopped. `memory` has the machine's RAM at
    /// [`layout::ram_ranges`]; what is mapped behind it (a userfaultfd) is the caller's.
    ///
    /// # Errors
    /// When the configuration contradicts itself or the host's KVM can't carry it.
    pub fn new(
        config: MachineConfig,
        memory: GuestMemoryMmap<()>,
        fabric: Arc<dyn Fabric>,
    ) -> Result<Self, MachineError> {
        let MachineConfig {
            placement,
            node,
            tsc_khz,
            cpuid,
            console,
            ends,
        } = config;
        check(&placement, node, &memory)?;
        kick::install()?;
        let kvm = kvm::open()?;
        let mut common = if cpuid.is_empty() {
            kvm::supported_cpuid(&kvm)?
        } else {
            cpuid
        };
        if emulated::by_qemu() {
            emulated::hide_xsave(&mut common);
        }
        // One host shares no pages: KVM may do with faults as it likes.
        let faults = match placement.hosts.len() {
            0 | 1 => FaultKinds::Coarse,
            _ => FaultKinds::best(&kvm, placement.hosts[node].vcpus.len() as u32),
        };
        let vm = kvm::Vm::new(&kvm, memory, faults)?;
        let count = placement.cpus();
        let counters: Arc<Vec<Counters>> = Arc::new((0..count).map(|_| Counters::default()).collect());
        let owners = Owners::new(vm.fd.clone(), node, &placement, fabric.clone(), counters.clone(), ends.clone())?;
        let owners = Arc::new(owners);
        let interrupts = Arc::new(Interrupts::new(owners.clone()));
        let clock = if tsc_khz == 0 {
            kvm::host_tsc_khz(&kvm)?
        } else {
            tsc_khz
        };
        let mut vcpus = Vec::new();
        for id in 0..count {
            let role = if placement.owner(id) == Some(node) {
                Role::Owner
            } else {
                Role::Proxy
            };
            let leaves = cpuid::guest_cpuid(&common, id, &placement, clock);
            let vcpu = Vcpu::new(&vm.fd, id, role, &leaves)?;
            vcpu.set_tsc_khz(clock)?;
            vcpus.push(vcpu);
        }
        vm.keep_faults_exact(faults)?;
        tracing::info!(?faults, "page faults of the guest");
        let bus = (node == 0).then(|| Bus {
            com1: serial::Com1::new(console),
            rtc: rtc::Rtc::default(),
            ioapic: Ioapic::default(),
            interrupts: interrupts.clone(),
            devices: OnceLock::new(),
            ends: ends.clone(),
        });
        let list = msr_list(&kvm)?;
        let first = vcpus.first().map(|vcpu| vcpu.read_msrs(&list)).transpose()?.unwrap_or_default();
        let msrs = first.into_iter().map(|(index, _)| index).collect();
        let shared = Arc::new(Shared::new(owners, interrupts, bus, fabric, counters, msrs, ends));
        let threads = Threads::new(vcpus, shared.clone());
        Ok(Machine {
            threads,
            shared,
            vm,
            kvm,
            placement,
            node,
            tsc_khz: clock,
        })
    }

    /// Attaches the PCI devices; once, before [`Machine::run`]. Has no effect on nodes other than 0.
    pub fn attach(&self, devices: Arc<dyn DeviceBus>) {
        if let Some(bus) = &self.shared.bus {
            // A second attachment is refused by the cell; the first stays.
            let _ = bus.devices.set(devices);
        }
    }

    /// What devices send their interrupts to (it is a [`krg_virtio::MsiSink`]).
    pub fn interrupts(&self) -> Arc<Interrupts> {
        self.shared.interrupts.clone()
    }

    /// Puts vCPU 0 at the kernel's entry. No effect on a node that doesn't own vCPU 0.
    ///
    /// # Errors
    /// When the vCPUs are running, or KVM refuses the state.
    pub fn set_entry(&self, entry: &boot::Entry) -> Result<(), MachineError> {
        if !self.shared.owners.runs_here(0) {
            return Ok(());
        }
        self.threads.with_stopped(0, |vcpu| entry.apply(vcpu))
    }

    /// Sets what is added to this host's TSC to make the guest's, modulo 2^64, on all vCPUs.
    ///
    /// # Errors
    /// When a vCPU is running, or KVM has no such attribute.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), MachineError> {
        (0..self.placement.cpus()).try_for_each(|id| self.threads.with_stopped(id, |vcpu| vcpu.set_tsc_offset(offset)))
    }

    /// TSC frequency of the guest in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Starts (or goes on with) every vCPU.
    ///
    /// # Errors
    /// When a thread can't be started; those that were go on until [`Machine::stop`].
    pub fn run(&self) -> Result<(), MachineError> {
        self.threads.start()
    }

    /// Stops every vCPU and waits until all threads have ended: owners first, then the proxies,
    /// which hand on what is pending. A thread blocked on a page of guest memory ends when the
    /// page arrives or its userfaultfd is closed; a device access when [`Fabric::io`] returns.
    pub fn stop(&self) {
        self.threads.stop();
    }

    /// Takes a message about a vCPU that node `from` sent.
    pub fn receive(&self, from: usize, vcpu: u32, message: ownership::Message) {
        self.shared.owners.receive(from, vcpu, message);
    }

    /// Moves `vcpu` to node `to`. `reply` is called with what came of it, by any thread, or dropped if the
    /// machine ends first.
    ///
    /// # Errors
    /// There is no such vCPU or node.
    pub fn migrate(&self, vcpu: u32, to: usize, reply: MoveReply) -> Result<(), MoveError> {
        self.shared.owners.migrate(vcpu, to, self.placement.hosts.len(), reply)
    }

    /// The node that runs `vcpu` as far as this one knows, and its epoch: the higher, the newer.
    pub fn owner(&self, vcpu: u32) -> Option<(usize, u64)> {
        self.shared.owners.owner(vcpu)
    }

    /// The thread (its kernel id) that runs `vcpu` on this node, and the epoch; `None` if it runs elsewhere.
    pub fn running(&self, vcpu: u32) -> Option<(u32, u64)> {
        let (_, epoch) = self.shared.owners.owner(vcpu).filter(|_| self.shared.owners.runs_here(vcpu))?;
        let thread = self.shared.owners.duty(vcpu).thread.load(Ordering::SeqCst);
        u32::try_from(thread).ok().filter(|thread| *thread != 0).map(|thread| (thread, epoch))
    }

    /// When the parts of the last moves of `vcpu` from and to this node were over; `None` if there is no such vCPU.
    pub fn move_times(&self, vcpu: u32) -> Option<MoveTimes> {
        (vcpu < self.placement.cpus()).then(|| self.shared.owners.duty(vcpu).times.read())
    }

    /// A node is lost: nothing waits for it any more.
    pub fn lose(&self, node: usize) {
        self.shared.owners.lose(node);
    }

    /// Drops the replies of all moves that were asked for here.
    pub fn forget_moves(&self) {
        self.shared.owners.forget_moves();
    }

    /// Carries out a device access of another node (on node 0); all ones on the others.
    pub fn serve(&self, access: Access) -> u64 {
        self.shared.bus.as_ref().map_or(u64::MAX, |bus| bus.access(access))
    }

    /// Types on the console; returns how many bytes were taken (node 0).
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.shared.bus.as_ref().map_or(0, |bus| bus.type_in(bytes))
    }

    /// Page-table roots (CR3 with its flag bits) last seen on the vCPUs this node runs, as
    /// `(vcpu, root)`. A root may be as old as the vCPU's last exit: see [`Machine::sample_roots`].
    pub fn page_table_roots(&self) -> Vec<(u32, u64)> {
        (0..self.placement.cpus())
            .filter(|id| self.shared.owners.runs_here(*id))
            .filter_map(|id| Some((id, self.shared.roots.get(id as usize)?.load(Ordering::Relaxed))))
            .collect()
    }

    /// Has the vCPUs this node runs note their roots soon. Doesn't wait for them.
    pub fn sample_roots(&self) {
        self.threads.kick_owners();
    }

    /// Counts of `vcpu` on this node; `None` if there is no such vCPU.
    pub fn statistics(&self, vcpu: u32) -> Option<VcpuStatistics> {
        self.shared.counters.get(vcpu as usize).map(Counters::read)
    }

    /// The state of this node's machine.
    ///
    /// # Errors
    /// When a vCPU is running, or KVM can't tell its state.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let list = msr_list(&self.kvm)?;
        let count = self.placement.cpus();
        let vcpus = (0..count).map(|id| self.threads.with_stopped(id, |vcpu| vcpu.save(&list)));
        Ok(MachineState {
            version: MachineState::VERSION,
            node: self.node,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            ownership: self.shared.owners.save()?,
            startup_vectors: self.shared.owners.startup.all(),
            devices: self.shared.bus.as_ref().map(Bus::save),
        })
    }

    /// Takes over a saved state of the same node of the same machine. The TSC is set by
    /// [`Machine::set_tsc_offset`] afterwards.
    ///
    /// # Errors
    /// When a vCPU is running, the state isn't this machine's, or KVM refuses it; the machine must
    /// not be run then.
    pub fn restore(&self, saved: &MachineState) -> Result<(), MachineError> {
        let refuse = |reason: String| {
            Err(MachineError::State {
                object: format!("machine of node {}", self.node),
                reason,
            })
        };
        let count = self.placement.cpus() as usize;
        if saved.version != MachineState::VERSION {
            return refuse(format!("version {} is not known here", saved.version));
        }
        if saved.node != self.node || saved.vcpus.len() != count || saved.ownership.len() != count {
            return refuse(format!(
                "it is of node {}, with {} vCPUs",
                saved.node,
                saved.vcpus.len()
            ));
        }
        for (ownership, vcpu) in saved.ownership.iter().zip(&saved.vcpus) {
            if let Err(error) = ownership.check(self.node, self.placement.hosts.len()) {
                return refuse(error.to_string());
            }
            if ownership.runs_here() != (vcpu.role == Role::Owner) {
                return refuse("a vCPU and who owns it contradict each other".into());
            }
        }
        match (&self.shared.bus, &saved.devices) {
            (Some(bus), Some(devices)) => bus.restore(devices)?,
            (Some(_), None) => return refuse("the devices are missing".into()),
            (None, _) => {}
        }
        for (id, vcpu) in saved.vcpus.iter().enumerate() {
            self.threads.with_stopped(id as u32, |v| v.restore(vcpu))?;
        }
        self.shared.owners.restore(&saved.ownership);
        self.shared.owners.startup.restore(saved.startup_vectors);
        Ok(())
    }

    /// File of the KVM VM, for eventfds of devices.
    pub fn vm(&self) -> &Arc<kvm_ioctls::VmFd> {
        &self.vm.fd
    }
}

/// MSRs that KVM lists as state.
fn msr_list(kvm: &kvm_ioctls::Kvm) -> Result<Vec<u32>, MachineError> {
    let list = kvm.get_msr_index_list().map_err(|e| MachineError::kvm("KVM_GET_MSR_INDEX_LIST", "host", e))?;
    Ok(list.as_slice().to_vec())
}

/// Checks what later code relies on.
fn check(placement: &Placement, node: usize, memory: &GuestMemoryMmap<()>) -> Result<(), MachineError> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let refuse = |text: String| Err(MachineError::Config(text));
    if node >= placement.hosts.len() {
        return refuse(format!("node {node} of a machine of {} hosts", placement.hosts.len()));
    }
    if placement.cpus() == 0 || placement.cpus() > layout::MAX_VCPUS {
        return refuse(format!(
            "{} vCPUs; 1 to {} can be had",
            placement.cpus(),
            layout::MAX_VCPUS
        ));
    }
    let ram: Vec<_> = memory
        .iter()
        .map(|r| r.start_addr().0..r.start_addr().0 + r.len())
        .collect();
    if ram
        .iter()
        .any(|r| r.start < layout::HIGH_RAM_START && r.end > layout::LOW_RAM_END)
    {
        return refuse("guest memory overlaps the device addresses at 3 to 4 GiB".into());
    }
    if ram.iter().map(|r| r.end - r.start).sum::<u64>() != placement.memory() {
        return refuse("guest memory and placement differ in size".into());
    }
    Ok(())
}
