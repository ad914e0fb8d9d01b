//! A parked proxy: this node's stand-in for a vCPU that runs on another. What this node's vCPUs
//! send it is taken out of its LAPIC, in order, and handed to the owner.
//!
//! Parked means MP state UNINITIALIZED with RFLAGS.IF set: KVM_RUN then blocks in the kernel and
//! returns EAGAIN, before any guest code runs, when anything is pending. The MP state says what:
//!
//! * still UNINITIALIZED: an interrupt or NMI. The proxy is made RUNNABLE and entered; a stub
//!   ([`super::stub`]) names the vector; the proxy is parked again.
//! * INIT_RECEIVED: INIT. The proxy is run on with single step armed: the SIPI that wakes it traps
//!   after one instruction, and CS holds its vector.
//! * RUNNABLE: INIT and SIPI; CS holds the vector.
//!
//! INIT and SIPI that hit the proxy during the moment it is entered for an interrupt are taken by
//! KVM_RUN itself, which then would go on in the guest's start-up code. Breakpoints on the start-up
//! addresses seen so far stop it there. Before a machine's first SIPI no address is known, but then
//! the vCPU hasn't run yet and nobody sends it interrupts either.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_guest_debug,
};
use kvm_ioctls::VcpuExit;

use super::counters::Counters;
use super::error::{Errno, MachineError};
use super::fabric::Event;
use super::stub;
use super::vcpu::{Vcpu, fail};

/// Vector of the NMI's stub.
const NMI_VECTOR: u16 = 2;
/// Kicks a drain may take: it runs a handful of instructions, and a stopping machine kicks once a
/// millisecond. A proxy that exceeds this runs something other than the stubs.
const MAX_KICKS: u32 = 2000;
/// Vectors below are the CPU's own: one of them in a stub is a fault of this program.
const FIRST_INTERRUPT: u16 = 32;

/// Start-up vectors the guest has used: one byte each, 0 for none (no guest starts in the page at
/// address 0, where its real-mode vectors are).
#[derive(Default)]
pub(crate) struct StartupVectors(AtomicU32);

impl StartupVectors {
    /// Remembers `vector` as the latest of four.
    pub fn learn(&self, vector: u8) {
        let add = |known: u32| (!known.to_le_bytes().contains(&vector)).then_some(known << 8 | u32::from(vector));
        // Known already: nothing to add.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
    }

    /// All four, one byte each.
    pub fn all(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Takes over a saved set.
    pub fn restore(&self, saved: u32) {
        self.0.store(saved, Ordering::Release);
    }
}

/// What a proxy works with.
pub(crate) struct ProxyContext<'a> {
    /// Takes what was pending, in order.
    pub sink: &'a dyn Fn(Event),
    pub startup: &'a StartupVectors,
    pub stop: &'a AtomicBool,
    /// The vCPU came here: it is to be restored.
    pub arrive: &'a dyn Fn() -> bool,
    /// Set while it has handed on INIT and waits for SIPI.
    pub awaiting: &'a AtomicBool,
    pub counters: &'a Counters,
}

/// Why a proxy's loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// It was told to stop. What was pending has been handed on.
    Stopped,
    /// The vCPU came here.
    Arrive,
}

/// Runs `vcpu` as a proxy until it is told to stop or the vCPU arrives.
pub(crate) fn run(vcpu: &mut Vcpu, context: &ProxyContext<'_>) -> Result<Left, MachineError> {
    let mut proxy = Proxy::parked(vcpu, context)?;
    while !context.stop.load(Ordering::Acquire) {
        if (context.arrive)() {
            return Ok(Left::Arrive);
        }
        proxy.wait()?;
    }
    proxy.finish()?;
    Ok(Left::Stopped)
}

/// Parks `vcpu`, which was an owner, and hands on what is pending, until there is a moment when nothing is.
pub(crate) fn park_and_empty(vcpu: &mut Vcpu, context: &ProxyContext<'_>) -> Result<(), MachineError> {
    Proxy::parked(vcpu, context)?.finish()
}

/// The same for a proxy that is parked, or was until INIT or SIPI changed its MP state: parking it anew would lose them.
pub(crate) fn empty(vcpu: &mut Vcpu, context: &ProxyContext<'_>) -> Result<(), MachineError> {
    Proxy { vcpu, context, breakpoints: 0 }.finish()
}

