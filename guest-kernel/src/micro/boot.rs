//! A micro guest as a kernel: an ELF image that a boot loader starts on the boot processor, in 64-bit mode with the
//! first GiB mapped one to one and local APICs in x2APIC mode. It starts the other vCPUs by INIT and SIPI and enters
//! every program at CPL 3.

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cr0, cr3, cr4, ds, eax, ebx, ecx, edx, es, fs, gs, ptr, qword_ptr, rax, rbx, rcx, rdi, rdx,
    rsi, rsp,
};

use super::regs::{CR0, CR4, RFLAGS};
use super::tables::{KERNEL_CODE, USER_CODE, USER_DATA};
use super::{Builder, MicroError, MicroGuest};

/// Where the image starts.
const START: u64 = 0x10_0000;
/// What every vCPU does first, and what it is told.
const ENTER: u64 = START + 0x400;
const TABLES: u64 = START + 0x800;
const PARAMETERS: u64 = START + 0x1000;
const PARAMETERS_LEN: u64 = 64;
/// Interrupt descriptors of a vCPU that waits for its time.
const WAITING: u64 = START + 0xd00;
/// The start-up code that is copied to the page of the start-up vector.
const TRAMPOLINE: u64 = START + 0xc00;
const TRAMPOLINE_LEN: usize = 0x100;
/// In that page: the GDT's base and limit.
const GDT_POINTER: usize = 0xf0;
const STARTUP: u32 = 0x10;
/// Where the guest's own tables and programs are.
const BASE: u64 = START + 0x1_1000;
const END: u64 = START + 0x10_0000;
/// Most vCPUs.
const MAX_VCPUS: usize = ((BASE - PARAMETERS) / PARAMETERS_LEN) as usize;
/// x2APIC: own id, interrupt command.
const APIC_ID: u32 = 0x802;
const ICR: u32 = 0x830;
const SPURIOUS: u32 = 0x80f;
const LVT_TIMER: u32 = 0x832;
const TSC_DEADLINE: u32 = 0x6e0;
/// The timer's vector, and its entry with TSC deadlines.
const TIMER: u32 = 0x20;
const TIMER_ENTRY: u32 = 2 << 17 | TIMER;
const EFER: u32 = 0xc000_0080;
/// NXE, LME, SCE.
const LONG_MODE: u32 = 0x901;

/// What the guest leaves for its programs' data starts here.
pub const DATA: u64 = START + 0x10_0000;

/// When a vCPU begins with its program. Until then it halts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At once.
    Now,
    /// When the TSC is so high; not 0.
    At(u64),
    /// Never.
    Never,
}

/// A builder of guests with `memory` bytes for [`elf`].
pub fn builder(memory: u64) -> Builder {
    Builder { base: BASE, end: END, accessed_dirty: true, ..Builder::new(memory) }
}

/// The image of a guest that [`builder`] laid out; `begin` says when each vCPU begins.
///
/// # Errors
/// Too many vCPUs.
pub fn elf(guest: &MicroGuest, begin: impl Fn(usize) -> Begin) -> Result<Vec<u8>, MicroError> {
    if guest.vcpus.is_empty() || guest.vcpus.len() > MAX_VCPUS {
        return Err(MicroError::Parameter("the number of vCPUs is not one that the image has room for"));
    }
    let end = guest.writes.iter().map(|(at, bytes)| at + bytes.len() as u64).max().unwrap_or(BASE);
    let mut image = vec![0; (end - START) as usize];
    let mut put = |at: u64, bytes: &[u8]| image[(at - START) as usize..][..bytes.len()].copy_from_slice(bytes);
    guest.writes.iter().for_each(|(at, bytes)| put(*at, bytes));
    put(START, &start(guest.vcpus.len())?);
    let (code, run) = enter()?;
    put(ENTER, &code);
    let first = guest.vcpus[0];
    put(TRAMPOLINE, &trampoline(first.gdt, first.cr3)?);
    put(TABLES, &pointer(first.gdt));
    put(TABLES + 16, &pointer(first.idt));
    put(TABLES + 32, &pointer((WAITING, (TIMER + 1) as u16 * 16 - 1)));
    // An interrupt gate: the timer ends the wait by going on where the program is entered.
    let gate = run & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40 | (run >> 16 & 0xffff) << 48;
    put(WAITING + u64::from(TIMER) * 16, &gate.to_le_bytes());
    for (vcpu, regs) in guest.vcpus.iter().enumerate() {
        let (rip, at) = match begin(vcpu) {
            Begin::Now => (regs.rip, 0),
            Begin::At(at) => (regs.rip, at),
            Begin::Never => (0, 0),
        };
        let words = [rip, regs.rsp, u64::from(regs.tss.0), regs.cr3, regs.rdi, at];
        put(PARAMETERS + vcpu as u64 * PARAMETERS_LEN, &words.map(u64::to_le_bytes).concat());
    }
    for regs in &guest.vcpus {
        // LTR takes a TSS that is not busy, and makes it so.
        let descriptor = (first.gdt.0 + u64::from(regs.tss.0 & !7) - START) as usize;
        image[descriptor + 5] &= !2;
    }
    Ok([headers(image.len() as u64), image].concat())
}

