//! Free page reporting as Linux does it, and as it must not be done.

use std::sync::{Arc, Mutex};

use crate::driver::*;
use krg_virtio::balloon::{Balloon, BalloonState, FreePages};
use krg_virtio::device::VirtioDevice;
use krg_virtio::rng::Rng;
use krg_virtio::state::DeviceState;

const REPORTING: u64 = 1 << 5;
const QUEUES: [u64; 3] = [0x1_0000, 0x2_0000, 0x3_0000];
const TABLE: u64 = 0x5_0000;
const MIB: u64 = 1 << 20;
const END: u64 = MEMORY as u64;

/// Ranges as they come.
#[derive(Default)]
struct Freed(Mutex<Vec<(u64, u64)>>);

impl FreePages for Freed {
    fn free(&self, gpa: u64, len: u64) {
        self.0.lock().unwrap().push((gpa, len));
    }
}

fn set_up(features: u64) -> (Machine, Driver, [Queue; 3], Arc<Freed>) {
    let freed = Arc::new(Freed::default());
    let machine = machine(Balloon::new("balloon0", freed.clone()).unwrap());
    let driver = Driver::probe(&machine);
    driver.negotiate(VERSION_1 | features);
    let queues = [0, 1, 2].map(|n| driver.queue(n, 64, QUEUES[usize::from(n)]));
    driver.start();
    (machine, driver, queues, freed)
}

#[test]
fn a_report_of_32_ranges_is_taken_in_one_chain() {
    let (_machine, driver, [_, _, mut reports], freed) = set_up(REPORTING | INDIRECT);
    assert_eq!(driver.features() & REPORTING, REPORTING);
    assert_eq!(driver.device_config::<8>(0), [0; 8], "no balloon is asked for");
    for n in 0..32u16 {
        let (flags, next) = if n < 31 { (WRITE | NEXT, n + 1) } else { (WRITE, 0) };
        driver.describe(TABLE, n, MIB + u64::from(n) * 0x2000, 0x1000, flags, next);
    }
    driver.describe(QUEUES[2], 0, TABLE, 32 * 16, INDIRECT_TABLE, 0);
    driver.offer(&mut reports, 0);
    driver.kick(&reports);
    assert_eq!(driver.wait_used(&mut reports), (0, 0));
    let expected: Vec<_> = (0..32).map(|n| (MIB + n * 0x2000, 0x1000)).collect();
    assert_eq!(*freed.0.lock().unwrap(), expected);
}

#[test]
fn only_whole_pages_are_freed() {
    let (_machine, driver, [_, _, mut reports], freed) = set_up(REPORTING);
    for (n, (address, len)) in [(MIB + 1, 0x2000), (MIB + 0x800, 0x900), (END - 0x1800, 0x1800)].into_iter().enumerate() {
        driver.describe(QUEUES[2], n as u16, address, len, WRITE, 0);
        driver.offer(&mut reports, n as u16);
        driver.kick(&reports);
        assert_eq!(driver.wait_used(&mut reports), (n as u32, 0));
    }
    assert_eq!(*freed.0.lock().unwrap(), [(MIB + 0x1000, 0x1000), (END - 0x1000, 0x1000)]);
}

#[test]
fn other_queues_and_a_driver_without_the_feature_free_nothing() {
    for features in [REPORTING, 0] {
        let (_machine, driver, queues, freed) = set_up(features);
        for mut queue in queues {
            let reports = queue.index == 2 && features != 0;
            if !reports {
                let table = QUEUES[usize::from(queue.index)];
                driver.describe(table, 0, MIB, 0x1000, WRITE, 0);
                driver.offer(&mut queue, 0);
                driver.kick(&queue);
                assert_eq!(driver.wait_used(&mut queue), (0, 0));
            }
        }
        assert!(freed.0.lock().unwrap().is_empty());
    }
}

#[test]
fn malformed_reports_break_the_device_and_free_nothing() {
    let cases: [(&str, u64, u32, u16, u16); 5] = [
        ("beyond memory", END, 0x1000, WRITE, 0),
        ("across the end", END - 0x1000, 0x2000, WRITE, 0),
        ("an address that wraps", u64::MAX - 0xfff, 0x2000, WRITE, 0),
        ("an empty range", MIB, 0, WRITE, 0),
        ("a loop", MIB, 0x1000, WRITE | NEXT, 0),
    ];
    for (what, address, len, flags, next) in cases {
        let (_machine, driver, [_, _, mut reports], freed) = set_up(REPORTING);
        driver.describe(QUEUES[2], 0, address, len, flags, next);
        driver.offer(&mut reports, 0);
        driver.kick(&reports);
        driver.wait_status(NEEDS_RESET);
        assert!(freed.0.lock().unwrap().is_empty(), "{what}");
        // What the driver may read is no free memory, and no mistake either.
        driver.negotiate(VERSION_1 | REPORTING);
        let mut reports = driver.queue(2, 64, QUEUES[2]);
        driver.start();
        driver.describe(QUEUES[2], 0, MIB, 0x1000, 0, 0);
        driver.offer(&mut reports, 0);
        driver.kick(&reports);
        assert_eq!(driver.wait_used(&mut reports), (0, 0), "{what}");
        assert!(freed.0.lock().unwrap().is_empty(), "{what}");
    }
}

#[test]
fn its_state_is_its_own() {
    let balloon = Balloon::new("balloon0", Arc::new(Freed::default())).unwrap();
    assert_eq!(balloon.save(), DeviceState::Balloon(BalloonState { version: 1 }));
    balloon.restore(&balloon.save()).unwrap();
    assert!(balloon.restore(&DeviceState::Balloon(BalloonState { version: 2 })).is_err());
    assert!(balloon.restore(&Rng::new("rng0").unwrap().save()).is_err());
}
