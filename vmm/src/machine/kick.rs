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

/// This thread, for [`kick_thread`].
pub(crate) fn this_thread() -> i32 {
    thread_local! {
        // SAFETY: gettid has no arguments and can't fail.
        static NUMBER: i32 = unsafe { libc::gettid() };
    }
    NUMBER.with(|number| *number)
}

/// Kicks the vCPU that a thread of this process runs; no effect for 0 or one that has ended.
pub(crate) fn kick_thread(number: i32) {
    if number != 0 {
        // SAFETY: tgkill takes numbers only, and signals no process but this one. A number used again is
        // another thread's, which the handler leaves alone unless it runs a vCPU: then it's one kick too many.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), number, SIGRTMIN()) };
    }
}

/// Calls KVM_RUN on this thread's vCPU with a signal pending: the guest executes nothing, but KVM does what it
/// does before it enters the guest and after, which a KVM_RUN with `immediate_exit` doesn't.
pub(crate) fn run_nothing(vcpu: &mut Vcpu) -> Result<(), MachineError> {
    let os = |call| MachineError::last_os(call);
    let mut kicks = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset makes a valid set of it, to which sigaddset adds; SIGRTMIN is a valid signal.
    let kicks = unsafe {
        libc::sigemptyset(kicks.as_mut_ptr());
        libc::sigaddset(kicks.as_mut_ptr(), SIGRTMIN());
        kicks.assume_init()
    };
    // SAFETY: both sets are valid or null.
    if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const kicks, ptr::null_mut()) } != 0 {
        return Err(os("pthread_sigmask"));
    }
    // Blocked, it stays pending until KVM_RUN, which blocks nothing.
    let result = vcpu.signal_mask(Some(0)).and_then(|()| {
        vcpu.fd.set_kvm_immediate_exit(0);
        kick_thread(this_thread());
        match vcpu.fd.run() {
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(e) => Err(super::vcpu::fail("KVM_RUN", vcpu.id, e)),
            Ok(exit) => Err(MachineError::Kvm {
                call: "KVM_RUN",
                object: format!("vCPU returned {exit:?} instead of running nothing"),
                errno: Errno(libc::EIO),
            }),
        }
    });
    let unmasked = vcpu.signal_mask(None);
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const kicks, ptr::null_mut()) };
    // The handler has run by now.
    vcpu.fd.set_kvm_immediate_exit(0);
    result.and(unmasked)
}

/// Kicks the vCPU that `thread` runs; no effect if the thread has ended.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // ESRCH: it has ended.
    let _ = thread.kill(SIGRTMIN());
}
