//! Kernel files of all kinds. The bounds on memory are part of the test: run with -rss_limit_mb=1024.
#![no_main]

use krg_guest_kernel::kernel::Kernel;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    match Kernel::from_bytes("file", file) {
        Ok(kernel) => assert!(kernel.elf.starts_with(b"\x7fELF")),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
