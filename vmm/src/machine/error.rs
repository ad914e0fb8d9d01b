//! What can go wrong with the machine, one line each.

/// Why the machine can't be built, run or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// `/dev/kvm` is missing or may not be used.
    #[error("open /dev/kvm: {errno}; load kvm_amd or kvm_intel and give this user read and write access to it")]
    OpenKvm {
        /// Name of the error.
        errno: Errno,
    },
    /// The host's KVM lacks something the machine is built on.
    #[error("the host's KVM has no {capability}; a kernel of 5.15 or newer with KVM is needed")]
    Capability {
        /// The KVM_CAP_* constant.
        capability: &'static str,
    },
    /// A KVM call failed.
    #[error("{call} ({object}): {errno}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What it was done to.
        object: String,
        /// Name of the error.
        errno: Errno,
    },
    /// An operating system call other than KVM's failed.
    #[error("{call}: {errno}")]
    Os {
        /// The call.
        call: &'static str,
        /// Name of the error.
        errno: Errno,
    },
    /// The configuration contradicts itself or this program's limits.
    #[error("machine configuration: {0}")]
    Config(String),
    /// The kernel, initrd or command line can't be loaded.
    #[error("boot: {0}")]
    Boot(String),
    /// The ACPI tables can't be built or don't fit.
    #[error("ACPI tables: {0}")]
    Acpi(String),
    /// The hosts' CPUs can't run one guest together.
    #[error("CPUs of the hosts: {0}")]
    Cpuid(String),
    /// A saved state can't be restored here.
    #[error("saved {object}: {reason}")]
    State {
        /// Whose state.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl MachineError {
    /// A failed KVM call on `object`.
    pub(crate) fn kvm(call: &'static str, object: impl Into<String>, error: kvm_ioctls::Error) -> Self {
        MachineError::Kvm {
            call,
            object: object.into(),
            errno: Errno(error.errno()),
        }
    }

    /// A failed system call; the error is the calling thread's `errno`.
    pub(crate) fn last_os(call: &'static str) -> Self {
        MachineError::Os {
            call,
            errno: Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    }
}

/// An error number that prints as its symbol and its text ("ENOENT (No such file or directory)").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = nix::errno::Errno::from_raw(self.0);
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        match text.find(" (os error") {
            Some(end) if name != nix::errno::Errno::UnknownErrno => write!(f, "{name:?} ({})", &text[..end]),
            _ => f.write_str(&text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_and_name_the_errno() {
        let e = MachineError::OpenKvm {
            errno: Errno(libc::ENOENT),
        };
        assert_eq!(
            e.to_string(),
            "open /dev/kvm: ENOENT (No such file or directory); load kvm_amd or kvm_intel and give this user read and write access to it"
        );
        assert_eq!(Errno(libc::EXDEV).to_string().lines().count(), 1);
    }
}
