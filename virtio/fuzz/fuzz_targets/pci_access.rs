#![no_main]
//! Arbitrary accesses to configuration space and BARs.

#[path = "../harness/bus.rs"]
mod bus;
#[path = "../harness/pci_access.rs"]
mod pci_access;

libfuzzer_sys::fuzz_target!(|data: &[u8]| pci_access::run(data));
