//! Pages asked for ahead of need, between two nodes in one process, told by their counters.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use krg_dsm::lending::LendingCounters;
use krg_dsm::memory::GuestRam;
use krg_dsm::node::{Client, Dsm, DsmError, Start, TABLES_REST};
use krg_dsm::protocol::Counters;
use krg_dsm::transport::{Config, Streams, TcpTransport, Transport};

/// Pages of each node.
const PAGES: u32 = 8192;
const BYTES: u64 = PAGES as u64 * 4096;

#[derive(Default)]
struct Guest(Mutex<Vec<DsmError>>);

impl Client for Guest {
    fn machine(&self, _: usize, _: &[u8]) {}
    fn setup(&self, _: usize, _: &[u8]) {}
    fn roots(&self) -> Vec<u64> {
        Vec::new()
    }
    fn failed(&self, error: DsmError) {
        self.0.lock().unwrap().push(error);
    }
}

struct Node {
    dsm: Arc<Dsm>,
    transport: Arc<TcpTransport>,
    guest: Arc<Guest>,
}

impl Node {
    fn new(me: usize, streams: Streams, room: u32) -> Self {
        let ram = Arc::new(GuestRam::new(&[(0, 2 * BYTES)], true).unwrap());
        let mut peers = vec![None, None];
        peers[1 - me] = Some(streams);
        let transport = Arc::new(TcpTransport::new(peers, Config::default()).unwrap());
        let guest = Arc::new(Guest::default());
        let dsm = Dsm::new(me, ram, transport.clone());
        transport.start(dsm.handler(guest.clone())).unwrap();
        let start = Start { me, shares: vec![BYTES; 2], preloaded: vec![], image: 0..0, replicate: false, tables_rest: TABLES_REST, bug: None, cache: u64::from(room) << 12, merge_after: Duration::from_secs(10) };
        dsm.start(start).unwrap();
        Node { dsm, transport, guest }
    }

    fn word(&self, page: u32) -> &AtomicU64 {
        &self.dsm.ram().words(page).unwrap()[0]
    }

    fn counters(&self) -> Counters {
        self.dsm.counters().unwrap().0
    }

    /// Bytes that came from the other node.
    fn bytes_in(&self) -> u64 {
        [0, 1].map(|node| self.transport.count(node).total().bytes_in).iter().sum()
    }
}

/// Node 0, and node 1, which has written to every page homed with it: its number.
fn two() -> [Node; 2] {
    with_room(u32::MAX)
}

/// The same with room for so many copies at each.
fn with_room(pages: u32) -> [Node; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0);
    let ((near, far), (near_blocks, far_blocks)) = (pair(), pair());
    let near = Streams { messages: near, blocks: Some(near_blocks) };
    let far = Streams { messages: far, blocks: Some(far_blocks) };
    let nodes = [Node::new(0, near, pages), Node::new(1, far, pages)];
    for page in PAGES..2 * PAGES {
        nodes[1].word(page).store(u64::from(page), SeqCst);
    }
    nodes
}

fn stop(nodes: [Node; 2]) {
    for node in &nodes {
        assert_eq!(*node.guest.0.lock().unwrap(), []);
    }
    for node in &nodes {
        node.dsm.stop();
        node.transport.shutdown();
    }
}

struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn reads(nodes: &[Node; 2], pages: impl Iterator<Item = u32>) {
    for page in pages {
        assert_eq!(nodes[0].word(page).load(SeqCst), u64::from(page), "page {page}");
    }
}

/// Adds to a word of each page, as whoever overwrites what is there.
fn writes(node: &Node, pages: impl Iterator<Item = u32>) {
    for page in pages {
        node.word(page).fetch_add(1 << 32, SeqCst);
    }
}

