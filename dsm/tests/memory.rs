//! Guest RAM under a real userfaultfd: every transition of a page, seen by threads that touch it
//! and by system calls that touch it from inside the kernel. Needs root or /dev/userfaultfd.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use krg_dsm::memory::{Access, Fault, FaultSource, GuestRam, MemoryError, PAGE_WORDS, UffdMemory};
use krg_dsm::protocol::Memory;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn memory(shards: usize) -> (UffdMemory, Vec<FaultSource>) {
    let ram = GuestRam::new(&[(0, 256 * MIB), (4096 * MIB, 2 * MIB)], true).unwrap();
    UffdMemory::new(Arc::new(ram), shards).unwrap()
}

fn pattern(seed: u64) -> Box<[u64; PAGE_WORDS]> {
    Box::new(std::array::from_fn(|word| seed << 32 | word as u64))
}

fn word(ram: &GuestRam, page: u32, word: usize) -> &AtomicU64 {
    &ram.words(page).unwrap()[word]
}

/// A touch in a thread of its own; its result arrives when it got through.
fn touch<T: Send + 'static>(
    memory: &UffdMemory,
    action: impl FnOnce(&GuestRam) -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let ram = Arc::clone(memory.ram());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(action(&ram)));
    receiver
}

fn one_fault(source: &mut FaultSource) -> Fault {
    let mut faults = Vec::new();
    assert!(source.next_batch(&mut faults).unwrap());
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0]
}

fn waits<T>(receiver: &mpsc::Receiver<T>) -> bool {
    receiver.recv_timeout(Duration::from_millis(30)).is_err()
}

#[test]
fn a_page_goes_through_all_its_states() {
    let (mut memory, mut sources) = memory(1);
    let source = &mut sources[0];
    let page = memory.ram().index_of(4096 * MIB).unwrap() + 3;

    let reader = touch(&memory, move |ram| word(ram, page, 9).load(Ordering::Relaxed));
    let fault = one_fault(source);
    assert_eq!((fault.page, fault.write, fault.protected), (page, false, false));
    assert_eq!(fault.thread != 0, memory.features().thread_id);
    assert!(waits(&reader));
    memory.install(page, &pattern(5), false);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 5 << 32 | 9);
    assert_eq!(memory.access(page), Access::ReadOnly);

    let writer = touch(&memory, move |ram| word(ram, page, 9).store(77, Ordering::Relaxed));
    let fault = one_fault(source);
    assert_eq!((fault.page, fault.write, fault.protected), (page, true, true));
    assert!(waits(&writer));
    assert_eq!(memory.load(page, 9), 5 << 32 | 9);
    memory.unprotect(page);
    writer.recv_timeout(PATIENCE).unwrap();
    assert_eq!(memory.load(page, 9), 77);

    let mut changed = Vec::new();
    memory.differences(page, &pattern(5), &mut changed);
    assert_eq!(changed, [(9, 77)]);
    assert_eq!(memory.compare_exchange(page, 9, 76, 1), Err(77));
    assert_eq!(memory.compare_exchange(page, 9, 77, 78), Ok(77));

    memory.protect(page);
    let writer = touch(&memory, move |ram| word(ram, page, 9).store(79, Ordering::Relaxed));
    assert!(one_fault(source).protected);
    let copy = memory.read(page);
    assert_eq!((copy[9], copy[10]), (78, 5 << 32 | 10));

    // The writer still waits: it must find the page gone, not write to it.
    memory.discard(page);
    memory.wake(page);
    let fault = one_fault(source);
    assert_eq!((fault.page, fault.write, fault.protected), (page, true, false));
    memory.install(page, &copy, true);
    writer.recv_timeout(PATIENCE).unwrap();
    assert_eq!(memory.load(page, 9), 79);
    assert_eq!(memory.failed(), None);
}

#[test]
fn protection_of_a_zero_page_holds() {
    let (mut memory, mut sources) = memory(1);
    memory.install_zeros(7..8);
    memory.protect(7);
    assert_eq!(memory.load(7, 511), 0);
    let writer = touch(&memory, |ram| word(ram, 7, 0).store(1, Ordering::Relaxed));
    assert!(one_fault(&mut sources[0]).protected);
    assert!(waits(&writer));
    memory.unprotect(7);
    writer.recv_timeout(PATIENCE).unwrap();
    memory.install_zeros(8..100);
    word(memory.ram(), 8, 0).store(1, Ordering::Relaxed);
    assert_eq!([memory.load(7, 0), memory.load(8, 0), memory.load(99, 511)], [1, 1, 0]);
    assert_eq!((memory.access(99), memory.access(100)), (Access::Writable, Access::Absent));
}

#[test]
fn a_wake_without_a_page_faults_again() {
    let (mut memory, mut sources) = memory(1);
    let reader = touch(&memory, |ram| word(ram, 1, 0).load(Ordering::Relaxed));
    let first = one_fault(&mut sources[0]);
    memory.wake(1);
    assert_eq!(one_fault(&mut sources[0]), first);
    memory.install(1, &pattern(1), false);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 1 << 32);
}

