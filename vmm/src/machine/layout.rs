//! The guest-physical map, the same on every node.

use std::ops::Range;

use krg_scheduler::Placement;

/// RAM stops here and goes on at [`HIGH_RAM_START`]: room for devices.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// 32-bit PCI window: BARs.
pub const PCI_WINDOW: Range<u64> = 0xC000_0000..0xE000_0000;
/// PCI configuration space (ECAM) of bus 0.
pub const ECAM: Range<u64> = 0xE000_0000..0xE010_0000;
/// The IOAPIC's registers.
pub const IOAPIC: Range<u64> = 0xFEC0_0000..0xFEC0_1000;
/// Machine registers: sleep control, sleep status, reset.
pub const REGISTERS: Range<u64> = 0xFED0_0000..0xFED0_1000;
/// LAPIC base, and where message-signalled interrupts are addressed to.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// Proxy stubs: memory local to each node, not described to the guest.
pub const STUB: Range<u64> = 0xFEF0_0000..0xFEF2_0000;
/// One page KVM takes for itself on Intel CPUs without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages KVM takes for a TSS on the same CPUs.
pub const TSS: u64 = 0xFFFB_D000;
/// Pins of the IOAPIC, GSI 0 up.
pub const IOAPIC_PINS: u32 = 24;
/// GSI of the serial console.
pub const COM1_GSI: u32 = 4;
/// I/O ports of the serial console.
pub const COM1_PORTS: Range<u16> = 0x3f8..0x400;

/// Most vCPUs of one machine: one stack each in the stub memory ([`super::stub`]).
pub const MAX_VCPUS: u32 = 1024;

/// End of the RAM the guest may use below 1 MiB (above: firmware tables).
pub const LOW_BOOT_END: u64 = 0x9_FC00;
/// Initial GDT of vCPU 0.
pub const BOOT_GDT: u64 = 0x500;
/// `boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack of vCPU 0 grows down from here.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Initial page tables: PML4, PDPT, PD.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x2_1000;
/// ACPI tables; the RSDP is the first.
pub const ACPI: Range<u64> = 0xE_0000..0x10_0000;
/// First byte above 1 MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The guest-physical RAM of a machine with `memory` bytes: one range, or two around the hole.
pub fn ram_ranges(memory: u64) -> Vec<Range<u64>> {
    split_at_hole(0..memory)
}

/// Which guest-physical RAM has its home on which host, ascending: `(host, range)`. A host whose
/// share straddles the hole has two ranges.
pub fn home_ranges(placement: &Placement) -> Vec<(usize, Range<u64>)> {
    let mut next = 0;
    let mut homes = Vec::new();
    for (host, share) in placement.hosts.iter().enumerate() {
        let end = next + share.memory;
        homes.extend(split_at_hole(next..end).into_iter().map(|range| (host, range)));
        next = end;
    }
    homes
}

/// Maps a range of RAM counted without the hole to guest-physical ranges.
fn split_at_hole(ram: Range<u64>) -> Vec<Range<u64>> {
    let high = |offset: u64| HIGH_RAM_START + (offset - LOW_RAM_END);
    let mut ranges = Vec::new();
    if ram.start < LOW_RAM_END.min(ram.end) {
        ranges.push(ram.start..ram.end.min(LOW_RAM_END));
    }
    if ram.end > LOW_RAM_END {
        ranges.push(high(ram.start.max(LOW_RAM_END))..high(ram.end));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use krg_scheduler::HostShare;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_goes_around_the_hole() {
        let single = |end| std::iter::once(0..end).collect::<Vec<_>>();
        assert_eq!(ram_ranges(GIB), single(GIB));
        assert_eq!(ram_ranges(3 * GIB), single(3 * GIB));
        assert_eq!(ram_ranges(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
    }

    #[test]
    fn homes_follow_the_placement_and_cover_all_ram() {
        let host = |memory| HostShare { vcpus: vec![], memory };
        let placement = Placement {
            hosts: vec![host(2 * GIB), host(2 * GIB), host(GIB)],
        };
        let homes = home_ranges(&placement);
        assert_eq!(
            homes,
            [
                (0, 0..2 * GIB),
                (1, 2 * GIB..3 * GIB),
                (1, 4 * GIB..5 * GIB),
                (2, 5 * GIB..6 * GIB)
            ]
        );
        assert_eq!(
            homes.iter().map(|(_, r)| r.end - r.start).sum::<u64>(),
            placement.memory()
        );
    }
}
