//! Boot files found in images as distributions lay them out, made with the usual tools.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use krg_guest_kernel::find;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const ROOT_UUID: &str = "11111111-2222-3333-4444-555555555555";
const BOOT_UUID: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";

/// Runs a tool; `false` if it is not installed.
fn tool(name: &str, arguments: &[&str], input: &str) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let child = Command::new(name)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return false,
        Err(error) => panic!("{name}: {error}"),
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

macro_rules! need {
    ($made:expr) => {
        match $made {
            Some(made) => made,
            None => {
                println!("skipped: mkfs.ext4, mkfs.vfat or sfdisk is not installed");
                return;
            }
        }
    };
}

fn put(root: &Path, path: &str, contents: &[u8]) {
    let path = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, contents).unwrap();
}

/// An ext4 file system with the files under `root`.
fn ext4(directory: &TempDir, name: &str, root: &Path, uuid: &str) -> Option<PathBuf> {
    let image = directory.path().join(name);
    File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let (image_arg, root) = (image.to_str().unwrap(), root.to_str().unwrap());
    tool("mkfs.ext4", &["-q", "-F", "-U", uuid, "-d", root, image_arg], "").then_some(image)
}

/// A FAT file system with `files`, written by the FAT crate.
fn fat(directory: &TempDir, name: &str, files: &[(&str, &[u8])]) -> Option<PathBuf> {
    let image = directory.path().join(name);
    File::create(&image).unwrap().set_len(40 * MIB).unwrap();
    if !tool(
        "mkfs.vfat",
        &["-F", "32", "-i", "1234abcd", image.to_str().unwrap()],
        "",
    ) {
        return None;
    }
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let fs = fatfs::FileSystem::new(file, fatfs::FsOptions::new()).unwrap();
    for (path, contents) in files {
        let mut directory = fs.root_dir();
        let (parents, name) = path.trim_start_matches('/').rsplit_once('/').unwrap_or(("", path));
        for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
            directory = directory.create_dir(parent).unwrap();
        }
        directory.create_file(name).unwrap().write_all(contents).unwrap();
    }
    fs.unmount().unwrap();
    Some(image)
}

/// A disk of partitions with the contents of these files, each at a multiple of 64 MiB.
fn disk(directory: &TempDir, label: &str, partitions: &[&Path]) -> Option<PathBuf> {
    let path = directory.path().join("disk.img");
    let mut disk = File::create(&path).unwrap();
    disk.set_len((partitions.len() as u64 + 1) * 64 * MIB).unwrap();
    let mut script = format!("label: {label}\n");
    for index in 0..partitions.len() as u64 {
        script += &format!("start={}MiB, size=48MiB\n", (index * 64).max(1));
    }
    if !tool("sfdisk", &["-q", path.to_str().unwrap()], &script) {
        return None;
    }
    for (index, partition) in partitions.iter().enumerate() {
        let mut contents = Vec::new();
        File::open(partition).unwrap().read_to_end(&mut contents).unwrap();
        disk.seek(SeekFrom::Start((index as u64 * 64).max(1) * MIB)).unwrap();
        disk.write_all(&contents).unwrap();
    }
    Some(path)
}

fn grub_cfg(prefix: &str) -> String {
    format!(
        "set default=\"0\"\nmenuentry 'Debian' --class os {{\n\tsearch --no-floppy --fs-uuid --set=root {ROOT_UUID}\n\
         \tlinux\t{prefix}/vmlinuz-6.1 root=UUID={ROOT_UUID} ro quiet\n\tinitrd\t{prefix}/initrd.img-6.1\n}}\n"
    )
}

fn open(path: &Path) -> File {
    File::open(path).unwrap()
}

