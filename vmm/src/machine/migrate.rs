//! A vCPU goes to another node, and comes: its thread changes between owner and proxy.
//!
//! Other vCPUs of the same node send it interrupts inside the kernel, at any moment. Two things keep them:
//!
//! - *Leaving.* Nothing is written to the LAPIC as a whole. The state that goes to the new owner is all but what
//!   is pending; the LAPIC is then made a proxy's by what a guest could do, too (ends of interrupts, task
//!   priority, timer off), which leaves pending interrupts alone. These the proxy takes out as always: up to
//!   a moment when there are none, to go with the state, and later ones as any node's.
//! - *Arriving.* KVM_SET_LAPIC writes everything. So no vCPU of the node runs meanwhile ([`super::gate`]); the
//!   proxy takes out what they had sent, which is raised again afterwards.
//!
//! *Timers.* A TSC deadline that is not zero has not become an interrupt yet, even if it has passed; it is
//! cleared here and set there. The guest's TSC is the same on all nodes. A counting timer goes on with what is
//! left of its count. One that has run out may not have become an interrupt yet: a KVM_RUN that runs nothing
//! makes it one.
//!
//! *What a move takes* is calls of KVM's, by their number more than by what they do. So the old owner takes from the run
//! page what the last KVM_RUN left there, the new one has the next KVM_RUN take it, and of the rest is written only what a
//! proxy doesn't have already.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_SHADOW,
    kvm_debugregs, kvm_guest_debug, kvm_vcpu_events,
};

use super::error::MachineError;
use super::fabric::{Event, Touch};
use super::kick;
use super::move_times::Part;
use super::proxy::{self, ProxyContext};
use super::state::{IA32_TSC_DEADLINE, Registers};
use super::threads::Shared;
use super::transfer::Travelling;
use super::vcpu::{APIC_BASE_X2APIC, Role, Vcpu, fail};
use crate::ownership::Input;

/// LAPIC registers in KVM's form.
const ISR: usize = 0x100;
const INTERRUPT_COMMAND: usize = 0x300;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
/// Bits 18-17 of the timer's LVT entry.
const TIMER_MODE: u32 = 3 << 17;
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;

/// Bits 10-8 of the interrupt command.
const DELIVERY_MODE: u32 = 7 << 8;
const INIT: u32 = 5 << 8;

/// x2APIC registers, as MSRs.
const X2APIC_TPR: u32 = 0x808;
const X2APIC_LVT_TIMER: u32 = 0x832;
const X2APIC_LVT_PERFORMANCE: u32 = 0x834;
const X2APIC_INITIAL_COUNT: u32 = 0x838;
const LVT_MASKED: u64 = 1 << 16;

/// How late the host's timer may be: a count that has run out becomes an interrupt within this.
const TIMER_LATENCY: Duration = Duration::from_micros(200);

/// Hands `vcpu`, which is outside KVM_RUN without an open device access, to the node that is to run it, unless
/// that is not wanted any more.
pub(crate) fn leave(shared: &Shared, vcpu: &mut Vcpu) -> Result<(), MachineError> {
    let (owners, id) = (&shared.owners, vcpu.id);
    owners.duty(id).leave.store(false, Ordering::SeqCst);
    owners.step(id, Input::Stopped);
    if !owners.is_leaving(id) {
        return Ok(());
    }
    let times = &owners.duty(id).times;
    times.over(Part::Stopped);
    // SIPI is taken only where INIT was: neither the vCPU that waits for it, nor one that is to send it, can
    // go between the two.
    let starting = || shared.awaiting.iter().any(|proxy| proxy.load(Ordering::SeqCst));
    // First, as reading it takes pending INIT and SIPI.
    let mp_state = vcpu.mp_state()?;
    if mp_state == KVM_MP_STATE_INIT_RECEIVED || starting() {
        owners.step(id, Input::Refused);
        return Ok(());
    }
    let registers = vcpu.save_after_run(&shared.msrs)?;
    // The proxy may not have noticed yet, and a vCPU of this node needs none.
    if registers.sent_init_last() {
        owners.step(id, Input::Refused);
        return Ok(());
    }
    let state = Travelling { mp_state, startup: owners.startup.all(), registers };
    let state = vcpu.stop_timer(state, &shared.msrs)?;
    // Nothing was pending when the LAPIC was read: that was the moment. What has come since goes as any node's, so
    // all that makes a proxy of it can wait until the state is on its way. Unless the LAPIC is off: the vCPU may switch
    // it on as soon as it runs there, and this one must take interrupts by then.
    let at_once = !state.registers.has_pending() && state.registers.takes_interrupts();
    let pending = RefCell::new(Vec::new());
    if !at_once {
        vcpu.become_proxy(&state)?;
        let sink = |event| pending.borrow_mut().push(event);
        proxy::park_and_empty(vcpu, &taking_out(shared, id, &AtomicBool::new(false), &sink))?;
    }
    let (bytes, pending) = (state.encode(), pending.into_inner());
    let in_service = state.in_service();
    tracing::debug!(
        vcpu = id,
        mp_state = state.mp_state,
        in_service,
        pending = pending.len(),
        bytes = bytes.len(),
        "leaves"
    );
    times.over(Part::Saved);
    owners.step(id, Input::Saved { state: bytes, pending });
    times.over(Part::Sent);
    if at_once {
        // None of this is urgent any more, as the vCPU is on its way.
        std::thread::yield_now();
        vcpu.become_proxy(&state)?;
        // The page tables are those of the vCPU still.
        if let Some((to, _)) = owners.owner(id).filter(|(to, _)| *to != shared.owners.node()) {
            shared.fabric.announce(to, &vcpu.about_to_touch(&state));
        }
    }
    Ok(())
}

