#![no_main]
//! Arbitrary virtqueue contents through a block device.

#[path = "../harness/block_queue.rs"]
mod block_queue;
#[path = "../harness/bus.rs"]
mod bus;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    block_queue::run(data);
});
