//! Disk images of all formats: opened, and read at both ends and in the middle.
#![no_main]

use std::io::Write;

use krg_virtio::disk;

libfuzzer_sys::fuzz_target!(|image: &[u8]| {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a temporary file");
    file.write_all(image).expect("a write to it");
    let disk = match disk::open_read_only(file.path()) {
        Ok(disk) => disk,
        Err(error) => return assert!(!error.to_string().contains('\n')),
    };
    let size = disk.size();
    let mut buffer = vec![0; size.min(64 << 10) as usize];
    for offset in [0, size / 2 / 512 * 512, size] {
        let offset = offset.min(size - buffer.len() as u64);
        if let Err(error) = disk.read_at(&mut buffer, offset) {
            assert!(!error.to_string().contains('\n'));
        }
    }
});
