//! A vCPU's state as it goes from one node to another: versioned, and small, as most of it is zeros.
//!
//! It comes from another host: whatever doesn't fit is refused.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_SHADOW, kvm_xcr,
};
use zerocopy::{FromBytes, IntoBytes};

use super::state::Registers;
use super::vcpu::{APIC_BASE_X2APIC, LAPIC_IRR, LAPIC_IRR_END, XSAVE_PAGE, is_requested};

/// Layout of the bytes.
const VERSION: u32 = 1;
/// Most bytes of a state, unpacked. An XSAVE area with all that x86 has is below 16 KiB.
const MOST_BYTES: usize = 64 << 10;
const MOST_MSRS: usize = 2048;
/// The LAPIC's id in KVM's form.
const APIC_ID: usize = 0x20;
/// The LAPIC's spurious-interrupt vector register, in KVM's form, and its software enable.
const SPURIOUS: usize = 0xf0;
const SOFTWARE_ENABLE: u32 = 1 << 8;

/// A vCPU between two owners.
#[derive(Clone, Debug)]
pub(crate) struct Travelling {
    /// KVM_MP_STATE_*.
    pub mp_state: u32,
    /// Start-up vectors that the old owner's node knows.
    pub startup: u32,
    pub registers: Registers,
}

/// Why bytes are not a vCPU's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("it is of version {0}, which is not known here")]
    Version(u32),
    #[error("it is damaged")]
    Damaged,
}

impl Travelling {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let r = &self.registers;
        let mut out = Vec::with_capacity(8 << 10);
        for word in [
            VERSION,
            self.mp_state,
            self.startup,
            r.xsave.len() as u32,
            r.msrs.len() as u32,
            r.xcrs.nr_xcrs,
        ] {
            out.extend(word.to_le_bytes());
        }
        out.extend(r.regs.as_bytes());
        out.extend(r.sregs.as_bytes());
        out.extend(r.debug.as_bytes());
        out.extend(r.events.as_bytes());
        out.extend(r.lapic.regs.as_bytes());
        for xcr in r.xcrs.xcrs.iter().take(r.xcrs.nr_xcrs as usize) {
            out.extend(xcr.xcr.to_le_bytes());
            out.extend(xcr.value.to_le_bytes());
        }
        for (index, value) in &r.msrs {
            out.extend(index.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        out.extend(r.xsave.as_bytes());
        pack(&out)
    }

    /// The state of vCPU `id`. What is pending, and whether its LAPIC is that of another, doesn't count.
    pub fn decode(bytes: &[u8], id: u32) -> Result<Self, Malformed> {
        let bytes = unpack(bytes).ok_or(Malformed::Damaged)?;
        let mut rest = Reader(&bytes);
        let version = rest.word()?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let (mp_state, startup) = (rest.word()?, rest.word()?);
        let (xsave, msrs, xcrs) = (rest.word()? as usize, rest.word()? as usize, rest.word()?);
        let known = [
            KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_UNINITIALIZED,
            KVM_MP_STATE_INIT_RECEIVED,
            KVM_MP_STATE_HALTED,
        ];
        if !known.contains(&mp_state)
            || xsave < XSAVE_PAGE / 4
            || xsave * 4 > MOST_BYTES
            || msrs > MOST_MSRS
            || xcrs > 16
        {
            return Err(Malformed::Damaged);
        }
        let mut registers = Registers {
            regs: rest.plain()?,
            sregs: rest.plain()?,
            debug: rest.plain()?,
            events: rest.plain()?,
            lapic: Default::default(),
            xcrs: Default::default(),
            msrs: Vec::new(),
            xsave: Vec::new(),
        };
        let page = rest.take(registers.lapic.regs.len())?;
        registers
            .lapic
            .regs
            .iter_mut()
            .zip(page)
            .for_each(|(to, from)| *to = *from as _);
        registers.set_lapic(APIC_ID, id);
        (LAPIC_IRR..LAPIC_IRR_END)
            .step_by(16)
            .for_each(|at| registers.set_lapic(at, 0));
        // What is pending went apart; SMM is not for guests here.
        registers.events.flags &= KVM_VCPUEVENT_VALID_SHADOW;
        registers.xcrs.nr_xcrs = xcrs;
        for at in 0..xcrs as usize {
            registers.xcrs.xcrs[at] = kvm_xcr {
                xcr: rest.word()?,
                reserved: 0,
                value: rest.long()?,
            };
        }
        for _ in 0..msrs {
            registers.msrs.push((rest.word()?, rest.long()?));
        }
        for _ in 0..xsave {
            registers.xsave.push(rest.word()?);
        }
        if !rest.0.is_empty() {
            return Err(Malformed::Damaged);
        }
        Ok(Travelling {
            mp_state,
            startup,
            registers,
        })
    }
}

impl Registers {
    /// Whether an interrupt or NMI was pending when they were read.
    pub(crate) fn has_pending(&self) -> bool {
        is_requested(&self.lapic) || self.events.nmi.pending != 0
    }

    /// Whether the LAPIC takes what is sent to it: INIT leaves it switched off.
    pub(crate) fn takes_interrupts(&self) -> bool {
        let is_x2apic = self.sregs.apic_base & APIC_BASE_X2APIC == APIC_BASE_X2APIC;
        is_x2apic && self.lapic(SPURIOUS) & SOFTWARE_ENABLE != 0
    }

