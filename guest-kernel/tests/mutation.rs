//! Damaged images and kernels: whatever the bytes are, an answer or a one-line error comes back, and
//! soon. A short, repeatable cousin of the fuzz targets.

use std::io::{Cursor, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use krg_guest_kernel::find;
use krg_guest_kernel::kernel::Kernel;

/// What each test may take.
const TIME: Duration = Duration::from_secs(2);

/// xorshift: the same changes in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// Changes 1 to 8 bytes among those that are not zero in `good` or close to such: tables, not room.
fn mutate(good: &[u8], used: &[usize], random: &mut Random) -> Vec<u8> {
    const INTERESTING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    let mut bytes = good.to_vec();
    for _ in 0..1 + random.below(8) {
        let at = (used[random.below(used.len())] + random.below(4)).min(bytes.len() - 1);
        bytes[at] = match random.below(3) {
            0 => INTERESTING[random.below(INTERESTING.len())],
            1 => bytes[at] ^ 1 << random.below(8),
            _ => random.below(256) as u8,
        };
    }
    if random.below(8) == 0 {
        bytes.truncate(random.below(good.len()));
    }
    bytes
}

/// Runs `check` on damaged copies for a while; returns how many went well and how many did not.
fn damage(good: &[u8], mut check: impl FnMut(Vec<u8>) -> Result<(), String>) -> (u32, u32) {
    let used: Vec<usize> = (0..good.len()).filter(|&at| good[at] != 0).collect();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut well, mut failed) = (0, 0);
    let started = Instant::now();
    while started.elapsed() < TIME && well + failed < 3000 {
        let once = Instant::now();
        match check(mutate(good, &used, &mut random)) {
            Ok(()) => well += 1,
            Err(error) => {
                assert!(!error.contains('\n'), "{error}");
                failed += 1;
            }
        }
        assert!(
            once.elapsed() < Duration::from_secs(20),
            "one image took {:?}",
            once.elapsed()
        );
    }
    (well, failed)
}

fn check_image(image: Vec<u8>) -> Result<(), String> {
    find(Cursor::new(image)).map(|_| ()).map_err(|error| error.to_string())
}

const GRUB: &str = "set default=\"0\"\nif [ x = x ]; then set a=b; fi\nmenuentry 'Linux' --id l {\n linux /vmlinuz root=/dev/vda1 ${a}\n initrd /initrd\n}\n";

/// A FAT disk behind an MBR.
fn fat_disk() -> Vec<u8> {
    let mut volume = Cursor::new(vec![0; 256 << 10]);
    fatfs::format_volume(&mut volume, fatfs::FormatVolumeOptions::new()).unwrap();
    {
        let fs = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).unwrap();
        let root = fs.root_dir();
        let put = |name: &str, data: &[u8]| root.create_file(name).unwrap().write_all(data).unwrap();
        put("vmlinuz", &[7; 3000]);
        put("initrd", b"initrd");
        let directory = root.create_dir("grub").unwrap();
        directory
            .create_file("grub.cfg")
            .unwrap()
            .write_all(GRUB.as_bytes())
            .unwrap();
    }
    let mut disk = vec![0; 512];
    disk[446 + 4] = 0x0c;
    disk[446 + 8] = 1;
    disk[446 + 12..446 + 16].copy_from_slice(&512u32.to_le_bytes());
    disk[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(volume.into_inner());
    disk
}

#[test]
fn damaged_fat_disks() {
    let good = fat_disk();
    assert_eq!(find(Cursor::new(good.clone())).unwrap().cmdline, "root=/dev/vda1 b");
    let (well, failed) = damage(&good, check_image);
    assert!(
        well > 5 && failed > 5,
        "{well} went well, {failed} failed: the changes hit nothing"
    );
}

#[test]
fn damaged_ext4_disks() {
    let directory = tempfile::tempdir().unwrap();
    let (image, root) = (directory.path().join("image"), directory.path().join("root"));
    std::fs::create_dir_all(root.join("boot/grub")).unwrap();
    std::fs::write(root.join("boot/grub/grub.cfg"), GRUB).unwrap();
    std::fs::write(root.join("vmlinuz"), [7; 3000]).unwrap();
    std::fs::write(root.join("initrd"), b"initrd").unwrap();
    std::fs::write(&image, vec![0; 512 << 10]).unwrap();
    let made = Command::new("/usr/sbin/mkfs.ext4")
        .args(["-q", "-F", "-b", "1024", "-N", "32", "-d"])
        .args([&root, &image])
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: no mkfs.ext4");
        return;
    }
    let good = std::fs::read(&image).unwrap();
    assert_eq!(find(Cursor::new(good.clone())).unwrap().kernel, [7; 3000]);
    let (well, failed) = damage(&good, check_image);
    assert!(
        well > 5 && failed > 5,
        "{well} went well, {failed} failed: the changes hit nothing"
    );
}

/// A bzImage around a small ELF file.
fn bzimage() -> Vec<u8> {
    let mut elf = vec![0; 4096];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (elf[16], elf[18], elf[32], elf[54], elf[56]) = (2, 62, 64, 56, 1);
    (elf[64], elf[64 + 33], elf[64 + 41]) = (1, 4, 8);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packer.write_all(&elf).unwrap();
    let payload = packer.finish().unwrap();
    let mut file = vec![0; 1024 + 512];
    file[0x1f1] = 1;
    file[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    (file[0x206], file[0x207], file[0x236]) = (0x0f, 2, 1);
    file[0x249] = 2;
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file
}

#[test]
fn damaged_kernels() {
    let good = bzimage();
    Kernel::from_bytes("kernel", &good).unwrap();
    let (well, failed) = damage(&good, |file| {
        Kernel::from_bytes("kernel", &file)
            .map(|_| ())
            .map_err(|error| error.to_string())
    });
    assert!(
        well > 5 && failed > 5,
        "{well} went well, {failed} failed: the changes hit nothing"
    );
}