#[test]
fn streams_of_writes_take_memory_nobody_wrote_without_data() {
    for (name, from, step, count) in [("upwards", 0, 1, PAGES), ("every third", 0, 3, 2700), ("downwards", PAGES as i32 - 1, -1, PAGES)] {
        let nodes = two();
        let page = |n: u32| (from + n as i32 * step) as u32;
        // Home has written a little of it.
        nodes[0].word(page(700)).store(5, SeqCst);
        writes(&nodes[1], (0..count).map(page));
        let (c, home) = (nodes[1].counters(), nodes[0].counters());
        println!("{name}: {count} pages, {} faults, {} asked for, {} not given, {} blocks", c.write_faults, c.prefetches, c.prefetches_refused, c.blocks_in);
        assert!(c.write_faults < u64::from(count) / 10, "{name}: {} faults for {count} pages", c.write_faults);
        // Where home wrote it may have taken a whole block, and that goes with what it holds.
        assert!(c.pages_in <= 512 && home.pages_out <= 512, "{name}: {} pages with data", c.pages_in);
        let bytes = nodes[1].bytes_in();
        assert!(bytes < c.pages_in * 4200 + u64::from(count) * 64, "{name}: {bytes} bytes came for {} pages with data", c.pages_in);
        assert!(c.blocks_in >= 12 || step == 3, "{name}: {} of 16 blocks came whole", c.blocks_in);
        for n in 0..count {
            assert_eq!(nodes[0].word(page(n)).load(SeqCst), 1 << 32 | if n == 700 { 5 } else { 0 }, "{name}: page {}", page(n));
        }
        stop(nodes);
    }
}

#[test]
fn streams_of_reads_of_memory_nobody_wrote_bring_no_data() {
    for (name, step, count) in [("all", 1, PAGES), ("every third", 3, 2700)] {
        let nodes = two();
        for page in (0..count).map(|n| n * step) {
            assert_eq!(nodes[1].word(page).load(SeqCst), 0, "{name}: page {page}");
        }
        let (c, bytes) = (nodes[1].counters(), nodes[1].bytes_in());
        println!("{name}: {count} pages, {} faults, {} asked for, {} not given, {} blocks, {bytes} bytes", c.read_faults, c.prefetches, c.prefetches_refused, c.blocks_in);
        assert_eq!((c.pages_in, nodes[0].counters().pages_out), (0, 0), "{name}");
        assert!(bytes < u64::from(count) * 64, "{name}: {bytes} bytes");
        stop(nodes);
    }
}

#[test]
fn streams_of_writes_take_what_others_wrote_once_they_are_long() {
    let nodes = two();
    writes(&nodes[0], PAGES..PAGES + 30);
    let c = nodes[0].counters();
    // A fault may find its page asked for already, and about to be refused.
    assert!(c.write_faults <= 30 && c.pages_in == 30, "thirty pages may be all: {c:?}");
    writes(&nodes[0], PAGES + 30..2 * PAGES);
    let c = nodes[0].counters();
    println!("{} faults, {} asked for, {} not given, {} blocks", c.write_faults, c.prefetches, c.prefetches_refused, c.blocks_in);
    let moves = nodes[0].dsm.moves_blocks();
    assert!(c.write_faults < if moves { 200 } else { 1000 }, "{} faults for {PAGES} pages", c.write_faults);
    assert!(c.blocks_in >= 12 || !moves, "{} blocks", c.blocks_in);
    // And back: home asks their owner for them, before its writer comes there.
    writes(&nodes[1], PAGES..2 * PAGES);
    let home = nodes[1].counters();
    let lent = nodes[1].dsm.lending();
    println!("back: {} faults, {} asked for, {} blocks; {lent:?}", home.write_faults, home.prefetches, home.blocks_in);
    // What home wrote at first were faults, too, a group of pages at a time.
    assert!(home.write_faults < if moves { 300 } else { 1600 }, "{} faults for {PAGES} pages", home.write_faults);
    assert!(!moves || (home.blocks_in >= 12 && home.blocks_in == lent.taken_back), "{} blocks", home.blocks_in);
    assert_eq!(nodes[0].counters().blocks_out, home.blocks_in);
    for page in PAGES..2 * PAGES {
        assert_eq!(nodes[0].word(page).load(SeqCst), u64::from(page) + (2 << 32), "page {page}");
    }
    stop(nodes);
}

#[test]
fn streams_take_far_fewer_faults_than_pages() {
    for (name, from, step, count) in [("upwards", 0, 1, 4096), ("every third", 0, 3, 1300), ("downwards", PAGES as i32 - 1, -1, 4096)] {
        let nodes = two();
        reads(&nodes, (0..count).map(|n| (PAGES as i32 + from + n * step) as u32));
        let (c, accuracy) = (nodes[0].counters(), nodes[0].dsm.accuracy());
        println!("{name}: {count} pages, {} faults, {} asked for, {} not given, {accuracy:?}", c.read_faults, c.prefetches, c.prefetches_refused);
        assert!(c.read_faults < count as u64 / 10, "{name}: {} faults for {count} pages", c.read_faults);
        // Whether pages of whole blocks were used is only seen at the next fault, which may never come.
        assert!(accuracy.used + c.blocks_in * 512 > count as u64 / 3, "{name}: {accuracy:?}, {} blocks", c.blocks_in);
        stop(nodes);
    }
}

