//! A kernel of a few hundred bytes, as the ELF file a boot loader takes: it starts vCPU 1 by INIT and
//! SIPI, both raise one counter, the boot processor prints it on COM1 and powers off (ACPI S5).

use krg_guest_kernel::micro::MicroError;
use krg_guest_kernel::micro::code_asm::{
    CodeAssembler, al, ax, byte_ptr, ds, dword_ptr, dx, eax, ebx, ecx, edx, esi, rbx, rdi, rsi,
};
use krg_vmm::machine::layout::{BOOT_PAGE_TABLES, HIGH_MEMORY, REGISTERS};

/// First word on the console.
pub const HELLO: &str = "two processors count: ";

/// Where the image and its parts are.
const CODE: u64 = HIGH_MEMORY;
const TRAMPOLINE: u64 = HIGH_MEMORY + 0x1000;
const TEXT: u64 = HIGH_MEMORY + 0x1800;
const IMAGE_LEN: usize = 0x2000;
/// Start-up vector of vCPU 1: its code is copied to this page.
const STARTUP: u32 = 0x10;
/// Counter, then the number of processors that are through, then that of those that have started.
const COUNTER: u64 = 0x1_1000;
const THROUGH: u64 = COUNTER + 4;
const STARTED: u64 = COUNTER + 8;
/// Page directory for the machine's registers, beyond what the loader maps.
const DIRECTORY: u64 = 0x1_2000;
/// x2APIC interrupt command register.
const ICR: u32 = 0x830;
const COM1: u32 = 0x3f8;

/// The kernel; each processor raises the counter `count` times.
pub fn elf(count: u32) -> Vec<u8> {
    let mut image = vec![0; IMAGE_LEN];
    let mut put = |bytes: Vec<u8>, at: u64| {
        let at = (at - CODE) as usize;
        image[at..at + bytes.len()].copy_from_slice(&bytes);
    };
    let second = trampoline(count).expect("the trampoline assembles");
    let boot = boot(count, second.len()).expect("the kernel assembles");
    assert!(boot.len() < 0x1000 && second.len() < 0x800);
    put(boot, CODE);
    put(second, TRAMPOLINE);
    put(HELLO.bytes().chain([0]).collect(), TEXT);
    let mut file = headers();
    file.extend(image);
    file
}

/// What [`elf`] prints: its counter in hexadecimal.
pub fn line(count: u32) -> String {
    format!("{HELLO}{:08x}", 2 * count)
}

