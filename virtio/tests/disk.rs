//! Disk images as the machine opens them: formats, overlays, locks and their errors.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use krg_virtio::disk::{self, BLOCK_SIZE, Disk, Overlay, OverlayState, Reader};

const CLUSTER: usize = 4096;

fn raw_image(directory: &Path, blocks: usize) -> (PathBuf, Vec<u8>) {
    let data: Vec<u8> = (0..blocks * BLOCK_SIZE as usize + 512)
        .map(|i| (i / 512 % 251) as u8)
        .collect();
    let path = directory.join("disk.img");
    fs::write(&path, &data).unwrap();
    (path, data)
}

fn error_of(path: &Path, persist: bool) -> String {
    match disk::open(path, persist) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(error) => error.to_string(),
    }
}

fn contents(disk: &dyn Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

/// A generator of test data that needs no crate: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn an_overlay_reads_back_what_was_written_and_never_touches_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, original) = raw_image(directory.path(), 40);
    let disk = disk::open(&path, false).unwrap();
    let mut model = original.clone();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..2000u32 {
        let offset = random.below(disk.sectors()) * 512;
        let len = ((1 + random.below(24)) * 512).min(disk.size() - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(3) {
            0 => {
                let data = vec![round as u8; len as usize];
                disk.write_at(&data, offset).unwrap();
                model[range].copy_from_slice(&data);
            }
            1 if round % 8 == 0 => {
                disk.write_zeroes(offset, len, true).unwrap();
                model[range].fill(0);
            }
            _ => {
                let mut got = vec![0xa5; len as usize];
                disk.read_at(&mut got, offset).unwrap();
                assert!(got == model[range], "round {round}: {len} bytes at {offset}");
            }
        }
    }
    assert!(contents(&*disk) == model);
    assert!(fs::read(&path).unwrap() == original);
}

#[test]
fn a_single_odd_write_keeps_the_rest_of_its_block() {
    let directory = tempfile::tempdir().unwrap();
    let (path, mut model) = raw_image(directory.path(), 3);
    for (offset, len) in [
        (512, 512),
        (4096 - 512, 1024),
        (3 * 4096, 512),
        (0, 512),
        (8192, 4096),
        (4096, 8192),
    ] {
        let disk = disk::open(&path, false).unwrap();
        let mut expected = model.clone();
        disk.write_at(&vec![0xee; len], offset as u64).unwrap();
        expected[offset..offset + len].fill(0xee);
        assert!(contents(&*disk) == expected, "{len} bytes at {offset}");
    }
    // Persistent: the same write lands in the image.
    let disk = disk::open(&path, true).unwrap();
    disk.write_at(&[7; 512], 1024).unwrap();
    disk.write_zeroes(2048, 1024, true).unwrap();
    disk.flush().unwrap();
    model[1024..1536].fill(7);
    model[2048..3072].fill(0);
    assert!(fs::read(&path).unwrap() == model);
}

#[test]
fn an_overlay_survives_save_and_restore() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _) = raw_image(directory.path(), 20);
    let disk = disk::open(&path, false).unwrap();
    for (offset, len) in [(0, 512), (9 * 4096, 4096 * 3), (20 * 4096, 512)] {
        disk.write_at(&vec![0x5a; len], offset).unwrap();
    }
    let overlay = disk.overlay().unwrap();
    let json = serde_json::to_string(&overlay.save()).unwrap();
    let mut data = Vec::new();
    overlay.export(&mut data).unwrap();
    let state: OverlayState = serde_json::from_str(&json).unwrap();
    assert_eq!(state.runs, [(0, 1), (9, 3), (20, 1)]);
    assert_eq!(data.len(), 4 * 4096 + 512);

    let base = disk::open_read_only(&path).unwrap();
    let restored = Overlay::restore(base.clone(), &state, &mut data.as_slice()).unwrap();
    assert!(contents(&restored) == contents(&*disk));

    let refused = |change: &dyn Fn(&mut OverlayState)| {
        let mut state = state.clone();
        change(&mut state);
        Overlay::restore(base.clone(), &state, &mut data.as_slice())
            .err()
            .unwrap()
            .to_string()
    };
    assert!(refused(&|s| s.version = 9).contains("version 9"));
    assert!(refused(&|s| s.size += 512).contains("the image has"));
    assert!(refused(&|s| s.runs[2] = (20, 2)).contains("out of order or range"));
    assert!(refused(&|s| s.runs.swap(0, 1)).contains("out of order or range"));
    assert!(refused(&|s| s.runs[1] = (u64::MAX, 2)).contains("out of order or range"));
    assert!(refused(&|s| s.runs.insert(0, (0, 1))).contains("out of order or range"));
}

