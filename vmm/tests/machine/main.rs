//! The machine on /dev/kvm with micro guests: one node, and two nodes in one process.

mod cluster;
mod guest;

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use cluster::{Cluster, Count};
use krg_vmm::machine::{Access, Direction, End, Event, Role, Space};

const PATIENCE: Duration = Duration::from_secs(60);

fn reset_by(cluster: &Cluster) {
    match cluster.ends.recv_timeout(PATIENCE) {
        Ok(end) => assert_eq!(end, End::Reset),
        Err(e) => panic!("no end ({e}): {}", cluster.describe()),
    }
    assert_eq!(cluster.console(), "K");
}

/// INIT, SIPI, fixed interrupts and NMI between two vCPUs, in lock step, so that one lost or
/// doubled stops the guest or changes a count.
fn exchange(nodes: usize, cycles: u32, rounds: u32) {
    let cluster = Cluster::new(nodes);
    cluster.load_exchange(cycles, rounds);
    cluster.run();
    reset_by(&cluster);
    cluster.stop();
    assert_eq!(cluster.read(Count::Started), cycles);
    assert_eq!(cluster.read(Count::Asked), cycles * rounds);
    assert_eq!(cluster.read(Count::Answered), cycles * rounds);
    assert_eq!(cluster.read(Count::Nmis), cycles);
    if nodes == 2 {
        let sent = cluster.sent.lock().unwrap();
        let count = |vcpu, event| sent.iter().filter(|s| **s == (vcpu, event)).count() as u32;
        assert_eq!(count(1, Event::Init), cycles);
        assert_eq!(count(1, Event::Sipi(8)), cycles);
        assert_eq!(count(1, Event::Nmi), cycles);
        assert_eq!(count(1, Event::Fixed(0x40)), cycles * rounds);
        assert_eq!(count(0, Event::Fixed(0x50)), cycles * rounds);
        assert_eq!(sent.len() as u32, cycles * (3 + 2 * rounds), "nothing else was sent");
    }
}

#[test]
fn one_node_exchanges_interrupts() {
    exchange(1, 3, 100);
}

#[test]
fn two_nodes_exchange_interrupts_through_proxies() {
    exchange(2, 20, 50);
}

/// Interrupts keep node 0's proxy of vCPU 1 busy while the guest starts that vCPU again and again: the
/// start-up must neither be lost nor run in the proxy.
#[test]
fn starting_a_vcpu_survives_a_flood_of_interrupts() {
    const CYCLES: u32 = 40;
    let cluster = Cluster::new(2);
    cluster.load_exchange(CYCLES, 3);
    cluster.run();
    let flood = kvm_bindings::kvm_msi {
        address_lo: 0xfee0_1000,
        data: 0x4041,
        ..Default::default()
    };
    let until = Instant::now() + PATIENCE;
    let end = loop {
        if cluster.read(Count::Started) > 0 {
            // Refused while INIT has the LAPIC switched off.
            let _ = cluster.machines[0].vm().signal_msi(flood);
        }
        match cluster.ends.try_recv() {
            Err(_) if Instant::now() < until => {}
            end => break end,
        }
    };
    assert_eq!(end, Ok(End::Reset), "{}", cluster.describe());
    cluster.stop();
    assert_eq!(cluster.read(Count::Started), CYCLES);
    assert_eq!(cluster.read(Count::Answered), CYCLES * 3);
    let flooded = cluster.read(Count::Flood);
    let forwarded = cluster
        .sent
        .lock()
        .unwrap()
        .iter()
        .filter(|s| **s == (1, Event::Fixed(0x41)))
        .count() as u32;
    // INIT clears what is pending in a LAPIC, so not all that arrived was handled.
    assert!((1..=forwarded).contains(&flooded), "{flooded} of {forwarded}");
}

#[test]
fn a_stopped_machine_goes_on_where_it_was() {
    let cluster = Cluster::new(2);
    cluster.load_exchange(2, 2000);
    cluster.run();
    for _ in 0..10 {
        match cluster.ends.recv_timeout(Duration::from_millis(20)) {
            Err(RecvTimeoutError::Timeout) => {}
            other => panic!("{other:?}: {}", cluster.describe()),
        }
        cluster.stop();
        cluster.run();
    }
    reset_by(&cluster);
    cluster.stop();
    assert_eq!(cluster.read(Count::Answered), 4000);
}

#[test]
fn a_saved_machine_goes_on_in_a_new_one() {
    let cluster = Cluster::new(2);
    cluster.load_exchange(1, 1000);
    cluster.run();
    let until = Instant::now() + PATIENCE;
    while cluster.read(Count::Answered) < 100 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    cluster.stop();
    let saved: Vec<String> = cluster
        .machines
        .iter()
        .map(|m| serde_json::to_string(&m.save().unwrap()).unwrap())
        .collect();
    let answered = cluster.read(Count::Answered);
    assert!((100..1000).contains(&answered), "{answered}");
    let memory = cluster.copy_memory();
    drop(cluster);

    let cluster = Cluster::with_memory(2, memory);
    for (machine, state) in cluster.machines.iter().zip(&saved) {
        let state: krg_vmm::machine::state::MachineState = serde_json::from_str(state).unwrap();
        assert_eq!(state.vcpus.iter().filter(|v| v.role == Role::Owner).count(), 1);
        machine.restore(&state).unwrap();
    }
    cluster.run();
    reset_by(&cluster);
    assert_eq!(cluster.read(Count::Answered), 1000);
}

#[test]
fn roots_are_known_after_sampling() {
    let cluster = Cluster::new(2);
    cluster.load_exchange(1, 0xffff_ffff);
    cluster.run();
    let until = Instant::now() + PATIENCE;
    loop {
        cluster.machines[0].sample_roots();
        std::thread::sleep(Duration::from_millis(5));
        if cluster.machines[0].page_table_roots() == [(0, 0x9000)] {
            break;
        }
        assert!(Instant::now() < until, "{:x?}", cluster.machines[0].page_table_roots());
    }
    assert_eq!(cluster.machines[1].page_table_roots().len(), 1, "vCPU 1 runs there");
    cluster.stop();
}

#[test]
fn power_registers_and_ports_answer_any_peer() {
    let cluster = Cluster::new(1);
    let machine = &cluster.machines[0];
    let access = |space, address, size, direction| {
        machine.serve(Access {
            space,
            address,
            size,
            direction,
        })
    };
    assert_eq!(access(Space::Port, 0x1234, 1, Direction::Read), 0xff);
    assert_eq!(access(Space::Port, 0x1234, 4, Direction::Read), 0xffff_ffff);
    assert_eq!(access(Space::Memory, 0xc000_0000, 8, Direction::Read), u64::MAX);
    for address in [0, 0x3f8, 0xfec0_0000, 0xfed0_0000, u64::MAX] {
        for size in [0, 1, 3, 8, 255] {
            access(Space::Port, address, size, Direction::Read);
            access(Space::Memory, address, size, Direction::Read);
            access(Space::Memory, address, size, Direction::Posted(0));
        }
    }
    // A PCI configuration address, not a reset.
    access(Space::Port, 0xcf8, 4, Direction::Write(0x8000_0600));
    assert!(cluster.ends.try_recv().is_err());
    access(Space::Memory, 0xfed0_0000, 1, Direction::Write(0x34));
    assert_eq!(cluster.ends.try_recv(), Ok(End::PowerOff));
}