/// All 32 MiB of node 1. Blocks are what a kernel that can move memory asks for.
#[test]
fn long_streams_take_whole_blocks() {
    for (name, downwards) in [("upwards", false), ("downwards", true)] {
        let nodes = two();
        let page = |n| if downwards { 2 * PAGES - 1 - n } else { PAGES + n };
        reads(&nodes, (0..PAGES).map(page));
        let (near, far, lent) = (nodes[0].counters(), nodes[1].counters(), nodes[1].dsm.lending());
        println!("{name}: {} faults, {} blocks asked for, {} came; {lent:?}", near.read_faults + near.stale_faults, near.blocks_asked, near.blocks_in);
        if !nodes[0].dsm.moves_blocks() {
            assert_eq!((near.blocks_asked, far.blocks_out), (0, 0));
            return stop(nodes);
        }
        assert!(near.blocks_in >= 12, "{name}: {} of 16 blocks came whole", near.blocks_in);
        assert_eq!((near.blocks_in, near.blocks_refused), (far.blocks_out, 0));
        assert_eq!(lent, LendingCounters { given: far.blocks_out, ..LendingCounters::default() });
        assert!(near.read_faults < 300, "{name}: {} faults", near.read_faults);
        // They are node 0's to write, and node 1's again when it asks.
        let last = page(PAGES - 1);
        nodes[0].word(last).store(1, SeqCst);
        assert_eq!(nodes[0].counters().upgrade_faults, 0);
        assert_eq!(nodes[1].word(last).load(SeqCst), 1);
        assert_eq!(nodes[1].word(last ^ 1).fetch_add(1, SeqCst), u64::from(last ^ 1));
        assert_eq!(nodes[0].word(last ^ 1).load(SeqCst), u64::from(last ^ 1) + 1);
        let lent = nodes[1].dsm.lending();
        assert_eq!((lent.wanted_back, lent.contested), (1, 1));
        stop(nodes);
    }
}

/// Both nodes go through the same pages and write to all of them, again and again.
#[test]
fn blocks_that_both_nodes_use_lose_nothing() {
    let nodes = two();
    const ROUNDS: u64 = 6;
    std::thread::scope(|scope| {
        for (n, node) in nodes.iter().enumerate() {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    for page in PAGES..PAGES + 3072 {
                        assert!(node.word(page).load(SeqCst) >= u64::from(page));
                        if round % 2 == n as u64 {
                            node.word(page).fetch_add(1 << 32, SeqCst);
                        }
                    }
                }
            });
        }
    });
    for page in PAGES..PAGES + 3072 {
        assert_eq!(nodes[1].word(page).load(SeqCst), u64::from(page) + (ROUNDS << 32), "page {page}");
    }
    let (near, lent) = (nodes[0].counters(), nodes[1].dsm.lending());
    println!("{} blocks asked for, {} came, {} pages in; {lent:?}", near.blocks_asked, near.blocks_in, near.pages_in);
    stop(nodes);
}

/// A stream takes no block for which there is no room.
#[test]
fn streams_take_no_blocks_without_room() {
    let nodes = with_room(1024);
    reads(&nodes, PAGES..2 * PAGES);
    let (c, copies) = (nodes[0].counters(), nodes[0].dsm.copies());
    let traffic = nodes[0].dsm.traffic(1).class(krg_dsm::node::PROTOCOL);
    let messages = traffic.frames_out + traffic.frames_in;
    println!("{} faults, {} evictions, {messages} messages, {copies:?}", c.read_faults, c.evictions);
    assert_eq!((c.blocks_asked, copies.overruns), (0, 0));
    // By the page two for each eviction alone.
    assert!(messages < c.evictions, "{messages} messages for {} evictions", c.evictions);
    stop(nodes);
}

/// Room for less than the stream, but for blocks: they go home, to make room for more, before the stream needs it.
#[test]
fn blocks_make_room_like_any_copies() {
    let nodes = with_room(4096);
    for round in 0..3 {
        let begun = Instant::now();
        reads(&nodes, PAGES..2 * PAGES);
        let took = begun.elapsed();
        let (c, copies) = (nodes[0].counters(), nodes[0].dsm.copies());
        println!("round {round}: {took:?}, {} blocks, {} faults, {} evictions, {copies:?}", c.blocks_in, c.read_faults, c.evictions);
        assert!(copies.peak <= 4096 + 4096 / 16 + 64 + 512, "{copies:?}");
        assert_eq!(copies.overruns, 0);
    }
    let c = nodes[0].counters();
    assert!(c.evictions > 0 && (c.blocks_in > 0) == nodes[0].dsm.moves_blocks());
    assert!(c.read_faults < 3 * u64::from(PAGES) / 4, "{} faults for {} pages", c.read_faults, 3 * PAGES);
    stop(nodes);
}