#[test]
fn system_calls_fault_like_the_guest() {
    let (mut memory, mut sources) = memory(1);
    let (mut from, mut to) = UnixStream::pair().unwrap();
    to.write_all(&[0xab; 4096]).unwrap();

    // read(2) into an absent page, as a device or KVM's emulator would.
    let fd = from.as_raw_fd();
    let reader = touch(&memory, move |ram| {
        let address = ram.host_of(20).unwrap();
        // SAFETY: the page is mapped guest RAM, which may change at any time.
        unsafe { libc::read(fd, address as *mut _, 4096) }
    });
    let fault = one_fault(&mut sources[0]);
    assert_eq!((fault.page, fault.write, fault.protected), (20, true, false));
    memory.install_zeros(20..21);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 4096);
    assert_eq!(memory.load(20, 511), 0xabab_abab_abab_abab);

    // The same into a read-only page.
    memory.protect(20);
    to.write_all(&[0xcd; 8]).unwrap();
    let reader = touch(&memory, move |ram| {
        let address = ram.host_of(20).unwrap();
        // SAFETY: as above.
        unsafe { libc::read(fd, address as *mut _, 8) }
    });
    assert!(one_fault(&mut sources[0]).protected);
    memory.unprotect(20);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 8);
    assert_eq!(memory.load(20, 0), 0xcdcd_cdcd_cdcd_cdcd);

    // write(2) from an absent page.
    memory.discard(20);
    let fd = to.as_raw_fd();
    let writer = touch(&memory, move |ram| {
        let address = ram.host_of(20).unwrap();
        // SAFETY: as above.
        unsafe { libc::write(fd, address as *const _, 8) }
    });
    assert!(!one_fault(&mut sources[0]).write);
    memory.install(20, &pattern(0), false);
    assert_eq!(writer.recv_timeout(PATIENCE).unwrap(), 8);
    let mut sent = [1; 8];
    from.read_exact(&mut sent).unwrap();
    assert_eq!(sent, [0; 8]);
    assert_eq!(memory.failed(), None);
}

#[test]
fn what_was_written_before_belongs_to_nobody() {
    let ram = Arc::new(GuestRam::new(&[(0, MIB)], true).unwrap());
    word(&ram, 2, 0).store(1, Ordering::Relaxed);
    let (mut memory, mut sources) = UffdMemory::new(ram, 1).unwrap();
    let reader = touch(&memory, |ram| word(ram, 2, 0).load(Ordering::Relaxed));
    assert_eq!(one_fault(&mut sources[0]).page, 2);
    memory.install(2, &pattern(3), false);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 3 << 32);
}

#[test]
fn broken_requests_are_kept_and_change_nothing() {
    type Break = fn(&mut UffdMemory);
    let state = |page, operation, access| MemoryError::State {
        page,
        operation,
        access,
    };
    let bounds = |page, word| MemoryError::Bounds {
        page,
        word,
        pages: 66048,
    };
    let cases: [(Break, MemoryError); 10] = [
        (|m| drop(m.read(1)), state(1, "read", Access::Absent)),
        (|m| m.protect(1), state(1, "protect", Access::Absent)),
        (|m| m.discard(1), state(1, "discard", Access::Absent)),
        (|m| assert_eq!(m.load(1, 0), 0), state(1, "load", Access::Absent)),
        (
            |m| m.differences(1, &pattern(0), &mut Vec::new()),
            state(1, "compare", Access::Absent),
        ),
        (
            |m| m.install(2, &pattern(9), true),
            state(2, "install", Access::ReadOnly),
        ),
        (
            |m| assert_eq!(m.compare_exchange(2, 0, 1, 2), Ok(1)),
            state(2, "compare and exchange", Access::ReadOnly),
        ),
        (|m| m.install_zeros(66048..66049), bounds(66048, 0)),
        (|m| m.install_zeros(1..3), state(2, "install", Access::ReadOnly)),
        (|m| assert_eq!(m.load(2, 512), 0), bounds(2, 512)),
    ];
    for (broken, expected) in cases {
        let (mut memory, _sources) = memory(1);
        memory.install(2, &pattern(2), false);
        broken(&mut memory);
        memory.discard(3);
        assert_eq!(memory.failed(), Some(expected));
        assert_eq!((memory.access(1), memory.access(2)), (Access::Absent, Access::ReadOnly));
        assert_eq!(memory.load(2, 0), 2 << 32);
    }
}

#[test]
fn ram_of_a_single_host_is_not_shared() {
    let ram = Arc::new(GuestRam::new(&[(0, MIB)], false).unwrap());
    assert!(matches!(UffdMemory::new(ram, 1), Err(MemoryError::NotCoherent)));
}

