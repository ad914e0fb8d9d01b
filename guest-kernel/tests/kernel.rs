//! Kernels of distributions. `KRG_TEST_KERNELS` names the files, separated by colons; without it,
//! those in /boot.

use std::path::PathBuf;
use std::time::Instant;

use krg_guest_kernel::kernel::Kernel;

fn kernels() -> Vec<PathBuf> {
    if let Some(paths) = std::env::var_os("KRG_TEST_KERNELS") {
        return std::env::split_paths(&paths).collect();
    }
    let Ok(entries) = std::fs::read_dir("/boot") else {
        return Vec::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-"))
        .collect()
}

#[test]
fn distribution_kernels_unpack() {
    let kernels = kernels();
    if kernels.is_empty() {
        println!("skipped: no kernel in /boot, and KRG_TEST_KERNELS is not set");
    }
    for path in kernels {
        let name = path.display().to_string();
        let file = std::fs::read(&path).unwrap();
        let started = Instant::now();
        let kernel = Kernel::from_bytes(&name, &file).unwrap();
        let took = started.elapsed();
        println!(
            "{name}: {:?}, {} MiB in {took:?}",
            kernel.version,
            kernel.elf.len() >> 20
        );
        let version = kernel.version.clone().unwrap();
        assert!(name.ends_with(&version), "{name}: {version}");
        let setup = kernel.setup.unwrap();
        assert!(setup.protocol >= 0x20c && setup.kernel_alignment.is_power_of_two());
        assert!(setup.bytes.len() > 0x268 - 0x1f1 && setup.cmdline_size >= 255);
        // An unpacked kernel is a kernel, too, and tells its release itself.
        let again = Kernel::from_bytes(&name, &kernel.elf).unwrap();
        assert!(again.elf == kernel.elf && again.setup.is_none());
        assert_eq!(again.version, Some(version));
        // Cut short anywhere, it is refused.
        for len in [0, 100, 0x220, 4096, file.len() / 2, file.len() - file.len() / 16] {
            assert!(Kernel::from_bytes(&name, &file[..len]).is_err(), "cut to {len}");
        }
    }
}