#[test]
fn what_is_no_disk_is_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, data: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, data).unwrap();
        path
    };
    for (path, reason) in [
        (directory.path().join("none"), "ENOENT"),
        (directory.path().to_owned(), "is a directory"),
        (file("empty", b""), "is empty"),
        (file("odd", &[0; 700]), "not a multiple of 512"),
        (file("zipped", b"\x1f\x8b\x08rest"), "compressed with gzip"),
        (file("cut.qcow2", b"QFI\xfb\0\0\0\x03\0\0"), "header is cut off"),
        (PathBuf::from("/dev/null"), "is a character device"),
    ] {
        for persist in [false, true] {
            let error = error_of(&path, persist);
            assert!(
                error.contains(path.to_str().unwrap()) && !error.contains('\n'),
                "{error}"
            );
            assert!(
                error.contains(reason) || (persist && error.contains("only read")),
                "{error}"
            );
        }
    }
}

#[test]
fn a_persistent_disk_is_locked_against_everybody_and_a_private_one_against_writers() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _) = raw_image(directory.path(), 1);
    let reader = disk::open(&path, false).unwrap();
    let second_reader = disk::open(&path, false).unwrap();
    assert!(error_of(&path, true).contains("in use by another process"));
    drop((reader, second_reader));
    let writer = disk::open(&path, true).unwrap();
    assert!(error_of(&path, false).contains("in use by another process"));
    drop(writer);
    disk::open(&path, false).unwrap();
}

#[test]
fn requests_beyond_the_end_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _) = raw_image(directory.path(), 1);
    let disk = disk::open(&path, false).unwrap();
    let mut buffer = [0; 512];
    for offset in [disk.size(), disk.size() - 1, u64::MAX - 100] {
        assert!(disk.read_at(&mut buffer, offset).is_err());
        assert!(disk.write_at(&buffer, offset).is_err());
        assert!(disk.write_zeroes(offset, 512, true).is_err());
    }
    let read_only = disk::open_read_only(&path).unwrap();
    assert!(read_only.read_only());
    assert!(
        read_only
            .write_at(&buffer, 0)
            .unwrap_err()
            .to_string()
            .contains("read-only")
    );
    assert_eq!(&disk.id()[..9], b"disk.img\0");
}

