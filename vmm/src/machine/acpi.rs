//! ACPI tables (ACPI 6.5, chapter 5.2): a hardware-reduced machine of one NUMA node a host.

use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, fadt, gas, madt, mcfg, slit, srat, xsdt};
use krg_scheduler::Placement;
use zerocopy::{Immutable, IntoBytes};

use super::dsdt::dsdt;
use super::error::MachineError;
use super::layout::{ACPI, ECAM, IOAPIC, LAPIC_BASE, REGISTERS, home_ranges};
use super::power::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS};

pub(crate) const OEM_ID: [u8; 6] = *b"KRGVMM";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"KRGVMM  ";
pub(crate) const OEM_REVISION: u32 = 1;

/// SLIT distances: of a node to itself (by definition), and of two hosts. The second stands for pages
/// that come over a network. Above 32 Linux doesn't carry a new or woken process to another node by
/// itself (`node_reclaim_distance`, kernel/sched/topology.c); one that has to wait for a CPU it does.
const LOCAL: u8 = 10;
const REMOTE: u8 = 200;
/// Tables start at multiples of this.
const ALIGNMENT: u64 = 64;

/// MADT entry type 9: a processor by x2APIC id (ACPI 6.5, 5.2.12.12).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalX2apic {
    kind: u8,
    length: u8,
    reserved: u16,
    id: u32,
    flags: u32,
    uid: u32,
}

impl Aml for LocalX2apic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.as_bytes());
    }
}

/// SRAT entry type 2: a processor's NUMA node by x2APIC id (ACPI 6.5, 5.2.16.3).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct X2apicAffinity {
    kind: u8,
    length: u8,
    reserved: u16,
    domain: u32,
    id: u32,
    flags: u32,
    clock_domain: u32,
    reserved_end: u32,
}

/// Builds all tables for a machine placed like this. Returns the bytes to write at
/// `layout::ACPI.start`, where the RSDP is.
///
/// # Errors
/// When they don't fit their place below 1 MiB.
pub fn tables(placement: &Placement) -> Result<Vec<u8>, MachineError> {
    let mut area = Area {
        bytes: vec![0; ALIGNMENT as usize],
    };
    let dsdt = area.add(&dsdt());
    let entries = [
        area.add(&table(&fadt(dsdt))),
        area.add(&table(&madt(placement))),
        area.add(srat(placement).as_slice()),
        area.add(&table(&slit(placement)?)),
        area.add(&table(&mcfg())),
    ];
    let mut root = xsdt::XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    entries.iter().for_each(|address| root.add_entry(*address));
    let root = area.add(&table(&root));
    let rsdp = Rsdp::new(OEM_ID, root);
    area.bytes[..Rsdp::len()].copy_from_slice(rsdp.as_bytes());
    let room = (ACPI.end - ACPI.start) as usize;
    match area.bytes.len() <= room {
        true => Ok(area.bytes),
        false => Err(MachineError::Acpi(format!(
            "{} bytes don't fit into {room}; use fewer vCPUs",
            area.bytes.len()
        ))),
    }
}

/// Tables laid out one after another from the start of the ACPI area.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table; returns its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(at as usize, 0);
        self.bytes.extend_from_slice(table);
        ACPI.start + at
    }
}