/// Makes `vcpu`, a proxy, the vCPU whose state came.
pub(crate) fn arrive(shared: &Shared, vcpu: &mut Vcpu) -> Result<(), MachineError> {
    let (owners, id) = (&shared.owners, vcpu.id);
    owners.duty(id).arrive.store(false, Ordering::SeqCst);
    let Some(bytes) = owners.take_state(id) else {
        return Ok(());
    };
    let times = &owners.duty(id).times;
    times.over(Part::Woken);
    let state = Travelling::decode(&bytes, id).map_err(|error| MachineError::State {
        object: format!("vCPU {id} from another node"),
        reason: error.to_string(),
    })?;
    state
        .startup
        .to_le_bytes()
        .into_iter()
        .filter(|vector| *vector != 0)
        .for_each(|vector| owners.startup.learn(vector));
    let held = shared.gate.hold();
    times.over(Part::Alone);
    if vcpu.mp_state()? != KVM_MP_STATE_UNINITIALIZED || vcpu.has_pending()? {
        let sink = |event| owners.raise(id, event);
        proxy::empty(vcpu, &taking_out(shared, id, &AtomicBool::new(false), &sink))?;
    }
    vcpu.become_owner(&state)?;
    times.over(Part::Restored);
    shared.awaiting[id as usize].store(false, Ordering::SeqCst);
    shared.roots[id as usize].store(state.registers.sregs.cr3, Ordering::Relaxed);
    owners.step(id, Input::Restored);
    drop(held);
    Ok(())
}

/// For a proxy that hands what is pending to `sink`, and is never asked to do anything else.
fn taking_out<'a>(shared: &'a Shared, id: u32, stop: &'a AtomicBool, sink: &'a dyn Fn(Event)) -> ProxyContext<'a> {
    let id = id as usize;
    ProxyContext {
        sink,
        startup: &shared.owners.startup,
        stop,
        arrive: &|| false,
        awaiting: &shared.awaiting[id],
        counters: &shared.counters[id],
    }
}

impl Registers {
    /// Whether the last interrupt that the vCPU sent is INIT: SIPI is to follow.
    fn sent_init_last(&self) -> bool {
        self.lapic(INTERRUPT_COMMAND) & DELIVERY_MODE == INIT
    }

    /// The timer's LVT entry if it counts, or has counted, rather than waits for a TSC deadline.
    fn counting_timer(&self) -> Option<u32> {
        let entry = self.lapic(LVT_TIMER);
        let counts = matches!(entry & TIMER_MODE, ONE_SHOT | PERIODIC) && self.lapic(INITIAL_COUNT) != 0;
        counts.then_some(entry)
    }
}

impl Travelling {
    /// How many interrupts are in service.
    fn in_service(&self) -> u32 {
        (0..8).map(|n| self.registers.lapic(ISR + n * 16).count_ones()).sum()
    }
}