#[test]
fn stop_ends_the_stream_even_with_faults_waiting() {
    let (memory, mut sources) = memory(1);
    let mut source = sources.remove(0);
    let stop = source.stopper();
    let answering = thread::spawn(move || {
        let mut faults = Vec::new();
        let mut batches = 0;
        while source.next_batch(&mut faults).unwrap() {
            batches += 1;
        }
        assert!(faults.is_empty());
        batches
    });
    thread::sleep(Duration::from_millis(50));
    let reader = touch(&memory, |ram| word(ram, 2, 0).load(Ordering::Relaxed));
    assert!(waits(&reader));
    let asked = Instant::now();
    stop.stop();
    assert_eq!(answering.join().unwrap(), 1);
    assert!(asked.elapsed() < Duration::from_secs(5));
    // Coherence ends here; whoever still waits must not hang.
    drop((memory, sources));
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 0);
}

/// Answers faults as the only node would: absent pages are zero, protected ones become writable.
fn serve(memory: &Arc<Mutex<UffdMemory>>, mut source: FaultSource) -> JoinHandle<u64> {
    let memory = Arc::clone(memory);
    thread::spawn(move || {
        let (mut faults, mut count) = (Vec::new(), 0);
        while source.next_batch(&mut faults).unwrap() {
            let mut memory = memory.lock().unwrap();
            for fault in &faults {
                count += 1;
                match (memory.access(fault.page), fault.write) {
                    (Access::Absent, false) => memory.install(fault.page, &[0; 512], false),
                    (Access::Absent, true) => memory.install_zeros(fault.page..fault.page + 1),
                    (Access::ReadOnly, true) => memory.unprotect(fault.page),
                    _ => memory.wake(fault.page),
                }
            }
        }
        count
    })
}

#[test]
fn no_increment_is_lost_while_pages_come_and_go() {
    const PAGES: u32 = 8;
    const THREADS: usize = 3;
    const ROUNDS: u64 = 3000;
    for shards in [1, 2] {
        let (memory, sources) = memory(shards);
        let ram = Arc::clone(memory.ram());
        let memory = Arc::new(Mutex::new(memory));
        let stops: Vec<_> = sources.iter().map(FaultSource::stopper).collect();
        let servers: Vec<_> = sources.into_iter().map(|source| serve(&memory, source)).collect();
        // 64 MiB apart: with two shards, neighbours are on different descriptors.
        let pages: Vec<u32> = (0..PAGES).map(|page| page % 2 * (64 << 8) + page).collect();
        let writers: Vec<_> = (0..THREADS)
            .map(|_| {
                let (ram, pages) = (Arc::clone(&ram), pages.clone());
                thread::spawn(move || {
                    for round in 0..ROUNDS {
                        let page = pages[round as usize % pages.len()];
                        word(&ram, page, round as usize % PAGE_WORDS).fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut turn = 0;
        while writers.iter().any(|writer| !writer.is_finished()) {
            let page = pages[turn % pages.len()];
            let mut memory = memory.lock().unwrap();
            match memory.access(page) {
                Access::Absent => {}
                _ if turn % 3 == 0 => memory.protect(page),
                // Away and back, content kept: frozen first, or a write between would be lost.
                _ => {
                    memory.protect(page);
                    let content = memory.read(page);
                    memory.discard(page);
                    memory.install(page, &content, false);
                }
            }
            assert_eq!(memory.failed(), None);
            turn += 1;
            drop(memory);
            thread::yield_now();
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stops.iter().for_each(|stop| stop.stop());
        let faults: u64 = servers.into_iter().map(|server| server.join().unwrap()).sum();
        assert!(faults >= u64::from(PAGES));
        let memory = memory.lock().unwrap();
        let total: u64 = pages
            .iter()
            .map(|page| (0..PAGE_WORDS).map(|word| memory.load(*page, word)).sum::<u64>())
            .sum();
        assert_eq!(total, THREADS as u64 * ROUNDS);
    }
}

#[test]
fn a_saved_state_comes_back() {
    let (mut memory, _sources) = memory(1);
    memory.install(4, &pattern(4), true);
    memory.install(5, &pattern(5), false);
    memory.install(6, &pattern(6), false);
    let state = memory.save();
    assert_eq!(state.runs, [(4, 1, Access::Writable), (5, 2, Access::ReadOnly)]);
    let (mut other, _other_sources) = self::memory(2);
    other.restore(&state, |page| memory.read(page)).unwrap();
    assert_eq!(other.save(), state);
    assert_eq!(other.read(6), pattern(6));

    let (mut other, _other_sources) = self::memory(1);
    let mut wrong = state.clone();
    wrong.runs[0].1 = u32::MAX;
    assert!(matches!(
        other.restore(&wrong, |_| pattern(0)),
        Err(MemoryError::Saved { .. })
    ));
    wrong = state.clone();
    wrong.version = 2;
    assert!(matches!(
        other.restore(&wrong, |_| pattern(0)),
        Err(MemoryError::Saved { .. })
    ));
    wrong = state;
    wrong.ranges.pop();
    assert!(matches!(
        other.restore(&wrong, |_| pattern(0)),
        Err(MemoryError::Saved { .. })
    ));
    assert_eq!(other.save().runs, []);
}
