//! Partition tables: GPT (UEFI 2.10, 5.3) and MBR with logical partitions.

use crate::filesystem::Source;

/// Most partitions that are looked at; bounds the work that a forged table can cause.
const MAX_PARTITIONS: usize = 128;

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    /// As in /dev/sdaN.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// PARTUUID as Linux writes it.
    pub uuid: String,
}

/// The disk's partitions in the order of their numbers; none if there is no table.
pub(crate) fn partitions(source: &mut Source) -> Vec<Partition> {
    // A disk with 4 KiB sectors has its GPT header at byte 4096.
    for sector in [512, 4096] {
        let last = (source.size() / sector).saturating_sub(1);
        // The backup at the disk's end counts if the first is damaged.
        for at in [sector, last * sector] {
            if let Some(found) = gpt(source, at, sector) {
                return found;
            }
        }
    }
    mbr(source)
}

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte))
}

fn gpt(source: &mut Source, at: u64, sector: u64) -> Option<Vec<Partition>> {
    let mut header = [0; 92];
    source.read_at(&mut header, at).ok()?;
    if !header.starts_with(b"EFI PART") || le(&header[12..16]) != 92 {
        return None;
    }
    let checksum = le(&header[16..20]) as u32;
    header[16..20].fill(0);
    if crc32fast::hash(&header) != checksum {
        return None;
    }
    let (table, count, entry_len) = (le(&header[72..80]), le(&header[80..84]), le(&header[84..88]));
    if !(128..=4096).contains(&entry_len) {
        return None;
    }
    let mut found = Vec::new();
    for index in 0..count.min(MAX_PARTITIONS as u64) {
        let mut entry = [0; 128];
        let at = table.checked_mul(sector)?.checked_add(index * entry_len)?;
        if source.read_at(&mut entry, at).is_err() {
            break;
        }
        let (first, last) = (le(&entry[32..40]), le(&entry[40..48]));
        if entry[..16] == [0; 16] || last < first {
            continue;
        }
        let sectors = (last - first).checked_add(1);
        let (Some(start), Some(len)) = (first.checked_mul(sector), sectors.and_then(|n| n.checked_mul(sector))) else {
            continue;
        };
        found.push(Partition {
            number: index as u32 + 1,
            start,
            len,
            uuid: guid(&entry[16..32]),
        });
    }
    Some(found)
}