fn table(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn register(offset: u64) -> gas::GAS {
    gas::GAS::new(
        gas::AddressSpace::SystemMemory,
        8,
        0,
        gas::AccessSize::ByteAccess,
        REGISTERS.start + offset,
    )
}

fn fadt(dsdt: u64) -> fadt::FADT {
    let mut builder = fadt::FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(fadt::PmProfile::EnterpriseServer)
        .flag(fadt::Flags::HwReducedAcpi)
        .flag(fadt::Flags::ResetRegSup)
        // APIC ids are addressed physically, on any number of hosts.
        .flag(fadt::Flags::ForceApicPhysicalDestinationMode);
    builder.reset_reg = register(RESET);
    builder.reset_value = RESET_VALUE;
    builder.sleep_control_reg = register(SLEEP_CONTROL);
    builder.sleep_status_reg = register(SLEEP_STATUS);
    builder.finalize()
}

fn madt(placement: &Placement) -> madt::MADT {
    let local = madt::LocalInterruptController::Address(LAPIC_BASE as u32);
    let mut madt = madt::MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..placement.cpus() {
        // Type 9 for all: their LAPICs start in x2APIC mode.
        madt.add_structure(LocalX2apic {
            kind: 9,
            length: 16,
            reserved: 0,
            id,
            flags: 1,
            uid: id,
        });
    }
    madt.add_structure(madt::IoApic::new(0, IOAPIC.start as u32, 0));
    madt
}

fn srat(placement: &Placement) -> Sdt {
    // Header, then 12 reserved bytes of which the first four are 1 (ACPI 6.5, 5.2.16).
    let mut table = Sdt::new(*b"SRAT", 48, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.write_u32(36, 1);
    for (domain, share) in placement.hosts.iter().enumerate() {
        for id in &share.vcpus {
            let entry = X2apicAffinity {
                kind: 2,
                length: 24,
                reserved: 0,
                domain: domain as u32,
                id: *id,
                flags: 1,
                clock_domain: 0,
                reserved_end: 0,
            };
            table.append_slice(entry.as_bytes());
        }
    }
    for (domain, range) in home_ranges(placement) {
        let entry = srat::MemoryAffinity::new(domain as u32, range.start, range.end - range.start).enabled();
        table.append_slice(&self::table(&entry));
    }
    table
}

fn slit(placement: &Placement) -> Result<slit::SLIT, MachineError> {
    let hosts = placement.hosts.len();
    let count = u32::try_from(hosts).map_err(|_| MachineError::Acpi(format!("{hosts} hosts are too many")))?;
    let mut slit = slit::SLIT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, count);
    for a in 0..hosts {
        for b in 0..hosts {
            slit.set_distance(a, b, if a == b { LOCAL } else { REMOTE });
        }
    }
    Ok(slit)
}

fn mcfg() -> mcfg::MCFG {
    let mut mcfg = mcfg::MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use krg_scheduler::HostShare;

    fn placement(hosts: u32, each: u32) -> Placement {
        let host = |h| HostShare {
            vcpus: (h * each..(h + 1) * each).collect(),
            memory: 2 << 30,
        };
        Placement {
            hosts: (0..hosts).map(host).collect(),
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Every table the XSDT lists, by signature.
    fn parse(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let at = |address: u64| {
            let start = (address - ACPI.start) as usize;
            bytes[start..start + u32_at(bytes, start + 4)].to_vec()
        };
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let root = at(u64_at(bytes, 24));
        let mut tables: Vec<Vec<u8>> = (36..root.len()).step_by(8).map(|i| at(u64_at(&root, i))).collect();
        tables.push(at(u64_at(&tables[0], 140)));
        tables.push(root);
        tables
            .into_iter()
            .map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t))
            .collect()
    }

    #[test]
    fn all_tables_are_found_and_sum_to_zero() {
        let parsed = parse(&tables(&placement(2, 2)).unwrap());
        let names: Vec<_> = parsed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["FACP", "APIC", "SRAT", "SLIT", "MCFG", "DSDT", "XSDT"]);
        for (name, table) in &parsed {
            assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0, "{name}");
        }
    }

    #[test]
    fn srat_and_madt_name_every_vcpu_and_all_memory() {
        let parsed = parse(&tables(&placement(2, 2)).unwrap());
        let get = |name: &str| &parsed.iter().find(|(n, _)| n == name).unwrap().1;
        // 4 processors of 16 bytes and an IOAPIC of 12.
        assert_eq!(get("APIC").len(), 44 + 4 * 16 + 12);
        // 4 processors of 24 bytes; memory of 40: host 0, and host 1 around the hole.
        let srat = get("SRAT");
        assert_eq!(srat.len(), 48 + 4 * 24 + 3 * 40);
        assert_eq!((u32_at(srat, 48 + 3 * 24 + 4), u32_at(srat, 48 + 3 * 24 + 8)), (1, 3));
        assert_eq!(get("SLIT")[44..], [10, 200, 200, 10]);
    }

    #[test]
    fn the_largest_machine_fits() {
        assert!(tables(&placement(16, 64)).is_ok());
        assert!(tables(&placement(60, 64)).is_err());
    }
}