/// A qcow2 image of `data`: some clusters plain, some compressed, zero ones absent.
fn qcow2(data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let clusters = data.len().div_ceil(CLUSTER);
    let (l1_at, l2_at) = (CLUSTER, 2 * CLUSTER);
    let mut image = vec![0; 3 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &12u32.to_be_bytes());
    put(24, &(data.len() as u64).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(l1_at as u64).to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(l1_at, &(l2_at as u64 | 1 << 63).to_be_bytes());
    assert!(clusters <= CLUSTER / 8);
    for (index, cluster) in data.chunks(CLUSTER).enumerate() {
        if cluster.iter().all(|&byte| byte == 0) {
            continue;
        }
        let mut cluster = cluster.to_vec();
        cluster.resize(CLUSTER, 0);
        let entry = if index % 2 == 0 {
            image.resize(image.len().next_multiple_of(CLUSTER), 0);
            let at = image.len();
            image.extend(&cluster);
            at as u64 | 1 << 63
        } else {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(&cluster).unwrap();
            let packed = encoder.finish().unwrap();
            let at = image.len();
            image.extend(&packed);
            let sectors = (at % 512 + packed.len()).div_ceil(512) - 1;
            1 << 62 | (sectors as u64) << (62 - 4) | at as u64
        };
        image[l2_at + index * 8..][..8].copy_from_slice(&entry.to_be_bytes());
    }
    image
}

fn pattern() -> Vec<u8> {
    let mut data: Vec<u8> = (0..20 * CLUSTER + 1024).map(|i| (i / 100) as u8).collect();
    data[4 * CLUSTER..7 * CLUSTER].fill(0);
    data
}

#[test]
fn a_qcow2_image_reads_like_the_disk_it_was_made_of() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let data = pattern();
    fs::write(&path, qcow2(&data)).unwrap();
    let disk = disk::open(&path, false).unwrap();
    assert!(contents(&*disk) == data);
    for (offset, len) in [
        (512, 1024),
        (CLUSTER - 512, 1024),
        (3 * CLUSTER + 512, 5 * CLUSTER),
        (20 * CLUSTER, 1024),
    ] {
        let mut got = vec![1; len];
        disk.read_at(&mut got, offset as u64).unwrap();
        assert!(got == data[offset..offset + len], "{len} bytes at {offset}");
    }
    disk.write_at(&[9; 512], 1536).unwrap();
    let mut reader = Reader::new(Arc::clone(&disk));
    reader.seek(SeekFrom::End(-(data.len() as i64))).unwrap();
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(&all[1536..2048], &[9; 512]);
    assert!(all[2048..] == data[2048..]);
    drop((disk, reader));
    assert!(error_of(&path, true).contains("only read"));
}

#[test]
fn qcow2_features_that_are_not_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let refused = |at: usize, value: &[u8]| {
        let mut image = qcow2(&pattern());
        image[at..at + value.len()].copy_from_slice(value);
        fs::write(&path, image).unwrap();
        error_of(&path, false)
    };
    for (at, value, reason) in [
        (4, &[0, 0, 0, 9][..], "version 9"),
        (8, &[0, 0, 0, 0, 0, 0, 1, 0], "backing file"),
        (20, &[0, 0, 0, 60], "cluster size"),
        (24, &[0xff; 8], "disk size"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (36, &[0, 0, 0, 0], "L1 table of 0"),
        (40, &[0x7f; 8], "ends beyond the file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as corrupt"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "not read"),
    ] {
        let error = refused(at, value);
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn damaged_qcow2_images_end_in_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let good = qcow2(&pattern());
    let mut random = Random(42);
    let (mut opened, mut failed) = (0, 0);
    for _ in 0..1500 {
        let mut image = good.clone();
        for _ in 0..1 + random.below(6) {
            // Mostly the header and the tables: data bytes decide nothing.
            let at = match random.below(4) {
                0 => random.below(112),
                1 => CLUSTER as u64 + random.below(8),
                2 => 2 * CLUSTER as u64 + random.below(21 * 8),
                _ => random.below(image.len() as u64),
            };
            image[at as usize] = random.below(256) as u8;
        }
        if random.below(4) == 0 {
            image.truncate(random.below(image.len() as u64) as usize);
        }
        fs::write(&path, &image).unwrap();
        match disk::open_read_only(&path) {
            Ok(disk) if disk.size() <= 1 << 20 => {
                opened += 1;
                let mut all = vec![0; disk.size() as usize];
                failed += u32::from(disk.read_at(&mut all, 0).is_err());
            }
            Ok(disk) => {
                opened += 1;
                let mut end = [0; 512];
                failed += u32::from(disk.read_at(&mut end, disk.size() - 512).is_err());
            }
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
    }
    assert!(
        opened > 100 && failed > 50,
        "{opened} opened, {failed} failed: the changes hit nothing"
    );
}
