//! The same guest without us: one thread takes its vCPU from one VM to another, by nothing but KVM's calls.
//!
//! Both VMs have the same memory, so no page is fetched and nothing is sent. What the guest sees of it is what a move
//! costs on this machine at least, beside the network: from its last instruction to its first.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use krg_dsm::memory::GuestRam;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_device_attr, kvm_mp_state, kvm_msr_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::guest::{self, ANSWER, ORDER};
use super::nodes::{LOADED, MEMORY};

const PATIENCE: Duration = Duration::from_secs(10);
/// KVM_VCPU_TSC_CTRL and its attribute KVM_VCPU_TSC_OFFSET.
const TSC_CONTROL: u32 = 0;
const TSC_OFFSET: u64 = 0;
const IA32_TSC: u32 = 0x10;
vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xAE, 0xe1, kvm_device_attr);

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A VM with one vCPU.
struct Bare {
    vcpu: VcpuFd,
    _vm: VmFd,
}

impl Bare {
    fn new(kvm: &Kvm, ram: &GuestRam) -> anyhow::Result<Self> {
        let vm = kvm.create_vm()?;
        vm.create_irq_chip()?;
        for (slot, region) in (0..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: region.host,
                flags: 0,
            };
            // SAFETY: the memory is mapped for as long as `ram`, which outlives the VMs.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let offset = 0u64;
        let attr = kvm_device_attr { group: TSC_CONTROL, attr: TSC_OFFSET, addr: &raw const offset as u64, flags: 0 };
        // SAFETY: KVM_SET_DEVICE_ATTR on a vCPU file reads `attr` and the eight bytes at `addr`; both live until then.
        let done = unsafe { ioctl_with_ref(&vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
        ensure!(done == 0, "KVM_VCPU_TSC_OFFSET: {}", std::io::Error::last_os_error());
        Ok(Bare { vcpu, _vm: vm })
    }

    /// MSRs that are state and can be read and set.
    fn msrs(&self, kvm: &Kvm) -> anyhow::Result<Msrs> {
        let mut entries = Vec::new();
        for index in kvm.get_msr_index_list()?.as_slice() {
            let mut one = Msrs::from_entries(&[kvm_msr_entry { index: *index, ..Default::default() }])?;
            // The rest would end a call before the others.
            if self.vcpu.get_msrs(&mut one).is_ok_and(|count| count == 1) && self.vcpu.set_msrs(&one).is_ok_and(|count| count == 1) {
                entries.extend_from_slice(one.as_slice());
            }
        }
        // The clock is set apart, once.
        entries.retain(|entry| entry.index != IA32_TSC);
        Ok(Msrs::from_entries(&entries)?)
    }

    /// Gives `to` the state of this vCPU, by each call once; how long that took.
    fn hand_over(&self, to: &Bare, msrs: &mut Msrs) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let (from, to) = (&self.vcpu, &to.vcpu);
        let _ = from.get_mp_state()?;
        let (regs, sregs, debug) = (from.get_regs()?, from.get_sregs()?, from.get_debug_regs()?);
        let (events, lapic, xcrs, xsave) = (from.get_vcpu_events()?, from.get_lapic()?, from.get_xcrs()?, from.get_xsave()?);
        from.get_msrs(msrs)?;
        to.set_sregs(&sregs)?;
        to.set_xcrs(&xcrs)?;
        // SAFETY: the area is as long as KVM reads, as this process has asked for no dynamic features.
        unsafe { to.set_xsave(&xsave) }?;
        to.set_regs(&regs)?;
        to.set_debug_regs(&debug)?;
        to.set_lapic(&lapic)?;
        let count = to.set_msrs(msrs)?;
        to.set_vcpu_events(&events)?;
        to.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        ensure!(count == msrs.as_slice().len(), "{count} MSRs of {} were set", msrs.as_slice().len());
        Ok(begun.elapsed())
    }
}

/// The two VMs, and the thread that runs the vCPU in one of them.
pub struct Handover {
    ram: Arc<GuestRam>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// Moves that were asked for, and moves made.
    asked: Arc<AtomicU64>,
    made: Arc<AtomicU64>,
    /// Nanoseconds that KVM's calls took in the last move.
    calls: Arc<AtomicU64>,
    msrs: usize,
    stop: Arc<AtomicBool>,
    orders: u64,
}

impl Handover {
    pub fn new() -> anyhow::Result<Self> {
        register_signal_handler(SIGRTMIN() + 1, on_signal)?;
        let ram = Arc::new(GuestRam::new(&[(0, MEMORY)], false)?);
        let micro = guest::build(MEMORY, LOADED, 1)?;
        for (at, bytes) in &micro.writes {
            ram.memory().write_slice(bytes, GuestAddress(*at))?;
        }
        let kvm = Kvm::new()?;
        let mut vms = [Bare::new(&kvm, &ram)?, Bare::new(&kvm, &ram)?];
        let mut sregs = vms[0].vcpu.get_sregs()?;
        micro.vcpus[0].apply(&mut sregs);
        vms[0].vcpu.set_sregs(&sregs)?;
        vms[0].vcpu.set_regs(&micro.vcpus[0].regs())?;
        let mut msrs = vms[0].msrs(&kvm)?;
        let [asked, made, calls] = std::array::from_fn(|_| Arc::new(AtomicU64::new(0)));
        let (count, stop) = (msrs.as_slice().len(), Arc::new(AtomicBool::new(false)));
        let (wanted, done, took, over, kept) = (asked.clone(), made.clone(), calls.clone(), stop.clone(), ram.clone());
        let thread = std::thread::spawn(move || {
            let _mapped = kept;
            let mut here = 0;
            while !over.load(Ordering::SeqCst) {
                if wanted.load(Ordering::SeqCst) > done.load(Ordering::SeqCst) {
                    let calls = vms[here].hand_over(&vms[1 - here], &mut msrs)?;
                    took.store(calls.as_nanos() as u64, Ordering::SeqCst);
                    here = 1 - here;
                    done.fetch_add(1, Ordering::SeqCst);
                }
                match vms[here].vcpu.run() {
                    Err(e) if e.errno() == libc::EINTR => {}
                    other => bail!("the bare vCPU ended: {other:?}"),
                }
            }
            Ok(())
        });
        Ok(Handover { ram, thread: Some(thread), asked, made, calls, msrs: count, stop, orders: 0 })
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread has not been joined, so its number is its own.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN() + 1) };
        }
    }

    /// As the measured machine's: the longest time the guest stood still since the last order.
    fn order(&mut self) -> anyhow::Result<u64> {
        self.orders += 1;
        let memory = self.ram.memory();
        memory.store(self.orders, GuestAddress(ORDER), Ordering::SeqCst)?;
        let until = Instant::now() + PATIENCE;
        while memory.load::<u64>(GuestAddress(ANSWER + 16), Ordering::SeqCst)? != self.orders {
            ensure!(Instant::now() < until, "the bare guest doesn't answer");
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(memory.load(GuestAddress(ANSWER), Ordering::SeqCst)?)
    }

    /// MSRs that are read and written.
    pub fn msrs(&self) -> usize {
        self.msrs
    }

    /// How long the guest stands still in one move, in ticks of its TSC, and how long KVM's calls took.
    pub fn go(&mut self) -> anyhow::Result<(u64, Duration)> {
        self.order()?;
        let made = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let until = Instant::now() + PATIENCE;
        while self.made.load(Ordering::SeqCst) < made {
            self.kick();
            // A signal that comes before KVM_RUN is lost.
            std::thread::sleep(Duration::from_millis(1));
            ensure!(Instant::now() < until, "the bare vCPU doesn't move: {:?}", self.ended());
        }
        std::thread::sleep(Duration::from_millis(1));
        Ok((self.order()?, Duration::from_nanos(self.calls.load(Ordering::SeqCst))))
    }

    fn ended(&mut self) -> Option<anyhow::Result<()>> {
        let thread = self.thread.take_if(|thread| thread.is_finished())?;
        Some(thread.join().ok().context("the bare thread panicked").and_then(|result| result))
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
