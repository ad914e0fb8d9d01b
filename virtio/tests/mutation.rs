//! The fuzz targets' harnesses under random and mutated inputs, few enough for every test run.

#[path = "../fuzz/harness/block_queue.rs"]
mod block_queue;
#[path = "../fuzz/harness/bus.rs"]
mod bus;
#[path = "../fuzz/harness/pci_access.rs"]
mod pci_access;

/// Marsaglia's xorshift64: the same inputs in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A read of one sector in three descriptors, as the harness has them.
fn request() -> Vec<u8> {
    let mut input = vec![15, 1];
    input.extend([0; 16]);
    let header = [0x00, 0x04, 16, 0, 1, 1];
    let data = [0x00, 0x10, 0x00, 0x02, 3, 2];
    let status = [0x80, 0x04, 1, 0, 2, 0];
    input.extend([header, data, status].concat());
    input.extend([0; 13 * 6 + 16 * 6 + 16]);
    input
}

#[test]
fn the_seed_is_a_good_request() {
    assert_eq!(block_queue::run(&request()), Some(1));
}

#[test]
fn requests_that_write_over_the_rings_do_no_harm() {
    let mut over = request();
    // The rings within reach, and the sector read over them.
    over[0] = 7;
    over[2 + 16 + 6 + 1] = 1;
    assert!(block_queue::run(&over).is_some());
}

#[test]
fn mutated_queues() {
    let mut random = Random(0x6b72_672d_766d_6d01);
    let seed = request();
    for _ in 0..4000 {
        let mut input = seed.clone();
        for _ in 0..random.below(12) {
            let at = random.below(input.len());
            input[at] = match random.below(3) {
                0 => random.next() as u8,
                1 => input[at] ^ 1 << random.below(8),
                _ => [0, 1, 2, 4, 0x7f, 0x80, 0xff][random.below(7)],
            };
        }
        block_queue::run(&input);
    }
}

#[test]
fn random_queues() {
    let mut random = Random(0x6b72_672d_766d_6d02);
    for _ in 0..2000 {
        let len = random.below(600);
        block_queue::run(&random.bytes(len));
    }
}

#[test]
fn random_accesses() {
    let mut random = Random(0x6b72_672d_766d_6d03);
    for _ in 0..1500 {
        let len = random.below(600);
        pci_access::run(&random.bytes(len));
    }
}