/// A GUID in text: its first three fields are little endian (UEFI 2.10, appendix A).
fn guid(bytes: &[u8]) -> String {
    let tail: String = bytes[10..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let (a, b, c) = (le(&bytes[..4]), le(&bytes[4..6]), le(&bytes[6..8]));
    format!("{a:08x}-{b:04x}-{c:04x}-{:02x}{:02x}-{tail}", bytes[8], bytes[9])
}

/// One entry of an MBR: type, first sector, sectors.
fn mbr_entries(sector: &[u8; 512]) -> Option<[(u8, u64, u64); 4]> {
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    Some(std::array::from_fn(|index| {
        let entry = &sector[446 + index * 16..][..16];
        (entry[4], le(&entry[8..12]), le(&entry[12..16]))
    }))
}

fn mbr(source: &mut Source) -> Vec<Partition> {
    const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
    let mut sector = [0; 512];
    if source.read_at(&mut sector, 0).is_err() {
        return Vec::new();
    }
    let Some(entries) = mbr_entries(&sector) else {
        return Vec::new();
    };
    let disk = le(&sector[440..444]);
    let partition = |number: u32, first: u64, sectors: u64| Partition {
        number,
        start: first * 512,
        len: sectors * 512,
        uuid: format!("{disk:08x}-{number:02x}"),
    };
    let mut found = Vec::new();
    let mut extended = None;
    for (number, (kind, first, sectors)) in (1..).zip(entries) {
        if EXTENDED.contains(&kind) {
            extended = extended.or(Some(first));
        } else if kind != 0 && sectors != 0 {
            found.push(partition(number, first, sectors));
        }
    }
    // Logical partitions: a chain of tables, each with one partition and the way to the next.
    let Some(base) = extended else { return found };
    let mut at = base;
    for number in 5..5 + MAX_PARTITIONS as u32 {
        if source.read_at(&mut sector, at * 512).is_err() {
            break;
        }
        let Some([(kind, first, sectors), (next_kind, next, _), ..]) = mbr_entries(&sector) else {
            break;
        };
        if kind != 0 && sectors != 0 {
            found.push(partition(number, at + first, sectors));
        }
        if !EXTENDED.contains(&next_kind) || next == 0 {
            break;
        }
        at = base + next;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn read(image: Vec<u8>) -> Vec<Partition> {
        partitions(&mut Source::new(Box::new(Cursor::new(image))).unwrap())
    }

    fn put_mbr(image: &mut [u8], at: usize, index: usize, kind: u8, first: u32, sectors: u32) {
        let entry = &mut image[at * 512 + 446 + index * 16..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        image[at * 512 + 510..at * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn logical_partitions_follow_the_primary_ones() {
        let mut image = vec![0; 64 * 512];
        image[440..444].copy_from_slice(&0xdead_beefu32.to_le_bytes());
        put_mbr(&mut image, 0, 0, 0x83, 2, 4);
        put_mbr(&mut image, 0, 1, 0x05, 10, 40);
        put_mbr(&mut image, 10, 0, 0x83, 1, 5);
        put_mbr(&mut image, 10, 1, 0x05, 20, 10);
        put_mbr(&mut image, 30, 0, 0x83, 2, 6);
        let found: Vec<_> = read(image)
            .into_iter()
            .map(|p| (p.number, p.start / 512, p.len / 512, p.uuid))
            .collect();
        let expected = [
            (1, 2, 4, "deadbeef-01"),
            (5, 11, 5, "deadbeef-05"),
            (6, 32, 6, "deadbeef-06"),
        ];
        assert_eq!(found, expected.map(|(a, b, c, d)| (a, b, c, d.to_owned())));
    }

    #[test]
    fn a_circle_of_logical_partitions_ends() {
        let mut image = vec![0; 64 * 512];
        put_mbr(&mut image, 0, 0, 0x0f, 10, 40);
        put_mbr(&mut image, 10, 0, 0x83, 1, 5);
        put_mbr(&mut image, 10, 1, 0x05, 20, 10);
        put_mbr(&mut image, 30, 1, 0x05, 20, 10);
        assert_eq!(read(image).len(), 1);
    }

    fn put_gpt(image: &mut [u8], at: usize) {
        let table = 2u64;
        image[at..at + 8].copy_from_slice(b"EFI PART");
        image[at + 12] = 92;
        image[at + 72..at + 80].copy_from_slice(&table.to_le_bytes());
        image[at + 80] = 4;
        image[at + 84] = 128;
        let sum = crc32fast::hash(&image[at..at + 92]);
        image[at + 16..at + 20].copy_from_slice(&sum.to_le_bytes());
    }

    #[test]
    fn gpt_is_read_from_either_copy() {
        let mut image = vec![0; 64 * 512];
        let entry = 2 * 512 + 128;
        for (index, byte) in image[entry..entry + 32].iter_mut().enumerate() {
            *byte = index as u8;
        }
        image[entry + 32] = 8;
        image[entry + 40] = 15;
        put_gpt(&mut image, 512);
        put_gpt(&mut image, 63 * 512);
        let expected = Partition {
            number: 2,
            start: 8 * 512,
            len: 8 * 512,
            uuid: "13121110-1514-1716-1819-1a1b1c1d1e1f".into(),
        };
        let found = read(image.clone());
        assert_eq!(found, std::slice::from_ref(&expected));
        image[512 + 16] ^= 1;
        assert_eq!(read(image.clone()), [expected]);
        image[63 * 512 + 80] = 9;
        assert_eq!(read(image), []);
    }

    #[test]
    fn a_partition_longer_than_any_disk_is_left_out() {
        let mut image = vec![0; 64 * 512];
        let entry = 2 * 512;
        image[entry] = 1;
        image[entry + 40..entry + 48].fill(0xff);
        put_gpt(&mut image, 512);
        assert_eq!(read(image), []);
    }
}
