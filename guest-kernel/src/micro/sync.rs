//! What programs share: waiting, a barrier, the end.

use iced_x86::code_asm::{AsmMemoryOperand, AsmRegister64, CodeAssembler, al, eax, qword_ptr, rax, rbp, rsi};

use super::{MicroError, PORT_DONE, PORT_YIELD};

/// Rounds of a waiting loop after which the program yields: about a microsecond each hundred.
const SPINS: i32 = 4096;

/// Ends the program: reports the vCPU's index for as long as it is run.
pub fn done(asm: &mut CodeAssembler, vcpu: usize) -> Result<(), MicroError> {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(al, (vcpu & 0xff) as u32)?;
    asm.out(u32::from(PORT_DONE), al)?;
    asm.jmp(again)?;
    Ok(())
}

/// Repeats `attempt`, which jumps to the label it is given when it has succeeded. Between attempts
/// the program pauses, and yields now and then: the vCPU it waits for may need the processor.
/// Destroys rax and rsi.
pub fn wait_until(
    asm: &mut CodeAssembler,
    attempt: impl Fn(&mut CodeAssembler, iced_x86::code_asm::CodeLabel) -> Result<(), MicroError>,
) -> Result<(), MicroError> {
    let (mut start, mut again, mut success) = (asm.create_label(), asm.create_label(), asm.create_label());
    // A caller's label may stand right before.
    asm.nop()?;
    asm.set_label(&mut start)?;
    asm.mov(rsi, i64::from(SPINS))?;
    asm.set_label(&mut again)?;
    attempt(asm, success)?;
    asm.pause()?;
    asm.dec(rsi)?;
    asm.jnz(again)?;
    asm.xor(eax, eax)?;
    asm.out(u32::from(PORT_YIELD), al)?;
    asm.jmp(start)?;
    asm.set_label(&mut success)?;
    // An instruction has one label only, and a caller's may follow.
    asm.nop()?;
    Ok(())
}

/// A barrier: a 64-bit counter in shared memory, zero at the start, that every vCPU raises on
/// arrival. rbp holds the value that lets this vCPU go on, and is used by nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Barrier {
    /// Address of the counter; a multiple of 8.
    pub address: u64,
    /// vCPUs that take part.
    pub vcpus: usize,
}

impl Barrier {
    /// Waits for all. Orders everything before it before everything after it, on every vCPU, as the
    /// locked instruction does. Destroys rax and rsi.
    pub fn wait(&self, asm: &mut CodeAssembler) -> Result<(), MicroError> {
        asm.mov(rsi, self.address)?;
        asm.mov(eax, 1)?;
        asm.lock().xadd(qword_ptr(rsi), rax)?;
        asm.add(rbp, self.vcpus as i32)?;
        let address = self.address;
        wait_until(asm, |asm, success| {
            load(asm, rax, address)?;
            asm.cmp(rax, rbp)?;
            asm.jae(success)?;
            Ok(())
        })
    }
}

/// `mov register, [address]`, with the address in the register first.
pub(super) fn load(asm: &mut CodeAssembler, register: AsmRegister64, address: u64) -> Result<(), MicroError> {
    asm.mov(register, address)?;
    let memory: AsmMemoryOperand = qword_ptr(register);
    asm.mov(register, memory)?;
    Ok(())
}