#[test]
fn grub_on_a_bare_file_system_and_in_partitions() {
    let directory = TempDir::new().unwrap();
    let root = TempDir::new().unwrap();
    // Larger than one extent's worth of small blocks, and not all the same.
    let kernel: Vec<u8> = (0..3_000_000u32).map(|i| (i / 7) as u8).collect();
    put(root.path(), "/boot/vmlinuz-6.1", &kernel);
    put(root.path(), "/boot/initrd.img-6.1", b"initrd");
    put(root.path(), "/boot/grub/grub.cfg", grub_cfg("/boot").as_bytes());
    let image = need!(ext4(&directory, "root", root.path(), ROOT_UUID));
    let check = |path: &Path, place: &str| {
        let found = find(open(path)).unwrap();
        assert!(found.kernel == kernel);
        assert_eq!(found.initrd.as_deref(), Some(&b"initrd"[..]));
        assert_eq!(found.cmdline, format!("root=UUID={ROOT_UUID} ro quiet"));
        assert_eq!(found.source, format!("Debian (/boot/grub/grub.cfg in {place} (ext4))"));
    };
    check(&image, "the disk");
    let esp = need!(fat(
        &directory,
        "esp",
        &[("/EFI/debian/grub.cfg", b"configfile ($root)/boot/grub/grub.cfg\n")]
    ));
    for label in ["gpt", "dos"] {
        check(&need!(disk(&directory, label, &[&esp, &image])), "partition 2");
    }
}