    /// A 32-bit register of the LAPIC.
    pub(crate) fn lapic(&self, at: usize) -> u32 {
        let byte = |n: usize| self.lapic.regs[at + n] as u8;
        u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
    }

    /// Sets a 32-bit register of the LAPIC.
    pub(crate) fn set_lapic(&mut self, at: usize, value: u32) {
        let place = self.lapic.regs[at..at + 4].iter_mut();
        place.zip(value.to_le_bytes()).for_each(|(to, from)| *to = from as _);
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Malformed::Damaged)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn plain<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        T::read_from_bytes(self.take(size_of::<T>())?).map_err(|_| Malformed::Damaged)
    }

    fn word(&mut self) -> Result<u32, Malformed> {
        self.plain::<[u8; 4]>().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Result<u64, Malformed> {
        self.plain::<[u8; 8]>().map(u64::from_le_bytes)
    }
}

/// Leaves zeros out: pieces of a number of zero words and a number of other words, two bytes each, and those
/// words; words are four bytes, and the last is filled up with zeros.
fn pack(bytes: &[u8]) -> Vec<u8> {
    let words: Vec<[u8; 4]> = bytes
        .chunks(4)
        .map(|chunk| std::array::from_fn(|n| chunk.get(n).copied().unwrap_or(0)))
        .collect();
    let mut out = Vec::with_capacity(bytes.len() / 2);
    let mut rest = words.as_slice();
    while !rest.is_empty() {
        let zeros = rest
            .iter()
            .take(usize::from(u16::MAX))
            .take_while(|word| **word == [0; 4])
            .count();
        // A single zero word among others costs less than a new piece.
        let ends = |at: usize| rest.get(at) == Some(&[0; 4]) && rest.get(at + 1).is_none_or(|word| *word == [0; 4]);
        let mut end = zeros;
        while end < rest.len() && end - zeros < usize::from(u16::MAX) && !ends(end) {
            end += 1;
        }
        out.extend((zeros as u16).to_le_bytes());
        out.extend(((end - zeros) as u16).to_le_bytes());
        rest[zeros..end].iter().for_each(|word| out.extend(word));
        rest = &rest[end..];
    }
    out
}

/// Undoes [`pack`]; `None` if it is nothing packed, or too much.
fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut rest = Reader(packed);
    let mut out = Vec::new();
    while !rest.0.is_empty() {
        let zeros = u16::from_le_bytes(rest.plain().ok()?);
        let words = u16::from_le_bytes(rest.plain().ok()?);
        if out.len() + (usize::from(zeros) + usize::from(words)) * 4 > MOST_BYTES {
            return None;
        }
        out.resize(out.len() + usize::from(zeros) * 4, 0);
        out.extend(rest.take(usize::from(words) * 4).ok()?);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> Travelling {
        let mut registers = Registers {
            regs: Default::default(),
            sregs: Default::default(),
            debug: Default::default(),
            events: Default::default(),
            lapic: Default::default(),
            xcrs: Default::default(),
            msrs: vec![(0x10, 5), (0xc000_0080, u64::MAX)],
            xsave: (0..1024).map(|n| if n % 50 == 0 { n } else { 0 }).collect(),
        };
        registers.regs.rip = 0xffff_ffff_8000_1234;
        registers.sregs.cr3 = 0x9000;
        registers.xcrs.nr_xcrs = 1;
        registers.xcrs.xcrs[0].value = 7;
        registers.set_lapic(APIC_ID, 3);
        registers.set_lapic(0x120, 0x10);
        registers.set_lapic(0x220, 0x20);
        Travelling {
            mp_state: 3,
            startup: 0x9900,
            registers,
        }
    }

    #[test]
    fn a_state_survives_and_what_is_pending_does_not() {
        let sent = state();
        let bytes = sent.encode();
        assert!(bytes.len() < 700, "{}", bytes.len());
        let came = Travelling::decode(&bytes, 3).unwrap();
        assert_eq!((came.mp_state, came.startup), (3, 0x9900));
        let (a, b) = (&came.registers, &sent.registers);
        assert_eq!((a.regs, a.sregs, a.events), (b.regs, b.sregs, b.events));
        assert_eq!((&a.msrs, &a.xsave, a.xcrs.xcrs[0].value), (&b.msrs, &b.xsave, 7));
        assert_eq!([0x20, 0x120, 0x220].map(|at| a.lapic(at)), [3, 0x10, 0]);
        assert_eq!(Travelling::decode(&bytes, 9).unwrap().registers.lapic(APIC_ID), 9);
    }

    #[test]
    fn no_part_of_a_state_and_no_changed_byte_brings_it_down() {
        let bytes = state().encode();
        for cut in 0..bytes.len() {
            assert!(Travelling::decode(&bytes[..cut], 0).is_err(), "{cut} bytes");
        }
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                // Some are states, too.
                let _ = Travelling::decode(&changed, 0);
            }
        }
        assert_eq!(
            Travelling::decode(&pack(&[9, 0, 0, 0]), 0).unwrap_err(),
            Malformed::Version(9)
        );
        assert_eq!(unpack(&[0xff; 64]), None, "too much");
    }

    #[test]
    fn packing_leaves_nothing_but_zeros_out() {
        for bytes in [
            &[][..],
            &[0; 4096],
            &[1; 4096],
            &[0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(unpack(&pack(bytes)).unwrap(), bytes);
        }
        assert_eq!(pack(&[0; 4096]).len(), 4);
    }
}
