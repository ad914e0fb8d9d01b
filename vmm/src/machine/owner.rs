//! A vCPU that runs here: the KVM_RUN loop, and its device accesses.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::bus::{Bus, is_posted};
use super::counters::Counters;
use super::error::{Errno, MachineError};
use super::gate::Gate;
use super::fabric::{Access, Direction, End, Fabric, Space};
use super::vcpu::{Vcpu, fail};

/// What a running vCPU works with.
pub(crate) struct OwnerContext<'a> {
    /// Node 0's devices; `None` on the other nodes.
    pub bus: Option<&'a Bus>,
    pub fabric: &'a dyn Fabric,
    pub stop: &'a AtomicBool,
    /// The vCPU is wanted on another node.
    pub leave: &'a AtomicBool,
    pub gate: &'a Gate,
    pub counters: &'a Counters,
    /// Where the page-table root is noted.
    pub root: &'a AtomicU64,
}

/// Why an owner's loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// It was told to stop, or node 0 doesn't answer any more.
    Stopped,
    /// The vCPU is wanted on another node. No device access is open.
    Leave,
    /// It ended the machine.
    End(End),
}

/// Runs `vcpu` until it is told to stop or leave, or ends the machine itself.
pub(crate) fn run(vcpu: &mut Vcpu, context: &OwnerContext<'_>) -> Result<Left, MachineError> {
    vcpu.show_registers(true);
    loop {
        // With immediate_exit set KVM_RUN completes a device access left open, and returns EINTR.
        let asked = || match (context.stop.load(Ordering::Acquire), context.leave.load(Ordering::SeqCst)) {
            (true, _) => Some(Stopped::Asked),
            (false, leave) => leave.then_some(Stopped::Leave),
        };
        if asked().is_some() {
            vcpu.fd.set_kvm_immediate_exit(1);
        }
        let id = vcpu.id;
        context.gate.enter(id);
        let exit = vcpu.fd.run();
        context.gate.leave(id);
        let other = match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                let data: *mut [u8] = data;
                context.ports(&mut vcpu.fd, port, data, false)
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = &raw const *data as *mut [u8];
                context.ports(&mut vcpu.fd, port, data, true)
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                Counters::count(&context.counters.memory);
                let size = data.len().min(8);
                match context.access(access(Space::Memory, gpa, size, Direction::Read)) {
                    Some(value) => {
                        data[..size].copy_from_slice(&value.to_le_bytes()[..size]);
                        None
                    }
                    None => Some(Stopped::FabricClosed),
                }
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                Counters::count(&context.counters.memory);
                let direction = write(Space::Memory, gpa, data);
                let done = context.access(access(Space::Memory, gpa, data.len().min(8), direction));
                done.is_none().then_some(Stopped::FabricClosed)
            }
            Ok(VcpuExit::Shutdown) => {
                tracing::warn!("vCPU {id}: triple fault; {}", registers(vcpu));
                Some(Stopped::End(End::TripleFault { vcpu: id }))
            }
            // Level-triggered lines don't exist here; nothing waits for the EOI.
            Ok(VcpuExit::IoapicEoi(_) | VcpuExit::Intr | VcpuExit::Hlt) => {
                Counters::count(&context.counters.other);
                None
            }
            Ok(exit) => Some(Stopped::Unexpected(format!("{exit:?}"))),
            Err(e) => match e.errno() {
                libc::EINTR => {
                    Counters::count(&context.counters.kicks);
                    vcpu.fd.set_kvm_immediate_exit(0);
                    asked()
                }
                // A vCPU that waits for SIPI was woken.
                libc::EAGAIN => {
                    Counters::count(&context.counters.other);
                    None
                }
                _ => return Err(describe(vcpu, fail("KVM_RUN", id, e).to_string())),
            },
        };
        context.root.store(vcpu.fd.sync_regs_mut().sregs.cr3, Ordering::Relaxed);
        match other {
            None => {}
            Some(Stopped::Asked) => return Ok(Left::Stopped),
            Some(Stopped::Leave) => return Ok(Left::Leave),
            Some(Stopped::FabricClosed) => {
                tracing::debug!("vCPU {id}: node 0 doesn't answer any more");
                return Ok(Left::Stopped);
            }
            Some(Stopped::End(end)) => return Ok(Left::End(end)),
            Some(Stopped::Unexpected(exit)) => return Err(describe(vcpu, format!("KVM_RUN returned {exit}"))),
        }
    }
}

/// Why the loop ends.
enum Stopped {
    Asked,
    Leave,
    FabricClosed,
    End(End),
    Unexpected(String),
}

fn access(space: Space, address: u64, size: usize, direction: Direction) -> Access {
    Access {
        space,
        address,
        size: size as u8,
        direction,
    }
}

/// A write of up to eight little-endian bytes.
fn write(space: Space, address: u64, data: &[u8]) -> Direction {
    let mut bytes = [0; 8];
    let size = data.len().min(8);
    bytes[..size].copy_from_slice(&data[..size]);
    let value = u64::from_le_bytes(bytes);
    if is_posted(space, address) {
        Direction::Posted(value)
    } else {
        Direction::Write(value)
    }
}

impl OwnerContext<'_> {
    /// Has the devices' node do `access`. `None`: it can't be reached.
    fn access(&self, access: Access) -> Option<u64> {
        match self.bus {
            Some(bus) => {
                self.fabric.before_local_io();
                Some(bus.access(access))
            }
            None => {
                Counters::count(&self.counters.remote);
                self.fabric.io(access)
            }
        }
    }

    /// Does a port exit: one access, or as many as a string instruction repeats. `data` is the
    /// slice the exit came with.
    fn ports(&self, fd: &mut VcpuFd, port: u16, data: *mut [u8], is_write: bool) -> Option<Stopped> {
        Counters::count(&self.counters.ports);
        // SAFETY: KVM_RUN has just returned KVM_EXIT_IO on `fd`, so `io` is the union's live member.
        let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
        // SAFETY: `data` is the exit's slice in the mapping of the run page, which lives as long as
        // `fd`; the exit that lent it out is gone, and no one else refers to that part of the page
        // until the next KVM_RUN.
        let data = unsafe { &mut *data };
        for item in data.chunks_mut(usize::from(size.clamp(1, 4))) {
            let direction = if is_write {
                write(Space::Port, port.into(), item)
            } else {
                Direction::Read
            };
            let Some(value) = self.access(access(Space::Port, port.into(), item.len(), direction)) else {
                return Some(Stopped::FabricClosed);
            };
            if !is_write {
                item.copy_from_slice(&value.to_le_bytes()[..item.len()]);
            }
        }
        None
    }
}

/// An error with the vCPU's state in it, as its last words.
fn describe(vcpu: &Vcpu, what: String) -> MachineError {
    let state = registers(vcpu);
    tracing::error!("vCPU {}: {what}; {state}", vcpu.id);
    MachineError::Kvm {
        call: "KVM_RUN",
        object: format!("vCPU {}: {what}; {state}", vcpu.id),
        errno: Errno(libc::EIO),
    }
}

fn registers(vcpu: &Vcpu) -> String {
    match (vcpu.regs(), vcpu.sregs()) {
        (Ok(r), Ok(s)) => format!(
            "rip {:#x} rsp {:#x} rflags {:#x} cs {:#x}/{:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} rax {:#x} rcx {:#x} rdx {:#x}",
            r.rip, r.rsp, r.rflags, s.cs.selector, s.cs.base, s.cr0, s.cr2, s.cr3, s.cr4, s.efer, r.rax, r.rcx, r.rdx
        ),
        _ => "registers can't be read".into(),
    }
}
