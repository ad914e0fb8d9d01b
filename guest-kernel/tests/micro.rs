//! Micro guests on the machine's own KVM: one VM, and what x86 promises of its memory.

use std::sync::Mutex;
use std::time::Instant;

use krg_guest_kernel::micro::{
    Builder, MicroGuest, PORT_DONE, PORT_FAULT, PORT_YIELD, PageSize, code_asm, counter, done, litmus, tso,
};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: u64 = 64 << 20;
/// Programs' data lies from here on, far from code and tables.
const DATA: u64 = 32 << 20;

/// vCPUs of several tests at a time would only wait for each other's processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Machine {
    // Field order is drop order: the VM goes before its memory.
    _vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Machine {
    fn word(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn words(&self, address: u64, count: usize) -> Vec<u64> {
        (0..count as u64).map(|index| self.word(address + index * 8)).collect()
    }
}

/// Runs a guest until every vCPU is done; `None` (with the reason printed) without KVM.
fn run(guest: &MicroGuest) -> Option<Result<Machine, String>> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: /dev/kvm: {error}");
            return None;
        }
    };
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    vm.create_irq_chip().unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping has MEMORY bytes; Machine keeps it for as long as the VM lives, and the
    // vCPUs are gone when this function returns.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    for (at, bytes) in &guest.writes {
        memory.write_slice(bytes, GuestAddress(*at)).unwrap();
    }
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let mut vcpus: Vec<VcpuFd> = Vec::new();
    for (index, start) in guest.vcpus.iter().enumerate() {
        let vcpu = vm.create_vcpu(index as u64).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        start.apply(&mut sregs);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&start.regs()).unwrap();
        vcpu.set_mp_state(kvm_bindings::kvm_mp_state {
            mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
        })
        .unwrap();
        vcpus.push(vcpu);
    }
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = vcpus.iter_mut().map(|vcpu| scope.spawn(|| run_vcpu(vcpu))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    Some(
        results
            .into_iter()
            .collect::<Result<(), String>>()
            .map(|()| Machine { _vm: vm, memory }),
    )
}

fn run_vcpu(vcpu: &mut VcpuFd) -> Result<(), String> {
    loop {
        match vcpu.run().map_err(|error| error.to_string())? {
            VcpuExit::IoOut(port, _) if port == u16::from(PORT_DONE) => return Ok(()),
            VcpuExit::IoOut(port, _) if port == u16::from(PORT_YIELD) => std::thread::yield_now(),
            VcpuExit::IoOut(port, data) if port == u16::from(PORT_FAULT) => return Err(format!("exception {data:?}")),
            other => return Err(format!("exit {other:?}")),
        }
    }
}

fn check_litmus(test: &litmus::Litmus, run_as: litmus::Run, page_size: PageSize) {
    let builder = Builder {
        page_size,
        own_roots: true,
        ..Builder::new(MEMORY)
    };
    let guest = builder
        .build(test.threads.len(), |asm, vcpu| test.assemble(asm, vcpu, &run_as))
        .unwrap();
    let started = Instant::now();
    let Some(machine) = run(&guest) else { return };
    let counts = machine.unwrap().words(run_as.counts, litmus::COUNTS);
    let total = u64::from(run_as.rounds) * u64::from(run_as.batch);
    let seen: Vec<String> = (0..litmus::TORN)
        .filter(|&outcome| counts[outcome] > 0)
        .map(|outcome| format!("{} {}", test.outcome_text(outcome), counts[outcome]))
        .collect();
    println!(
        "{}: {total} iterations in {:?}: {}",
        test.name,
        started.elapsed(),
        seen.join(", ")
    );
    assert_eq!(counts.iter().sum::<u64>(), total, "{}: {counts:?}", test.name);
    assert_eq!(counts[litmus::TORN], 0, "{}: a load saw a value of no round", test.name);
    let allowed = tso::allowed(test);
    for outcome in 0..litmus::TORN {
        let forbidden = counts[outcome] > 0 && !allowed.contains(&outcome);
        assert!(
            !forbidden,
            "{}: forbidden outcome {}: {counts:?}",
            test.name,
            test.outcome_text(outcome)
        );
    }
}

#[test]
fn litmus_tests_show_only_what_tso_allows() {
    for test in litmus::ALL {
        for (page_size, stride) in [(PageSize::Large, 64), (PageSize::Small, 4096)] {
            let run_as = litmus::Run {
                rounds: 100,
                batch: 1000,
                variables: [DATA, DATA + (8 << 20)],
                stride,
                barrier: DATA + (16 << 20),
                loaded: DATA + (17 << 20),
                counts: DATA + (18 << 20),
            };
            check_litmus(&test, run_as, page_size);
        }
    }
}

/// One location for each variable, both in one cache line or not: the closest race.
#[test]
fn litmus_tests_on_single_locations() {
    for test in [litmus::SB, litmus::SB_FENCED, litmus::MP, litmus::CORR] {
        for apart in [8, 64, 4096] {
            let run_as = litmus::Run {
                rounds: 1500,
                batch: 1,
                variables: [DATA, DATA + apart],
                stride: 0,
                barrier: DATA + 0x10000,
                loaded: DATA + 0x20000,
                counts: DATA + 0x30000,
            };
            check_litmus(&test, run_as, PageSize::Large);
        }
    }
}

fn counter_run(vcpus: usize, count: u32) -> counter::Run {
    let page = |number: u64| DATA + number * 4096;
    counter::Run {
        vcpus,
        count,
        barrier: page(0),
        counter: page(1),
        twin: page(2),
        lock: page(3),
        results: page(4),
    }
}

#[test]
fn locked_additions_find_every_value_once() {
    for vcpus in [2, 4] {
        let run_as = counter_run(vcpus, 200_000);
        let guest = Builder::new(MEMORY)
            .build(vcpus, |asm, vcpu| counter::locked_add(asm, vcpu, &run_as))
            .unwrap();
        let Some(machine) = run(&guest) else { return };
        let machine = machine.unwrap();
        let n = vcpus as u64 * u64::from(run_as.count);
        assert_eq!(machine.word(run_as.counter), n);
        assert_eq!(
            machine.words(run_as.results, vcpus).iter().sum::<u64>(),
            n * (n - 1) / 2
        );
    }
}

#[test]
fn a_spinlock_keeps_two_counters_equal() {
    for vcpus in [2, 4] {
        let run_as = counter_run(vcpus, 50_000);
        let guest = Builder::new(MEMORY)
            .build(vcpus, |asm, vcpu| counter::spinlock(asm, vcpu, &run_as))
            .unwrap();
        let Some(machine) = run(&guest) else { return };
        let machine = machine.unwrap();
        let n = vcpus as u64 * u64::from(run_as.count);
        assert_eq!((machine.word(run_as.counter), machine.word(run_as.twin)), (n, n));
        assert!(machine.words(run_as.results, vcpus).iter().all(|&errors| errors == 0));
    }
}

#[test]
fn an_exception_is_reported_by_its_vector() {
    for vector in [3, 6, 13, 14] {
        let guest = Builder::new(MEMORY).build(1, |asm, vcpu| {
            match vector {
                3 => asm.int3()?,
                6 => asm.ud2()?,
                13 => asm.hlt()?,
                _ => asm.mov(code_asm::al, code_asm::byte_ptr(MEMORY))?,
            }
            done(asm, vcpu)
        });
        let Some(result) = run(&guest.unwrap()) else { return };
        assert_eq!(result.err(), Some(format!("exception [{vector}]")));
    }
}
