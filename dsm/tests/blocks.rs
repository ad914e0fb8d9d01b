//! Private blocks under a real userfaultfd: taken by one fault, mapped by a huge page, given back page by
//! page, merged again. Needs root or /dev/userfaultfd; what is said of huge pages is left out where the
//! host has them switched off.

use std::fs;
use std::sync::{Arc, Mutex};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use krg_dsm::memory::{Access, BLOCK_PAGES, BlockCounters, FaultSource, GuestRam, PAGE_WORDS, UffdMemory};
use krg_dsm::protocol::{BlockData, Memory};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn memory(mib: u64) -> (UffdMemory, Vec<FaultSource>) {
    let ram = GuestRam::new(&[(0, mib * MIB)], true).unwrap();
    UffdMemory::new(Arc::new(ram), 1).unwrap()
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

fn store(ram: &GuestRam, page: u32, word: usize, value: u64) {
    ram.words(page).unwrap()[word].store(value, Ordering::SeqCst);
}

fn load(ram: &GuestRam, page: u32, word: usize) -> u64 {
    ram.words(page).unwrap()[word].load(Ordering::SeqCst)
}

/// Whether the kernel makes huge pages for those who ask.
fn huge_pages() -> bool {
    fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|text| !text.contains("[never]"))
}

/// The process's mappings that overlap the RAM: how many, and KiB in huge pages.
fn mappings(ram: &GuestRam) -> (usize, u64) {
    let (start, end) = (ram.host_of(0).unwrap(), ram.host_of(ram.pages() - 1).unwrap() + 4096);
    let (mut count, mut huge, mut inside) = (0, 0, false);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            inside = address(from) < end && address(to) > start;
            count += usize::from(inside);
        } else if inside && first == "AnonHugePages:" {
            huge += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    (count, huge)
}

fn faults_waiting(source: &mut FaultSource) -> usize {
    // The stream's end is asked for in time, so that no fault is no hang.
    let stop = source.stopper();
    let timer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        stop.stop();
    });
    let mut faults = Vec::new();
    let some = source.next_batch(&mut faults).unwrap();
    let count = faults.len();
    timer.join().unwrap();
    if some { count } else { 0 }
}

#[test]
fn one_fault_takes_a_block_and_the_kernel_maps_it_by_one_huge_page() {
    let (mut memory, mut sources) = memory(8);
    let writer = touch(&memory, |ram| store(ram, 700, 3, 7));
    let mut faults = Vec::new();
    assert!(sources[0].next_batch(&mut faults).unwrap());
    assert_eq!(faults[0].page, 700);
    memory.install_zeros(512..1024);
    writer.recv_timeout(PATIENCE).unwrap();
    let everywhere = touch(&memory, |ram| (512..1024).map(|page| ram.words(page).unwrap()[0].fetch_add(1, Ordering::SeqCst)).sum::<u64>());
    assert_eq!(everywhere.recv_timeout(PATIENCE).unwrap(), 0);
    assert_eq!(faults_waiting(&mut sources[0]), 0, "a private block faults no more");
    assert_eq!((load(memory.ram(), 700, 3), memory.access(700), memory.access(511)), (7, Access::Writable, Access::Absent));
    assert_eq!(memory.block_counters(), BlockCounters { private: 1, taken: 1, ..BlockCounters::default() });
    if huge_pages() {
        assert_eq!(mappings(memory.ram()).1, 2048);
    }
    assert_eq!(memory.failed(), None);
}

#[test]
fn a_private_block_is_given_away_page_by_page() {
    let (mut memory, mut sources) = memory(8);
    memory.install_zeros(512..1024);
    store(memory.ram(), 512, 0, 5);
    store(memory.ram(), 600, 1, 6);
    // As the protocol gives a page away: frozen, read, dropped.
    memory.protect(600);
    let counters = memory.block_counters();
    assert_eq!((counters.private, counters.splits), (0, 1));
    assert_eq!(mappings(memory.ram()).1, 0, "a protected page needs a mapping of its own");
    assert_eq!(memory.read(600)[1], 6);
    // A page nobody ever touched is there, and is zero.
    memory.protect(601);
    assert!(memory.read(601).iter().all(|word| *word == 0));
    memory.discard(600);

    let writer = touch(&memory, |ram| store(ram, 601, 0, 1));
    let reader = touch(&memory, |ram| load(ram, 600, 1));
    let mut pages = Vec::new();
    while pages.len() < 2 {
        let mut faults = Vec::new();
        assert!(sources[0].next_batch(&mut faults).unwrap());
        pages.extend(faults.iter().map(|fault| (fault.page, fault.protected)));
    }
    pages.sort_unstable();
    assert_eq!(pages, [(600, false), (601, true)]);
    memory.unprotect(601);
    memory.install(600, &[9; 512], false);
    writer.recv_timeout(PATIENCE).unwrap();
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 9);
    // The others are as they were, and need nobody.
    let others = touch(&memory, |ram| (512..1024).filter(|page| *page != 600).map(|page| ram.words(page).unwrap()[0].fetch_add(1, Ordering::SeqCst)).sum::<u64>());
    assert_eq!(others.recv_timeout(PATIENCE).unwrap(), 5 + 1);
    assert_eq!(faults_waiting(&mut sources[0]), 0);
    assert_eq!(memory.failed(), None);
}

