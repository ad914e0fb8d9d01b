//! What a move can't cost less than: the calls into KVM that its state takes, and a round trip of as many bytes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use krg_dsm::transport;
use krg_vmm::machine::state::Registers;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_mp_state, kvm_msr_entry, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// A vCPU of a VM that nothing else uses, with the state of another.
pub struct BareVcpu {
    fd: VcpuFd,
    _vm: VmFd,
    registers: Registers,
    msrs: Vec<kvm_msr_entry>,
}

impl BareVcpu {
    pub fn new(registers: Registers) -> anyhow::Result<Self> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.create_irq_chip()?;
        let fd = vm.create_vcpu(0)?;
        fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        // Those that can be set as they are: the rest would end the call before the others.
        let mut msrs = Vec::new();
        for (index, data) in &registers.msrs {
            let entry = kvm_msr_entry { index: *index, data: *data, ..Default::default() };
            if fd.set_msrs(&Msrs::from_entries(&[entry])?).is_ok_and(|count| count == 1) {
                msrs.push(entry);
            }
        }
        Ok(BareVcpu { fd, _vm: vm, registers, msrs })
    }

    /// MSRs that are read and written.
    pub fn msrs(&self) -> usize {
        self.msrs.len()
    }

    /// Once each call that reads a part of the state.
    pub fn save(&self) -> anyhow::Result<Duration> {
        let mut msrs = Msrs::from_entries(&self.msrs)?;
        let begun = Instant::now();
        self.fd.get_mp_state()?;
        self.fd.get_regs()?;
        self.fd.get_sregs()?;
        self.fd.get_debug_regs()?;
        self.fd.get_vcpu_events()?;
        self.fd.get_lapic()?;
        self.fd.get_xcrs()?;
        self.fd.get_msrs(&mut msrs)?;
        self.fd.get_xsave()?;
        Ok(begun.elapsed())
    }

    /// Once each call that writes a part of the state.
    pub fn restore(&self) -> anyhow::Result<Duration> {
        let msrs = Msrs::from_entries(&self.msrs)?;
        let xsave: kvm_xsave = self.fd.get_xsave()?;
        let events = self.fd.get_vcpu_events()?;
        let r = &self.registers;
        let begun = Instant::now();
        self.fd.set_sregs(&r.sregs)?;
        self.fd.set_xcrs(&r.xcrs)?;
        // SAFETY: the area is as long as KVM reads, as this process has asked for no dynamic features.
        unsafe { self.fd.set_xsave(&xsave) }?;
        self.fd.set_regs(&r.regs)?;
        self.fd.set_debug_regs(&r.debug)?;
        self.fd.set_lapic(&r.lapic)?;
        let count = self.fd.set_msrs(&msrs)?;
        self.fd.set_vcpu_events(&events)?;
        self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        let took = begun.elapsed();
        ensure!(count == self.msrs.len(), "{count} MSRs of {} were set", self.msrs.len());
        Ok(took)
    }
}

/// A connection like the nodes', to a thread that answers each block of bytes with one byte.
pub struct Wire {
    stream: TcpStream,
    block: Vec<u8>,
}

impl Wire {
    pub fn new(bytes: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        for end in [&stream, &far] {
            transport::prepare(end, Duration::from_secs(3600)).map_err(|(option, errno)| anyhow::anyhow!("{option}: {errno}"))?;
        }
        std::thread::spawn(move || {
            let mut block = vec![0; bytes];
            while far.read_exact(&mut block).is_ok() && far.write_all(&[1]).is_ok() {}
        });
        Ok(Wire { stream, block: vec![7; bytes] })
    }

    pub fn round_trip(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        self.stream.write_all(&self.block)?;
        self.stream.read_exact(&mut [0]).context("the bare connection")?;
        Ok(begun.elapsed())
    }
}