#[test]
fn boot_on_its_own_partition() {
    let directory = TempDir::new().unwrap();
    let (boot, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    put(boot.path(), "/vmlinuz-6.1", b"kernel");
    put(boot.path(), "/initrd.img-6.1", b"initrd");
    put(boot.path(), "/grub/grub.cfg", grub_cfg("").as_bytes());
    put(root.path(), "/etc/fstab", b"");
    let boot = need!(ext4(&directory, "boot", boot.path(), BOOT_UUID));
    let root = need!(ext4(&directory, "root", root.path(), ROOT_UUID));
    let found = find(open(&need!(disk(&directory, "gpt", &[&boot, &root])))).unwrap();
    assert_eq!(found.kernel, b"kernel");
    assert_eq!(found.source, "Debian (/grub/grub.cfg in partition 1 (ext4))");
}

#[test]
fn boot_loader_entries_extlinux_and_unified_images_on_fat() {
    let directory = TempDir::new().unwrap();
    let entry =
        b"title Fedora\nversion 6.10\nlinux /6.10/linux\ninitrd /6.10/initrd\ninitrd /more\noptions root=LABEL=x\n";
    let old = b"title Fedora\nversion 6.9\nlinux /6.9/linux\n";
    let mut files: Vec<(&str, &[u8])> = vec![
        ("/loader/entries/a.conf", entry),
        ("/loader/entries/b.conf", old),
        ("/6.10/linux", b"kernel"),
        ("/6.10/initrd", b"12345"),
        ("/more", b"6789"),
    ];
    let esp = need!(fat(&directory, "esp", &files));
    let found = find(open(&need!(disk(&directory, "gpt", &[&esp])))).unwrap();
    assert_eq!(
        (found.kernel.as_slice(), found.cmdline.as_str()),
        (&b"kernel"[..], "root=LABEL=x")
    );
    assert_eq!(found.initrd.as_deref(), Some(&b"12345\0\0\x006789"[..]));
    // The bare file system's boot sector is not taken for a partition table.
    assert_eq!(
        find(open(&esp)).unwrap().source,
        "Fedora (/loader/entries in the disk (FAT))"
    );

    files.drain(..2);
    let conf = b"LABEL linux\n LINUX 6.10/linux\n APPEND ro\n";
    files.push(("/syslinux.cfg", conf));
    let esp = need!(fat(&directory, "esp", &files));
    let found = find(open(&esp)).unwrap();
    assert_eq!(
        (found.kernel_path.as_str(), found.cmdline.as_str()),
        ("/6.10/linux", "ro")
    );

    let esp = need!(fat(&directory, "esp", &[("/EFI/Linux/debian-6.1.efi", &unified())]));
    let found = find(open(&esp)).unwrap();
    assert_eq!(
        (found.kernel.as_slice(), found.cmdline.as_str()),
        (&b"kernel"[..], "quiet")
    );
    assert!(found.source.contains("Linux 6.1"), "{}", found.source);
}

/// A PE file with the sections of a unified kernel image.
fn unified() -> Vec<u8> {
    let mut file = vec![0; 0x400];
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x40;
    file[0x40..0x44].copy_from_slice(b"PE\0\0");
    let sections: [(&[u8], &[u8]); 3] = [(b".linux", b"kernel"), (b".cmdline", b"quiet"), (b".uname", b"6.1")];
    file[0x46] = sections.len() as u8;
    for (index, (name, data)) in sections.iter().enumerate() {
        let (start, at) = (file.len() as u32, 0x58 + index * 40);
        file[at..at + name.len()].copy_from_slice(name);
        for field in [8, 16] {
            file[at + field..at + field + 4].copy_from_slice(&(data.len() as u32).to_le_bytes());
        }
        file[at + 20..at + 24].copy_from_slice(&start.to_le_bytes());
        file.extend(*data);
    }
    file
}

#[test]
fn kernels_without_configuration() {
    let directory = TempDir::new().unwrap();
    let root = TempDir::new().unwrap();
    put(root.path(), "/etc/fstab", b"");
    put(root.path(), "/boot/vmlinuz-6.9", b"old");
    put(root.path(), "/boot/vmlinuz-6.10", b"new");
    put(root.path(), "/boot/initrd.img-6.10", b"initrd");
    let image = need!(ext4(&directory, "root", root.path(), ROOT_UUID));
    let found = find(open(&image)).unwrap();
    assert_eq!(
        (found.kernel.as_slice(), found.cmdline.as_str()),
        (&b"new"[..], &*format!("root=UUID={ROOT_UUID} ro"))
    );
    assert_eq!(found.initrd.as_deref(), Some(&b"initrd"[..]));

    std::os::unix::fs::symlink("boot/vmlinuz-6.9", root.path().join("vmlinuz")).unwrap();
    let image = need!(ext4(&directory, "root", root.path(), ROOT_UUID));
    assert_eq!(find(open(&image)).unwrap().kernel, b"old");
}

#[test]
fn what_cannot_be_booted_is_explained_in_one_line() {
    let directory = TempDir::new().unwrap();
    let root = TempDir::new().unwrap();
    put(root.path(), "/boot/grub/grub.cfg", grub_cfg("/boot").as_bytes());
    let no_kernel = need!(ext4(&directory, "root", root.path(), ROOT_UUID));
    let xfs = directory.path().join("xfs");
    let mut contents = vec![0; 2 * MIB as usize];
    contents[..4].copy_from_slice(b"XFSB");
    fs::write(&xfs, &contents).unwrap();
    let zeroes = directory.path().join("zeroes");
    fs::write(&zeroes, vec![0; 1 << 20]).unwrap();
    let empty = directory.path().join("empty");
    fs::write(&empty, b"").unwrap();
    let empty_root = TempDir::new().unwrap();
    let bare = need!(ext4(&directory, "bare", empty_root.path(), ROOT_UUID));
    let partitions = need!(disk(&directory, "gpt", &[&bare, &xfs]));
    for (path, reason) in [
        (
            &no_kernel,
            "/boot/grub/grub.cfg in the disk (ext4) boots /boot/vmlinuz-6.1, which cannot be read: not found",
        ),
        (&xfs, "no kernel found: the disk holds XFS, which is not read"),
        (
            &partitions,
            "partition 2 holds XFS, which is not read, partition 1 (ext4) has no boot configuration",
        ),
        (&zeroes, "no partition table and no file system"),
        (&empty, "no partition table and no file system"),
    ] {
        let error = find(open(path)).unwrap_err().to_string();
        assert!(
            error.contains(reason) && error.contains("--kernel") && !error.contains('\n'),
            "{error}"
        );
    }
}