#[test]
fn a_block_whose_pages_are_all_ours_for_long_is_merged_with_its_content() {
    let (mut memory, mut sources) = memory(8);
    let ours = |_: u32| true;
    for page in 0..512 {
        memory.install(page, &[u64::from(page); 512], true);
    }
    let blocks = memory.blocks();
    for round in 0..3 {
        assert!(memory.merge_quiet(blocks, 3, ours).is_empty(), "round {round}");
    }
    // Somebody asks for a page: from the start again.
    memory.protect(5);
    memory.unprotect(5);
    for _ in 0..3 {
        assert!(memory.merge_quiet(blocks, 3, ours).is_empty());
    }
    assert!(memory.merge_quiet(blocks, 3, |page| page != 17).is_empty(), "others have a page");
    assert_eq!(memory.merge_quiet(blocks, 3, ours), [0]);
    let collapsed = memory.ram().collapse(0);
    assert_eq!(memory.block_counters(), BlockCounters { private: 1, merges: 1, ..BlockCounters::default() });
    if huge_pages() && collapsed {
        assert_eq!(mappings(memory.ram()).1, 2048);
    }
    let content = touch(&memory, |ram| (0..512).all(|page| load(ram, page, 100) == u64::from(page)));
    assert!(content.recv_timeout(PATIENCE).unwrap());
    assert_eq!(faults_waiting(&mut sources[0]), 0);

    memory.protect(511);
    assert_eq!((memory.read(511)[0], memory.load(0, 9), memory.block_counters().splits), (511, 0, 1));
    assert_eq!(memory.failed(), None);
}

#[test]
fn neighbours_of_one_kind_are_one_mapping() {
    let (mut memory, _sources) = memory(128);
    let count = memory.ram().pages() / BLOCK_PAGES;
    for block in (0..count).step_by(2).chain((1..count).step_by(2)) {
        memory.install_zeros(block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES);
        store(memory.ram(), block * BLOCK_PAGES, 0, 1);
    }
    assert_eq!((memory.block_counters().private, mappings(memory.ram()).0), (64, 1));
    for block in 8..16 {
        memory.protect(block * BLOCK_PAGES + 1);
    }
    assert_eq!((memory.block_counters().private, mappings(memory.ram()).0), (56, 3));
    assert_eq!(memory.failed(), None);
}

#[test]
fn a_saved_state_has_private_blocks_as_pages() {
    let (mut memory, _sources) = memory(8);
    memory.install_zeros(512..1024);
    store(memory.ram(), 1000, 0, 3);
    let state = memory.save();
    assert_eq!(state.runs, [(512, 512, Access::Writable)]);
    let (mut other, _other_sources) = self::memory(8);
    other.restore(&state, |page| memory.read(page)).unwrap();
    assert_eq!((other.load(1000, 0), other.load(1001, 0), other.save()), (3, 0, state));
}

/// The content of a block in memory that can be moved.
fn movable(memory: &UffdMemory, value: u64) -> BlockData<PAGE_WORDS> {
    let mut slot = memory.slots().take().unwrap();
    slot.pages_mut().iter_mut().zip(value..).for_each(|(page, value)| page.fill(value));
    BlockData::new(slot)
}

/// Whether all pages of a block hold what [`movable`] made.
fn holds(ram: &GuestRam, block: u32, value: u64) -> bool {
    let first = block * BLOCK_PAGES;
    (0..BLOCK_PAGES).all(|n| [0, 511].iter().all(|word| load(ram, first + n, *word) == value + u64::from(n)))
}

#[test]
fn a_block_that_comes_whole_is_one_huge_page_and_wakes_who_waits() {
    let (mut memory, mut sources) = memory(8);
    // What was there before leaves a page table behind.
    memory.install(600, &[1; 512], true);
    memory.discard(600);
    let reader = touch(&memory, |ram| load(ram, 600, 5));
    let mut faults = Vec::new();
    assert!(sources[0].next_batch(&mut faults).unwrap());
    let data = movable(&memory, 1000);
    memory.install_block(512, data);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 1000 + 88);
    let content = touch(&memory, |ram| holds(ram, 1, 1000) && (512..1024).all(|page| ram.words(page).unwrap()[7].fetch_add(1, Ordering::SeqCst) > 0));
    assert!(content.recv_timeout(PATIENCE).unwrap());
    assert_eq!(faults_waiting(&mut sources[0]), 0, "it is to be written, too");
    if huge_pages() && memory.takes_block(1) {
        assert_eq!(mappings(memory.ram()).1, 2048);
    }
    // Page by page it is as any other.
    memory.protect(700);
    memory.discard(701);
    assert_eq!((memory.read(700)[0], memory.access(701)), (1188, Access::Absent));
    // From memory that is not to be moved, and where a page is there already.
    memory.install_block(0, BlockData::new(vec![[3; 512]; 512]));
    assert_eq!((load(memory.ram(), 511, 511), memory.failed()), (3, None));
    let data = movable(&memory, 1);
    memory.install_block(512, data);
    assert!(memory.failed().is_some());
}