impl Vcpu {
    /// Stops the timer of a vCPU that has just been saved; the vCPU as it is then, with the timer as it was.
    fn stop_timer(&mut self, mut state: Travelling, msrs: &[u32]) -> Result<Travelling, MachineError> {
        let timer = state.registers.counting_timer();
        if let Some(entry) = timer {
            if entry & TIMER_MODE == PERIODIC {
                // One period more at most is running out from here on.
                self.set_msr(X2APIC_LVT_TIMER, u64::from(entry & !TIMER_MODE))?;
            }
            for waited in [false, true] {
                kick::run_nothing(self)?;
                state = Travelling { mp_state: self.mp_state()?, registers: self.save_after_run(msrs)?, ..state };
                let ran_out = state.registers.lapic(INITIAL_COUNT) != 0 && state.registers.lapic(CURRENT_COUNT) == 0;
                if !ran_out {
                    break;
                }
                if !waited {
                    std::thread::sleep(TIMER_LATENCY);
                }
            }
        }
        let registers = &mut state.registers;
        // INIT stops the timer.
        if let Some(entry) = timer.filter(|_| registers.lapic(INITIAL_COUNT) != 0) {
            registers.set_lapic(LVT_TIMER, entry);
            if registers.lapic(CURRENT_COUNT) == 0 && entry & TIMER_MODE == PERIODIC {
                registers.set_lapic(CURRENT_COUNT, registers.lapic(INITIAL_COUNT));
            } else if registers.lapic(CURRENT_COUNT) == 0 {
                // It is over; KVM would start it again.
                registers.set_lapic(INITIAL_COUNT, 0);
            }
        }
        let is_armed = |(index, value): &(u32, u64)| *index == IA32_TSC_DEADLINE && *value != 0;
        if timer.is_some() || registers.msrs.iter().any(is_armed) {
            self.set_msrs(&[(IA32_TSC_DEADLINE, 0), (X2APIC_INITIAL_COUNT, 0)])?;
        }
        Ok(state)
    }

    /// The pages of code, stack and the kernel's own data of this CPU (Linux has it at the base of GS): what the vCPU
    /// touches first.
    fn about_to_touch(&self, state: &Travelling) -> Vec<Touch> {
        let (regs, sregs) = (&state.registers.regs, &state.registers.sregs);
        let here = [(regs.rip, false), (regs.rsp, true), (regs.rsp.wrapping_sub(256), true)];
        // A base of zero is none.
        let based = [(sregs.gs.base, true), (sregs.tr.base, false)].into_iter().filter(|(address, _)| *address != 0);
        let mut touches: Vec<Touch> = Vec::new();
        for (address, write) in here.into_iter().chain(based) {
            let Ok(found) = self.fd.translate_gva(address) else { continue };
            let touch = Touch { gpa: found.physical_address & !0xfff, write };
            if found.valid != 0 && !touches.iter().any(|other| other.gpa == touch.gpa) {
                touches.push(touch);
            }
        }
        touches
    }

    /// Turns a vCPU whose state was saved into its proxy, short of parking it. What is pending stays.
    fn become_proxy(&mut self, saved: &Travelling) -> Result<(), MachineError> {
        // No exception, interrupt or NMI is under way any more, and none blocked. Not named, pending NMIs stay.
        let none = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        self.fd
            .set_vcpu_events(&none)
            .map_err(|e| fail("KVM_SET_VCPU_EVENTS", self.id, e))?;
        let debug = kvm_debugregs {
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Default::default()
        };
        self.fd
            .set_debug_regs(&debug)
            .map_err(|e| fail("KVM_SET_DEBUGREGS", self.id, e))?;
        (0..saved.in_service()).try_for_each(|_| self.end_of_interrupt())?;
        self.set_msrs(&[(X2APIC_TPR, 0), (X2APIC_LVT_TIMER, LVT_MASKED), (X2APIC_LVT_PERFORMANCE, LVT_MASKED)])?;
        self.set_apic_base(false)?;
        self.show_registers(false);
        self.awaits_sipi = saved.mp_state == KVM_MP_STATE_INIT_RECEIVED;
        if !self.awaits_sipi {
            self.enable_lapic()?;
        }
        let mut present = saved.registers.clone();
        present.debug = debug;
        let deadline = |(index, _): &&mut (u32, u64)| *index == IA32_TSC_DEADLINE;
        present.msrs.iter_mut().filter(deadline).for_each(|(_, value)| *value = 0);
        self.present = Some(Box::new(present));
        self.role = Role::Proxy;
        Ok(())
    }

    /// Turns a proxy in which nothing is pending into the vCPU. Nobody may send it anything meanwhile.
    fn become_owner(&mut self, state: &Travelling) -> Result<(), MachineError> {
        if std::mem::take(&mut self.is_debugged) {
            self.fd
                .set_guest_debug(&kvm_guest_debug::default())
                .map_err(|e| fail("KVM_SET_GUEST_DEBUG", self.id, e))?;
        }
        let (saved, present) = (&state.registers, self.present.take());
        let runs = matches!(state.mp_state, KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_HALTED);
        if runs && saved.sregs.apic_base & APIC_BASE_X2APIC == APIC_BASE_X2APIC {
            self.restore_core_at_run(saved);
        } else {
            self.restore_core(saved)?;
        }
        self.restore_beside(saved, present.as_deref())?;
        self.set_mp_state(state.mp_state)?;
        self.awaits_sipi = false;
        self.role = Role::Owner;
        self.fd.set_kvm_immediate_exit(0);
        Ok(())
    }
}
