//! Getting a thread out of KVM_RUN from outside, without losing the request if it comes just
//! before the thread enters.
//!
//! A signal interrupts KVM_RUN. Its handler also sets `immediate_exit` of the vCPU the thread runs,
//! so that a KVM_RUN entered right after the signal returns at once.

use std::cell::Cell;
use std::ptr;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::error::{Errno, MachineError};
use super::vcpu::Vcpu;

thread_local! {
    /// The run page of the vCPU this thread runs; null: none.
    static CURRENT: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = CURRENT.get();
    if !run.is_null() {
        // SAFETY: a non-null CURRENT points to the run page of a VcpuFd that `with_kicks` on this
        // very thread borrows for as long as it is set. The write is one byte that the kernel
        // reads; volatile, as this may interrupt code that writes it too.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// Installs the signal handler for the whole process; may be called any number of times.
pub(crate) fn install() -> Result<(), MachineError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| MachineError::Os {
        call: "sigaction for vCPU kicks",
        errno: Errno(e.errno()),
    })
}

/// Runs `body` with this thread open to kicks of `vcpu`. `body` keeps the vCPU's file where it is.
pub(crate) fn with_kicks(vcpu: &mut Vcpu, body: impl FnOnce(&mut Vcpu)) {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            CURRENT.set(ptr::null_mut());
        }
    }
    CURRENT.set(vcpu.fd.get_kvm_run());
    let _reset = Reset;
    body(vcpu);
}

/// Kicks the vCPU that `thread` runs; no effect if the thread has ended.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // ESRCH: it has ended.
    let _ = thread.kill(SIGRTMIN());
}