/// A descriptor table's limit and base, as LGDT and LIDT take them.
fn pointer((base, limit): (u64, u16)) -> Vec<u8> {
    [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat()
}

/// ELF header and one program header (System V ABI, "Object Files").
fn headers(len: u64) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    out.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    // Entry, program headers, no section headers, flags.
    out.extend([START, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    out.extend([64u16, 56, 1, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // Loadable; readable, writable, executable.
    out.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
    out.extend([HEADERS, START, START, len, len, 8].iter().flat_map(|word| word.to_le_bytes()));
    out
}

/// The boot processor's first code: starts the others and follows them.
fn start(vcpus: usize) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let mut copy = asm.create_label();
    asm.mov(rsi, TRAMPOLINE)?;
    asm.mov(rdi, u64::from(STARTUP) << 12)?;
    asm.mov(ecx, TRAMPOLINE_LEN as u32)?;
    asm.set_label(&mut copy)?;
    asm.mov(al, byte_ptr(rsi))?;
    asm.mov(byte_ptr(rdi), al)?;
    asm.inc(rsi)?;
    asm.inc(rdi)?;
    asm.dec(ecx)?;
    asm.jnz(copy)?;
    let mut again = asm.create_label();
    asm.mov(ecx, ICR)?;
    asm.mov(ebx, vcpus as u32 - 1)?;
    let mut none = asm.create_label();
    asm.test(ebx, ebx)?;
    asm.jz(none)?;
    asm.set_label(&mut again)?;
    asm.mov(edx, ebx)?;
    asm.mov(eax, 0x4500u32)?;
    asm.wrmsr()?;
    asm.mov(eax, 0x4600 | STARTUP)?;
    asm.wrmsr()?;
    asm.dec(ebx)?;
    asm.jnz(again)?;
    asm.set_label(&mut none)?;
    asm.mov(rax, ENTER)?;
    asm.jmp(rax)?;
    Ok(asm.assemble(START)?)
}

/// From real mode to 64-bit mode at once (AMD64 manual vol. 2, 14.8).
fn trampoline(gdt: (u64, u16), root: u64) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(16)?;
    asm.cli()?;
    asm.mov(ax, (STARTUP << 8) as i32)?;
    asm.mov(ds, ax)?;
    asm.lgdt(ptr(GDT_POINTER as u32))?;
    asm.mov(eax, CR4 as u32)?;
    asm.mov(cr4, eax)?;
    asm.mov(eax, root as u32)?;
    asm.mov(cr3, eax)?;
    asm.mov(ecx, EFER)?;
    asm.mov(eax, LONG_MODE)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.mov(eax, CR0 as u32)?;
    asm.mov(cr0, eax)?;
    // A far jump with a 32-bit offset.
    asm.db(&[0x66, 0xea])?;
    asm.db(&(ENTER as u32).to_le_bytes())?;
    asm.db(&KERNEL_CODE.to_le_bytes())?;
    let mut code = asm.assemble(0)?;
    code.resize(GDT_POINTER, 0);
    code.extend(pointer(gdt));
    code.resize(TRAMPOLINE_LEN, 0);
    Ok(code)
}

/// What every vCPU does in 64-bit mode: takes its tables and enters its program, or halts; and where in it the
/// program is entered.
fn enter() -> Result<(Vec<u8>, u64), MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut halt, mut run, mut wait) = (asm.create_label(), asm.create_label(), asm.create_label());
    asm.mov(ecx, APIC_ID)?;
    asm.rdmsr()?;
    asm.mov(ebx, eax)?;
    asm.imul_3(rbx, rbx, PARAMETERS_LEN as i32)?;
    asm.add(rbx, PARAMETERS as i32)?;
    asm.mov(rax, TABLES)?;
    asm.lgdt(ptr(rax))?;
    asm.lidt(ptr(rax + 16))?;
    asm.mov(rax, CR4)?;
    asm.mov(cr4, rax)?;
    asm.mov(rax, qword_ptr(rbx + 24))?;
    asm.mov(cr3, rax)?;
    asm.mov(ecx, EFER)?;
    asm.mov(eax, LONG_MODE)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.mov(rax, CR0)?;
    asm.mov(cr0, rax)?;
    asm.mov(eax, u32::from(USER_DATA))?;
    [ds, es, fs, gs].into_iter().try_for_each(|segment| asm.mov(segment, ax))?;
    asm.mov(rax, qword_ptr(rbx + 16))?;
    asm.ltr(ax)?;
    asm.cmp(qword_ptr(rbx + 40), 0)?;
    asm.jne(wait)?;
    asm.cmp(qword_ptr(rbx), 0)?;
    asm.jne(run)?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    asm.set_label(&mut wait)?;
    asm.mov(rax, TABLES)?;
    asm.lidt(ptr(rax + 32))?;
    asm.mov(rsp, qword_ptr(rbx + 8))?;
    // INIT has switched the local APIC off.
    write_msr(&mut asm, SPURIOUS, 0x1ff)?;
    write_msr(&mut asm, LVT_TIMER, TIMER_ENTRY)?;
    asm.mov(ecx, TSC_DEADLINE)?;
    asm.mov(rax, qword_ptr(rbx + 40))?;
    asm.mov(rdx, rax)?;
    asm.shr(rdx, 32)?;
    asm.wrmsr()?;
    asm.sti()?;
    asm.jmp(halt)?;
    asm.set_label(&mut run)?;
    // The frame of the interrupt, if there was one, is forgotten, and the interrupt never ends: no other comes.
    asm.mov(rax, TABLES)?;
    asm.lidt(ptr(rax + 16))?;
    asm.mov(rsp, qword_ptr(rbx + 8))?;
    asm.mov(rcx, qword_ptr(rbx + 8))?;
    asm.mov(rdx, qword_ptr(rbx))?;
    asm.mov(rdi, qword_ptr(rbx + 32))?;
    asm.push(i32::from(USER_DATA))?;
    asm.push(rcx)?;
    asm.push(RFLAGS as i32)?;
    asm.push(i32::from(USER_CODE))?;
    asm.push(rdx)?;
    asm.iretq()?;
    let code = asm.assemble_options(ENTER, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let run = code.label_ip(&run)?;
    Ok((code.inner.code_buffer, run))
}

fn write_msr(asm: &mut CodeAssembler, index: u32, value: u32) -> Result<(), MicroError> {
    asm.mov(ecx, index)?;
    asm.mov(eax, value)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::done;
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_the_image_is_whole() {
        let guest = builder(64 << 20).build(5, done).unwrap();
        let elf = elf(&guest, |vcpu| [Begin::Now, Begin::At(7), Begin::Now, Begin::Now, Begin::Never][vcpu]).unwrap();
        assert!(start(MAX_VCPUS).unwrap().len() as u64 <= ENTER - START);
        assert!(enter().unwrap().0.len() as u64 <= TABLES - ENTER);
        let at = |address: u64| &elf[120 + (address - START) as usize..];
        let word = |address: u64| u64::from_le_bytes(at(address)[..8].try_into().unwrap());
        for (address, bytes) in guest.writes.iter().filter(|(address, _)| *address != guest.vcpus[0].gdt.0) {
            assert!(at(*address).starts_with(bytes), "{address:#x}");
        }
        assert_eq!(word(PARAMETERS + PARAMETERS_LEN), guest.vcpus[1].rip);
        assert_eq!(word(PARAMETERS + PARAMETERS_LEN + 40), 7, "later");
        assert_eq!(word(PARAMETERS + 4 * PARAMETERS_LEN), 0, "idle");
        for regs in &guest.vcpus {
            assert_eq!(at(regs.gdt.0 + u64::from(regs.tss.0))[5] & 0xf, 9, "an available TSS");
        }
    }

    #[test]
    fn more_vcpus_than_there_is_room_for_are_refused() {
        let mut guest = builder(64 << 20).build(1, done).unwrap();
        guest.vcpus = vec![guest.vcpus[0]; MAX_VCPUS + 1];
        assert!(matches!(elf(&guest, |_| Begin::Now), Err(MicroError::Parameter(_))));
    }
}
