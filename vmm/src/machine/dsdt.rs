//! The DSDT: what no other table describes. PCI root, console port, clock, soft-off.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};

use super::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::layout::{COM1_GSI, COM1_PORTS, ECAM, PCI_WINDOW, REGISTERS};
use super::power::S5_TYPE;
use super::rtc::INDEX_PORT;

/// The whole table.
pub(crate) fn dsdt() -> Vec<u8> {
    let mut code = Vec::new();
    system_bus(&mut code);
    // SLP_TYP for the sleep control register; the second value is unused without PM1b.
    let s5 = Package::new(vec![&S5_TYPE, &S5_TYPE]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut code);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&code);
    table.as_slice().to_vec()
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn system_bus(code: &mut Vec<u8>) {
    let uid = Name::new("_UID".into(), &ZERO);
    // PCI Express root, bus 0 alone, one 32-bit window. Interrupts are message-signalled: no _PRT.
    let (pci, pci_compatible) = (hid("PNP0A08"), Name::new("_CID".into(), &EISAName::new("PNP0A03")));
    let (segment, bus) = (Name::new("_SEG".into(), &ZERO), Name::new("_BBN".into(), &ZERO));
    let (start, last) = (PCI_WINDOW.start as u32, (PCI_WINDOW.end - 1) as u32);
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let window = AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, start, last, None);
    let pci_resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &window]));
    let pci_root = Device::new(
        Path::new("PCI0"),
        vec![&pci, &pci_compatible, &uid, &segment, &bus, &pci_resources],
    );
    // Linux uses the ECAM only if a motherboard resource reserves it.
    let ecam = Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
    let registers = Memory32Fixed::new(true, REGISTERS.start as u32, (REGISTERS.end - REGISTERS.start) as u32);
    let (board, board_resources) = (
        hid("PNP0C02"),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &registers])),
    );
    let motherboard = Device::new(Path::new("MBRD"), vec![&board, &uid, &board_resources]);
    // Without this the console falls silent when user space opens it: hardware-reduced ACPI has no
    // legacy interrupts.
    let ports = IO::new(COM1_PORTS.start, COM1_PORTS.start, 1, COM1_PORTS.len() as u8);
    let line = Interrupt::new(true, true, false, false, COM1_GSI);
    let (uart, uart_resources) = (
        hid("PNP0501"),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &line])),
    );
    let com1 = Device::new(Path::new("COM1"), vec![&uart, &uid, &uart_resources]);
    let clock_ports = IO::new(INDEX_PORT, INDEX_PORT, 1, 2);
    let (clock, clock_resources) = (
        hid("PNP0B00"),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&clock_ports])),
    );
    let rtc = Device::new(Path::new("RTC_"), vec![&clock, &clock_resources]);
    Scope::new(aml::Path::new("\\_SB_"), vec![&pci_root, &motherboard, &com1, &rtc]).to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_its_devices_and_a_right_checksum() {
        let table = dsdt();
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(
            u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize,
            table.len()
        );
        for name in [b"PCI0", b"MBRD", b"COM1", b"RTC_", b"_S5_"] {
            assert!(table.windows(4).any(|w| w == name), "{name:?}");
        }
    }
}