#[test]
fn without_read_ahead_every_page_is_a_fault() {
    let nodes = two();
    nodes[0].dsm.read_ahead(false);
    reads(&nodes, PAGES..PAGES + 500);
    let c = nodes[0].counters();
    assert_eq!((c.read_faults, c.prefetches), (500, 0));
    stop(nodes);
}

#[test]
fn random_reads_ask_for_almost_nothing() {
    let nodes = two();
    // Every page once, in the order of a full-period congruential generator.
    let order = std::iter::successors(Some(1u32), |n| Some(n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) % PAGES));
    reads(&nodes, order.take(1500).map(|n| PAGES + n));
    let c = nodes[0].counters();
    println!("{} faults, {} asked for", c.read_faults, c.prefetches);
    assert!(c.prefetches < 60, "{} pages asked for in 1500 random reads", c.prefetches);
    stop(nodes);
}

#[test]
fn a_page_that_is_being_written_is_not_taken_by_a_stream_beside_it() {
    let nodes = two();
    let written = PAGES + 20;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                nodes[1].word(written).fetch_add(1 << 32, SeqCst);
            }
        });
        // A failure here must not leave the writer running, which the scope waits for.
        let _end = SetAtEnd(&over);
        // Somebody really wanted it once (and may have had to ask again and again); its writer has taken it
        // back since: every copy that came was invalidated.
        nodes[0].word(written).load(SeqCst);
        let begun = Instant::now();
        let taken_back = || {
            let near = nodes[0].counters();
            near.pages_in > 0 && near.invalidations == near.pages_in
        };
        while !taken_back() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the writer does not go on");
        }
        let before = nodes[1].counters();
        reads(&nodes, (PAGES..PAGES + 100).filter(|page| *page != written));
        let (near, far) = (nodes[0].counters(), nodes[1].counters());
        println!("{} faults, {} asked for, {} not given, {} blocks", near.read_faults, near.prefetches, near.prefetches_refused, near.blocks_in);
        assert!(near.prefetches > 20 && near.prefetches_refused > 0);
        assert_eq!(far.upgrade_faults, before.upgrade_faults, "the page was taken from its writer");
        // With its whole block it may be, but the writer has wanted it back at once, and keeps the block.
        assert!(far.write_faults <= before.write_faults + 1, "the block was taken from its writer again");
    });
    stop(nodes);
}

/// Reads scattered pages of node 1 in a round, which has written them meanwhile, `rounds` times: read faults of node 0, and
/// pages that it asked for because they follow others.
fn read_again(pages: u32, rounds: u64, ahead: bool) -> (u64, u64) {
    let nodes = two();
    let pages = || (0..pages).map(|n| PAGES + n * 977 % PAGES);
    nodes[0].dsm.read_ahead(ahead);
    for round in 0..rounds {
        for page in pages() {
            assert_eq!(nodes[0].word(page).load(SeqCst), u64::from(page) + (round << 32), "page {page}");
        }
        writes(&nodes[1], pages());
    }
    let (near, far, followers) = (nodes[0].counters(), nodes[1].counters(), nodes[0].dsm.followers());
    println!("ahead {ahead}: {} read faults, {followers:?}", near.read_faults);
    assert_eq!(far.upgrade_faults, rounds * pages().len() as u64, "the right to write is not asked for ahead of need");
    stop(nodes);
    (near.read_faults, followers.asked)
}

/// As a program that goes through a list or a tree which another host has changed meanwhile.
#[test]
fn scattered_pages_read_again_come_with_those_before_them() {
    let (pages, rounds) = (400, 12);
    let ((alone, _), (followed, _)) = (read_again(pages, rounds, false), read_again(pages, rounds, true));
    assert_eq!(alone, u64::from(pages) * rounds);
    assert!(2 * followed < alone, "{followed} faults, and {alone} without");
}

/// Each is here for no longer than a few faults take.
#[test]
fn pages_that_nodes_fight_for_are_not_asked_for_because_they_follow_others() {
    let (faults, asked) = read_again(4, 100, true);
    // Now and then a round takes long, on a busy machine.
    assert!(4 * asked < faults, "{asked} pages asked for, and {faults} faults");
}