#[test]
fn a_block_that_leaves_whole_is_gone_at_once_and_its_memory_goes_along() {
    let (mut memory, mut sources) = memory(8);
    // A private block, one of single pages, and one that came whole.
    memory.install_zeros(512..1024);
    store(memory.ram(), 700, 3, 7);
    for page in 1024..1536 {
        memory.install(page, &[u64::from(page); 512], true);
    }
    let data = movable(&memory, 50);
    memory.install_block(1536, data);
    let out = memory.take_out(512..1024);
    assert_eq!((out.pages()[188][3], out.pages()[189][3], out.pages().len()), (7, 0, 512));
    let single = memory.take_out(1024..1536);
    assert!(single.pages().iter().zip(1024..).all(|(page, value)| *page == [value; 512]));
    let whole = memory.take_out(1536..2048);
    assert_eq!((whole.pages()[0], whole.pages()[511]), ([50; 512], [561; 512]));
    assert_eq!((memory.access(512), memory.access(2047)), (Access::Absent, Access::Absent));
    assert_eq!(mappings(memory.ram()).1, 0);
    let reader = touch(&memory, |ram| load(ram, 700, 3));
    let mut faults = Vec::new();
    assert!(sources[0].next_batch(&mut faults).unwrap());
    assert_eq!(faults[0].page, 700);
    memory.install_block(512, single);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap(), 1024 + 188);
    drop((out, whole));
    assert_eq!(memory.failed(), None);
    memory.take_out(0..512);
    assert!(memory.failed().is_some(), "it is not there");
}

/// A block of which others read some pages leaves as well, and one that comes takes the place of copies.
#[test]
fn blocks_of_which_some_pages_are_read_only_leave_and_come() {
    // Alone among what was never there, which is copied, and with neighbours like it.
    for blocks in [1..2, 0..4] {
        let (mut memory, mut sources) = memory(8);
        memory.install_zeros(blocks.start * BLOCK_PAGES..blocks.end * BLOCK_PAGES);
        (512..1024).for_each(|page| store(memory.ram(), page, 9, u64::from(page)));
        blocks.clone().for_each(|block| memory.protect(block * BLOCK_PAGES + 5));
        memory.protect_range(600..700);
        let out = memory.take_out(512..1024);
        assert!(out.pages().iter().zip(512..).all(|(page, value)| page[9] == value));
        assert_eq!((memory.access(517), memory.access(1023)), (Access::Absent, Access::Absent));
        // Some pages of it are read here, all the time.
        let copies: Vec<[u64; PAGE_WORDS]> = (522..586).map(|page| [page; PAGE_WORDS]).collect();
        memory.install_range(522, &copies, false);
        let reader = touch(&memory, |ram| (0..200_000).all(|n| load(ram, 522 + n % 64, 511) == u64::from(522 + n % 64)));
        let data = movable(&memory, 512);
        let (stop, ram) = (sources[0].stopper(), Arc::clone(memory.ram()));
        let memory = Mutex::new(memory);
        thread::scope(|scope| {
            // Who finds a page absent while it is replaced looks again.
            scope.spawn(|| {
                let mut faults = Vec::new();
                while sources[0].next_batch(&mut faults).unwrap() {
                    faults.iter().for_each(|fault| memory.lock().unwrap().wake(fault.page));
                }
            });
            let mut replaced = memory.lock().unwrap();
            replaced.discard_run(522..586);
            replaced.install_block(512, data);
            drop(replaced);
            assert!(reader.recv_timeout(PATIENCE).unwrap(), "a copy and the block that took its place hold the same");
            stop.stop();
        });
        assert!(holds(&ram, 1, 512));
        assert_eq!(memory.into_inner().unwrap().failed(), None);
    }
}

/// Blocks go and come, in any order, and none is left with a mapping of its own.
#[test]
fn blocks_that_went_and_came_are_mapped_with_their_neighbours() {
    let (mut memory, _sources) = memory(64);
    let count = memory.ram().pages() / BLOCK_PAGES;
    for block in 0..count {
        memory.install_zeros(block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES);
        store(memory.ram(), block * BLOCK_PAGES, 0, u64::from(block));
    }
    assert_eq!(mappings(memory.ram()).0, 1);
    for step in [3, 5, 7] {
        for n in 0..count - 1 {
            let block = n * step % count;
            let first = block * BLOCK_PAGES;
            let data = memory.take_out(first..first + BLOCK_PAGES);
            assert_eq!(data.pages()[0][0], u64::from(block), "step {step}");
            memory.install_block(first, data);
        }
        for _ in 0..2 {
            let blocks = memory.blocks();
            memory.merge_quiet(blocks, 1, |_| true);
        }
        let counters = memory.block_counters();
        println!("{counters:?}, {} mappings", mappings(memory.ram()).0);
        assert_eq!((counters.private, memory.failed()), (u64::from(count), None));
    }
    assert!(mappings(memory.ram()).0 <= 3, "{} mappings", mappings(memory.ram()).0);
}