/// ELF header and one program header (System V ABI, "Object Files").
fn headers() -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    out.extend(2u16.to_le_bytes());
    out.extend(62u16.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    // Entry, program headers, no section headers.
    [CODE, 64, 0].iter().for_each(|word| out.extend(word.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    [64u16, 56, 1, 64, 0, 0]
        .iter()
        .for_each(|half| out.extend(half.to_le_bytes()));
    // Loadable; readable, writable, executable.
    out.extend(1u32.to_le_bytes());
    out.extend(7u32.to_le_bytes());
    let len = IMAGE_LEN as u64;
    [HEADERS, CODE, CODE, len, len, 8]
        .iter()
        .for_each(|word| out.extend(word.to_le_bytes()));
    assert_eq!(out.len() as u64, HEADERS);
    out
}

/// The boot processor's code: 64-bit mode, identity map of the first GiB.
fn boot(count: u32, trampoline_len: usize) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut copy, mut started, mut through) = (asm.create_label(), asm.create_label(), asm.create_label());
    let (mut hex, mut digit, mut halt) = (asm.create_label(), asm.create_label(), asm.create_label());
    print(&mut asm)?;
    asm.mov(rsi, TRAMPOLINE)?;
    asm.mov(rdi, u64::from(STARTUP) << 12)?;
    asm.mov(ecx, trampoline_len as u32)?;
    asm.set_label(&mut copy)?;
    asm.mov(al, byte_ptr(rsi))?;
    asm.mov(byte_ptr(rdi), al)?;
    asm.inc(rsi)?;
    asm.inc(rdi)?;
    asm.dec(ecx)?;
    asm.jnz(copy)?;
    // INIT, then SIPI, to APIC id 1.
    asm.mov(ecx, ICR)?;
    asm.mov(edx, 1u32)?;
    asm.mov(eax, 0x4500u32)?;
    asm.wrmsr()?;
    asm.mov(eax, 0x4600 | STARTUP)?;
    asm.wrmsr()?;
    asm.mov(rbx, STARTED)?;
    asm.set_label(&mut started)?;
    asm.pause()?;
    asm.cmp(dword_ptr(rbx), 1)?;
    asm.jne(started)?;
    asm.mov(rbx, COUNTER)?;
    asm.mov(ecx, count)?;
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(eax, 1u32)?;
    asm.lock().xadd(dword_ptr(rbx), eax)?;
    asm.dec(ecx)?;
    asm.jnz(again)?;
    asm.set_label(&mut through)?;
    asm.pause()?;
    asm.cmp(dword_ptr(rbx + (THROUGH - COUNTER)), 1)?;
    asm.jne(through)?;
    asm.mov(esi, dword_ptr(rbx))?;
    asm.mov(ecx, 8u32)?;
    asm.mov(dx, COM1)?;
    asm.set_label(&mut hex)?;
    asm.rol(esi, 4)?;
    asm.mov(eax, esi)?;
    asm.and(eax, 0xf)?;
    asm.add(eax, i32::from(b'0'))?;
    asm.cmp(eax, i32::from(b'9'))?;
    asm.jbe(digit)?;
    asm.add(eax, i32::from(b'a' - b'9' - 1))?;
    asm.set_label(&mut digit)?;
    asm.out(dx, al)?;
    asm.dec(ecx)?;
    asm.jnz(hex)?;
    asm.mov(al, u32::from(b'\n'))?;
    asm.out(dx, al)?;
    // The fourth GiB, of which only the registers' 2 MiB are mapped.
    asm.mov(rbx, DIRECTORY + (REGISTERS.start >> 21 & 511) * 8)?;
    asm.mov(dword_ptr(rbx), (REGISTERS.start & !0x1f_ffff) as u32 | 0xe3)?;
    asm.mov(rbx, BOOT_PAGE_TABLES + 0x1000 + (REGISTERS.start >> 30) * 8)?;
    asm.mov(dword_ptr(rbx), DIRECTORY as u32 | 0x63)?;
    asm.mov(ebx, REGISTERS.start as u32)?;
    // Sleep type 5, sleep enable.
    asm.mov(byte_ptr(rbx), 5 << 2 | 1 << 5)?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(CODE)?)
}

/// Prints [`TEXT`].
fn print(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    let (mut next, mut end) = (asm.create_label(), asm.create_label());
    asm.mov(rsi, TEXT)?;
    asm.mov(dx, COM1)?;
    asm.set_label(&mut next)?;
    asm.mov(al, byte_ptr(rsi))?;
    asm.test(al, al)?;
    asm.jz(end)?;
    asm.out(dx, al)?;
    asm.inc(rsi)?;
    asm.jmp(next)?;
    asm.set_label(&mut end)?;
    Ok(())
}

/// vCPU 1's code: real mode, copied to the start-up page.
fn trampoline(count: u32) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(16)?;
    let (mut again, mut halt) = (asm.create_label(), asm.create_label());
    asm.cli()?;
    asm.mov(ax, (COUNTER >> 4) as u32)?;
    asm.mov(ds, ax)?;
    asm.lock().inc(dword_ptr(STARTED - COUNTER))?;
    asm.mov(ecx, count)?;
    asm.set_label(&mut again)?;
    asm.mov(eax, 1u32)?;
    asm.lock().xadd(dword_ptr(0), eax)?;
    asm.dec(ecx)?;
    asm.jnz(again)?;
    asm.lock().inc(dword_ptr(THROUGH - COUNTER))?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(u64::from(STARTUP) << 12)?)
}