struct Proxy<'a> {
    vcpu: &'a mut Vcpu,
    context: &'a ProxyContext<'a>,
    /// Start-up vectors that are known to have a breakpoint.
    breakpoints: u32,
}

/// What KVM_RUN came back with.
enum Outcome {
    /// A pending event woke the parked proxy.
    Event,
    /// A signal.
    Kicked,
    /// `out` to this port.
    Port(u16),
    /// Single step or breakpoint.
    Trapped,
}

impl<'a> Proxy<'a> {
    /// Parks `vcpu`, whatever it was before.
    fn parked(vcpu: &'a mut Vcpu, context: &'a ProxyContext<'a>) -> Result<Self, MachineError> {
        let mut proxy = Proxy { vcpu, context, breakpoints: 0 };
        context.awaiting.store(proxy.vcpu.awaits_sipi, Ordering::SeqCst);
        if proxy.vcpu.awaits_sipi {
            proxy.single_step()?;
        } else {
            proxy.park_all()?;
        }
        Ok(proxy)
    }

    /// Blocks until there is something, and hands it on.
    fn wait(&mut self) -> Result<(), MachineError> {
        let outcome = self.enter()?;
        match outcome {
            Outcome::Trapped => self.started(),
            // A signal may come together with an event that has changed the MP state already.
            Outcome::Event | Outcome::Kicked => match self.vcpu.mp_state()? {
                KVM_MP_STATE_UNINITIALIZED if matches!(outcome, Outcome::Event) => self.drain(),
                KVM_MP_STATE_UNINITIALIZED => Ok(()),
                KVM_MP_STATE_INIT_RECEIVED if self.vcpu.awaits_sipi => Ok(()),
                KVM_MP_STATE_INIT_RECEIVED => self.init_received(),
                KVM_MP_STATE_RUNNABLE => {
                    if !self.vcpu.awaits_sipi {
                        self.send(Event::Init);
                    }
                    self.started()
                }
                other => Err(self.lost(format!("MP state {other}"))),
            },
            Outcome::Port(port) => Err(self.lost(format!("port {port:#x} while parked"))),
        }
    }

