//! Boot files looked for in anything: partition tables, file systems, configurations.
#![no_main]

use std::io::Cursor;

libfuzzer_sys::fuzz_target!(|image: &[u8]| {
    if let Err(error) = krg_guest_kernel::find(Cursor::new(image.to_vec())) {
        // Messages are part of what must not fail.
        let _ = error.to_string();
    }
});