    /// Enters the stubs until nothing is pending, at most one interrupt an entry.
    fn drain(&mut self) -> Result<(), MachineError> {
        Counters::count(&self.context.counters.drains);
        self.guard_startup()?;
        self.vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)?;
        let mut kicks = 0;
        loop {
            match self.enter()? {
                Outcome::Port(stub::EMPTY_PORT) => return self.park(),
                // The stub's iretq comes next: it lets further NMIs in.
                Outcome::Port(NMI_VECTOR) => self.send(Event::Nmi),
                Outcome::Port(vector @ FIRST_INTERRUPT..=0xff) => {
                    self.send(Event::Fixed(vector as u8));
                    self.vcpu.end_of_interrupt()?;
                    return self.park();
                }
                Outcome::Port(exception) => return Err(self.lost(format!("exception {exception} in a stub"))),
                Outcome::Kicked | Outcome::Event => {
                    if self.vcpu.mp_state()? == KVM_MP_STATE_INIT_RECEIVED {
                        return self.init_received();
                    }
                    kicks += 1;
                    if kicks > MAX_KICKS {
                        return Err(self.lost("no end to a stub".into()));
                    }
                }
                Outcome::Trapped => {
                    self.send(Event::Init);
                    return self.started();
                }
            }
        }
    }

    /// Hands on INIT and waits for SIPI.
    fn init_received(&mut self) -> Result<(), MachineError> {
        self.send(Event::Init);
        // INIT changes more of a vCPU than the stubs do.
        self.vcpu.present = None;
        self.vcpu.awaits_sipi = true;
        self.context.awaiting.store(true, Ordering::SeqCst);
        self.single_step()
    }

    /// A SIPI was taken: its vector is in CS. The LAPIC is on and the proxy parked before the owner
    /// hears of it, as the started vCPU may be sent interrupts from then on.
    fn started(&mut self) -> Result<(), MachineError> {
        let vector = (self.vcpu.sregs()?.cs.selector >> 8) as u8;
        self.context.startup.learn(vector);
        self.vcpu.present = None;
        self.vcpu.awaits_sipi = false;
        self.breakpoints = 0;
        self.debug(kvm_guest_debug::default())?;
        self.vcpu.enable_lapic()?;
        self.park_all()?;
        self.send(Event::Sipi(vector));
        self.context.awaiting.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Hands on what is pending until nothing is. If somebody may still send, that is one moment.
    fn finish(&mut self) -> Result<(), MachineError> {
        loop {
            match self.vcpu.mp_state()? {
                KVM_MP_STATE_UNINITIALIZED if !self.vcpu.has_pending()? => return Ok(()),
                KVM_MP_STATE_UNINITIALIZED => self.drain()?,
                KVM_MP_STATE_INIT_RECEIVED if self.vcpu.awaits_sipi => return Ok(()),
                KVM_MP_STATE_INIT_RECEIVED => self.init_received()?,
                KVM_MP_STATE_RUNNABLE => {
                    if !self.vcpu.awaits_sipi {
                        self.send(Event::Init);
                    }
                    self.started()?;
                }
                other => return Err(self.lost(format!("MP state {other}"))),
            }
        }
    }

    fn enter(&mut self) -> Result<Outcome, MachineError> {
        match self.vcpu.fd.run() {
            Ok(VcpuExit::IoOut(port, _)) => Ok(Outcome::Port(port)),
            Ok(VcpuExit::Debug(_)) => Ok(Outcome::Trapped),
            Ok(exit) => {
                let exit = format!("{exit:?}");
                Err(self.lost(format!("KVM_RUN returned {exit}")))
            }
            Err(e) if e.errno() == libc::EAGAIN => Ok(Outcome::Event),
            Err(e) if e.errno() == libc::EINTR => {
                Counters::count(&self.context.counters.kicks);
                self.vcpu.fd.set_kvm_immediate_exit(0);
                Ok(Outcome::Kicked)
            }
            Err(e) => Err(fail("KVM_RUN", self.vcpu.id, e)),
        }
    }

    fn send(&self, event: Event) {
        (self.context.sink)(event);
    }

    /// Parks a proxy whose system registers are still the stubs'.
    fn park(&self) -> Result<(), MachineError> {
        self.vcpu.set_regs(&stub::registers(self.vcpu.id))?;
        self.vcpu.set_mp_state(KVM_MP_STATE_UNINITIALIZED)
    }

    /// Parks a proxy in any state.
    fn park_all(&self) -> Result<(), MachineError> {
        self.vcpu.set_sregs(&stub::system_registers(self.vcpu.sregs()?))?;
        self.park()
    }

    fn single_step(&mut self) -> Result<(), MachineError> {
        self.breakpoints = 0;
        self.debug(kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        })
    }

    /// Sets breakpoints on the start-up addresses seen so far.
    fn guard_startup(&mut self) -> Result<(), MachineError> {
        let known = self.context.startup.all();
        if known == self.breakpoints {
            return Ok(());
        }
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        // DR7: bit 10 is always set; a global enable for each execution breakpoint.
        debug.arch.debugreg[7] = 0x400;
        for (register, vector) in known
            .to_le_bytes()
            .into_iter()
            .enumerate()
            .filter(|(_, vector)| *vector != 0)
        {
            debug.arch.debugreg[register] = u64::from(vector) << 12;
            debug.arch.debugreg[7] |= 2 << (2 * register);
        }
        self.breakpoints = known;
        self.debug(debug)
    }

    fn debug(&mut self, debug: kvm_guest_debug) -> Result<(), MachineError> {
        self.vcpu.is_debugged = debug.control != 0;
        self.vcpu
            .fd
            .set_guest_debug(&debug)
            .map_err(|e| fail("KVM_SET_GUEST_DEBUG", self.vcpu.id, e))
    }

    /// The proxy did what it never should.
    fn lost(&self, what: String) -> MachineError {
        MachineError::Kvm {
            call: "KVM_RUN",
            object: format!("proxy of vCPU {}: {what}", self.vcpu.id),
            errno: Errno(libc::EIO),
        }
    }
}
