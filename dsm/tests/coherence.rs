//! Two and three nodes in one process: real userfaultfds, real TCP, host threads as the guest.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use krg_dsm::memory::GuestRam;
use krg_dsm::node::{Client, Dsm, DsmError, Start, TABLES_REST};
use krg_dsm::transport::{Config, TcpTransport, Transport};

const PAGES: u64 = 64;

#[derive(Default)]
struct Guest {
    messages: Mutex<Vec<(usize, Vec<u8>)>>,
    errors: Mutex<Vec<DsmError>>,
}

impl Client for Guest {
    fn machine(&self, from: usize, bytes: &[u8]) {
        self.messages.lock().unwrap().push((from, bytes.to_vec()));
    }
    fn setup(&self, _: usize, _: &[u8]) {}
    fn roots(&self) -> Vec<u64> {
        Vec::new()
    }
    fn failed(&self, error: DsmError) {
        self.errors.lock().unwrap().push(error);
    }
}

struct Node {
    dsm: Arc<Dsm>,
    transport: Arc<TcpTransport>,
    guest: Arc<Guest>,
}

impl Node {
    fn word(&self, page: u32, word: usize) -> &AtomicU64 {
        &self.dsm.ram().words(page).unwrap()[word]
    }
}

/// A full mesh of loopback connections: `streams[i][j]` is node i's end to node j.
fn mesh(nodes: usize) -> Vec<Vec<Option<TcpStream>>> {
    let mut streams: Vec<Vec<Option<TcpStream>>> = (0..nodes).map(|_| (0..nodes).map(|_| None).collect()).collect();
    for (a, b) in (0..nodes).flat_map(|a| (a + 1..nodes).map(move |b| (a, b))) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        streams[a][b] = Some(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        streams[b][a] = Some(listener.accept().unwrap().0);
    }
    streams
}

fn cluster(nodes: usize) -> Vec<Node> {
    cluster_of(nodes, PAGES, Duration::from_secs(10), u64::MAX)
}

fn cluster_of(nodes: usize, pages: u64, merge_after: Duration, cache: u64) -> Vec<Node> {
    let share = pages / nodes as u64 * 4096;
    let shares: Vec<u64> = (0..nodes as u64)
        .map(|n| {
            if n + 1 == nodes as u64 {
                pages * 4096 - share * n
            } else {
                share
            }
        })
        .collect();
    let made = mesh(nodes).into_iter().enumerate().map(|(me, peers)| {
        let ram = Arc::new(GuestRam::new(&[(0, pages * 4096)], true).unwrap());
        let transport = Arc::new(TcpTransport::new(peers, Config::default()).unwrap());
        let guest = Arc::new(Guest::default());
        let dsm = Dsm::new(me, ram, transport.clone());
        transport.start(dsm.handler(guest.clone())).unwrap();
        let start = Start {
            me,
            shares: shares.clone(),
            preloaded: vec![],
            image: 0..0,
            replicate: true,
            tables_rest: TABLES_REST,
            merge_after,
            cache,
            bug: None,
        };
        dsm.start(start).unwrap();
        Node { dsm, transport, guest }
    });
    made.collect()
}

fn stop(nodes: &[Node]) {
    for node in nodes {
        assert_eq!(*node.guest.errors.lock().unwrap(), []);
    }
    for node in nodes {
        node.dsm.stop();
        node.transport.shutdown();
    }
}

#[test]
fn no_increment_is_lost_between_three_nodes() {
    let nodes = cluster(3);
    std::thread::scope(|scope| {
        for node in &nodes {
            for page in [0, 30, 63] {
                scope.spawn(move || {
                    (0..300).for_each(|_| {
                        node.word(page, 7).fetch_add(1, SeqCst);
                    })
                });
            }
        }
    });
    for page in [0, 30, 63] {
        assert_eq!(
            nodes.iter().map(|n| n.word(page, 7).load(SeqCst)).collect::<Vec<_>>(),
            [900; 3]
        );
    }
    stop(&nodes);
}

#[test]
fn store_buffering_and_message_passing_hold_between_two_nodes() {
    let nodes = cluster(2);
    let (x, y) = (3, 40);
    for round in 1..=300 {
        let barrier = Barrier::new(2);
        let seen: Vec<u64> = std::thread::scope(|scope| {
            let run = |node: usize, mine: u32, theirs: u32| {
                let (nodes, barrier) = (&nodes, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    nodes[node].word(mine, 0).store(round, SeqCst);
                    nodes[node].word(theirs, 0).load(SeqCst)
                })
            };
            let threads = [run(0, x, y), run(1, y, x)];
            threads.map(|t| t.join().unwrap()).to_vec()
        });
        assert!(
            seen.contains(&round),
            "both loads missed both stores in round {round}: {seen:?}"
        );
    }
    stop(&nodes);
}

#[test]
fn reads_share_a_page_and_move_no_ownership() {
    let nodes = cluster(3);
    nodes[0].word(50, 0).store(1, SeqCst);
    for node in &nodes {
        assert_eq!(node.word(50, 0).load(SeqCst), 1);
    }
    let before: Vec<_> = nodes.iter().map(|n| n.dsm.counters().unwrap().0).collect();
    for node in &nodes {
        assert_eq!(node.word(50, 0).load(SeqCst), 1);
    }
    let after: Vec<_> = nodes.iter().map(|n| n.dsm.counters().unwrap().0).collect();
    assert_eq!(before, after, "a page that is here faults no more");
    // The owner's next write invalidates two copies in one round, and moves no data.
    nodes[0].word(50, 0).store(2, SeqCst);
    let written: Vec<_> = nodes.iter().map(|n| n.dsm.counters().unwrap().0).collect();
    assert_eq!(written[0].upgrade_faults, after[0].upgrade_faults + 1);
    assert_eq!(
        written[1].invalidations + written[2].invalidations,
        after[1].invalidations + after[2].invalidations + 2
    );
    assert_eq!(
        written.iter().map(|c| c.pages_in).sum::<u64>(),
        after.iter().map(|c| c.pages_in).sum::<u64>()
    );
    stop(&nodes);
}

#[test]
fn a_page_nobody_wrote_costs_no_data() {
    let nodes = cluster(2);
    for page in 0..PAGES as u32 {
        assert_eq!(nodes[1].word(page, 0).load(SeqCst), 0);
    }
    let counters = nodes[1].dsm.counters().unwrap().0;
    assert_eq!((counters.zero_grants + counters.zero_neighbours, counters.pages_in), (PAGES, 0));
    assert!(counters.zero_neighbours > 0, "pages at home are taken by the group");
    assert!(nodes[0].transport.count(1).total().bytes_out < PAGES * 64);
    stop(&nodes);
}

#[test]
fn machine_messages_arrive_behind_the_writes_before_them_and_in_order() {
    let nodes = cluster(2);
    for n in 0..500u64 {
        nodes[0].word(9, 0).store(n, SeqCst);
        nodes[0].dsm.send(1, n.to_le_bytes().to_vec());
    }
    let limit = std::time::Instant::now() + Duration::from_secs(20);
    while nodes[1].guest.messages.lock().unwrap().len() < 500 {
        assert!(std::time::Instant::now() < limit, "messages are missing");
        std::thread::sleep(Duration::from_millis(5));
    }
    let messages = std::mem::take(&mut *nodes[1].guest.messages.lock().unwrap());
    assert!(
        messages
            .iter()
            .enumerate()
            .all(|(n, m)| *m == (0, (n as u64).to_le_bytes().to_vec()))
    );
    assert_eq!(nodes[1].word(9, 0).load(SeqCst), 499);
    stop(&nodes);
}

#[test]
fn a_lost_peer_is_told_once_and_stopping_lets_everybody_go() {
    let nodes = cluster(2);
    // Homed at node 1, owned by it.
    nodes[1].word(60, 0).store(5, SeqCst);
    nodes[1].transport.shutdown();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| nodes[0].word(60, 0).load(SeqCst));
        let limit = std::time::Instant::now() + Duration::from_secs(5);
        while nodes[0].guest.errors.lock().unwrap().is_empty() {
            assert!(std::time::Instant::now() < limit, "the loss was not told");
            std::thread::sleep(Duration::from_millis(5));
        }
        nodes[0].dsm.stop();
        assert_eq!(waiting.join().unwrap(), 0, "let go, with zeros");
    });
    assert_eq!(nodes[0].guest.errors.lock().unwrap().len(), 1);
    nodes[0].transport.shutdown();
    nodes[1].dsm.stop();
}

#[test]
fn what_node_0_loaded_is_there_even_where_it_wrote_nothing() {
    let mut nodes = Vec::new();
    for (me, peers) in mesh(2).into_iter().enumerate() {
        let ram = Arc::new(GuestRam::new(&[(0, PAGES * 4096)], true).unwrap());
        if me == 0 {
            ram.words(8).unwrap()[3].store(77, SeqCst);
        }
        let transport = Arc::new(TcpTransport::new(peers, Config::default()).unwrap());
        let guest = Arc::new(Guest::default());
        let dsm = Dsm::new(me, ram, transport.clone());
        transport.start(dsm.handler(guest.clone())).unwrap();
        let shares = vec![PAGES / 2 * 4096; 2];
        let start = Start { me, shares, preloaded: vec![8..10, 40..41], image: 0..0, replicate: true, tables_rest: TABLES_REST, merge_after: Duration::from_secs(10), cache: u64::MAX, bug: None };
        dsm.start(start).unwrap();
        nodes.push(Node { dsm, transport, guest });
    }
    // Page 9 and page 40 were loaded, with nothing but zeros.
    for page in [9, 40] {
        assert_eq!(nodes[0].word(page, 0).load(SeqCst), 0);
        assert_eq!(nodes[1].word(page, 0).fetch_add(5, SeqCst), 0);
        assert_eq!(nodes[0].word(page, 0).load(SeqCst), 5);
    }
    assert_eq!(nodes[1].word(8, 3).load(SeqCst), 77);
    stop(&nodes);
}

/// A sequence that looks random, the same in every run.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn blocks_are_taken_split_and_merged_and_no_increment_is_lost() {
    const BLOCKS: u64 = 8;
    const EACH: u64 = 6000;
    // Homes end in the middle of blocks.
    let nodes = cluster_of(3, BLOCKS * 512, Duration::from_millis(100), u64::MAX);
    let increment = |node: &Node, pages: std::ops::Range<u32>, seed: &mut u64| {
        let page = pages.start + next(seed) as u32 % (pages.end - pages.start);
        node.word(page, next(seed) as usize % 512).fetch_add(1, SeqCst);
    };
    let home = BLOCKS as u32 * 512 / 3;
    // First everybody at home, then everybody everywhere, then nobody, then at home again.
    let phase = |everywhere: bool, count: u64| {
        std::thread::scope(|scope| {
            for (me, node) in nodes.iter().enumerate() {
                for thread in 0..2 {
                    scope.spawn(move || {
                        let mut seed = 0x9e37_79b9_7f4a_7c15 ^ ((me * 4 + thread * 2) as u64 + u64::from(everywhere)) << 32;
                        let own = me as u32 * home..(me as u32 + 1) * home;
                        let all = 0..BLOCKS as u32 * 512;
                        (0..count).for_each(|_| increment(node, if everywhere { all.clone() } else { own.clone() }, &mut seed));
                    });
                }
            }
        });
    };
    phase(false, EACH);
    let taken: u64 = nodes.iter().map(|n| n.dsm.blocks().taken).sum();
    assert!(taken >= BLOCKS - 3, "{taken} blocks taken");
    phase(true, EACH);
    assert!(nodes.iter().all(|n| n.dsm.blocks().splits > 0));
    // One node alone writes to all of a block that is another's at home.
    for page in 0..512 {
        nodes[1].word(page, 0).fetch_add(0x1_0000_0000, SeqCst);
    }
    let limit = std::time::Instant::now() + Duration::from_secs(20);
    while nodes[1].dsm.blocks().merges == 0 {
        assert!(std::time::Instant::now() < limit, "a block that only one node uses is not merged");
        std::thread::sleep(Duration::from_millis(5));
    }
    phase(false, EACH / 10);
    phase(true, EACH / 10);
    let words = |node: &Node, page| (0..512).map(|word| node.word(page, word).load(SeqCst) & 0xffff_ffff).sum::<u64>();
    let total: u64 = (0..BLOCKS as u32 * 512).map(|page| words(&nodes[2], page)).sum();
    assert_eq!(total, 6 * (2 * EACH + 2 * (EACH / 10)));
    stop(&nodes);
}

#[test]
fn a_node_with_little_room_uses_more_memory_than_fits() {
    const BYTES: u64 = 16 << 20;
    const ROOM: u64 = 1 << 20;
    // Node 0 has room for an eighth of what node 1 has at home.
    let nodes = cluster_of(2, BYTES / 4096, Duration::from_secs(10), ROOM);
    let pages = (BYTES / 4096) as u32;
    let value = |page: u32, round: u64| u64::from(page) << 32 | round;
    for round in 1..=2 {
        for page in 0..pages {
            nodes[0].word(page, 9).store(value(page, round), SeqCst);
        }
        for page in 0..pages {
            assert_eq!(nodes[0].word(page, 9).load(SeqCst), value(page, round), "page {page} in round {round}");
        }
    }
    // Copies that are only read go, too, while their owner keeps the page.
    for page in 0..pages / 2 {
        assert_eq!(nodes[1].word(page, 9).load(SeqCst), value(page, 2), "page {page} from its home");
    }
    for node in &nodes {
        let (copies, evictions) = (node.dsm.copies(), node.dsm.counters().unwrap().0.evictions);
        assert_eq!((copies.limit, copies.overruns), ((ROOM >> 12) as u32, 0));
        assert!(copies.peak <= copies.limit + copies.limit / 16 + 64, "{copies:?}");
        assert!(evictions > 1000, "{evictions} evictions");
    }
    stop(&nodes);
}

#[test]
fn no_increment_is_lost_where_there_is_no_room() {
    const EACH: u64 = 3000;
    let nodes = cluster_of(3, 3 * 512, Duration::from_secs(10), 64 << 12);
    std::thread::scope(|scope| {
        for (me, node) in nodes.iter().enumerate() {
            for thread in 0..2 {
                scope.spawn(move || {
                    let mut seed = 0x9e37_79b9_7f4a_7c15 ^ ((me * 2 + thread + 1) as u64) << 32;
                    for _ in 0..EACH {
                        node.word(next(&mut seed) as u32 % (3 * 512), 3).fetch_add(1, SeqCst);
                    }
                });
            }
        }
    });
    assert!(nodes.iter().all(|n| n.dsm.counters().unwrap().0.evictions > 0));
    let total: u64 = (0..3 * 512).map(|page| nodes[1].word(page, 3).load(SeqCst)).sum();
    assert_eq!(total, 6 * EACH);
    stop(&nodes);
}

#[test]
fn memory_that_is_given_up_is_zero_everywhere_and_takes_no_room() {
    let nodes = cluster_of(3, 6 * 512, Duration::from_secs(10), u64::MAX);
    // Nothing is here that was not touched.
    nodes.iter().for_each(|node| node.dsm.read_ahead(false));
    // Whole blocks at home, a block that others share, and single pages.
    for page in 0..6 * 512 {
        nodes[page as usize / 1024].word(page, 1).store(7, SeqCst);
    }
    for page in (512..1024).chain(1500..1600) {
        assert_eq!(nodes[0].word(page, 1).load(SeqCst), 7);
        assert_eq!(nodes[2].word(page, 1).fetch_add(1, SeqCst), 7);
    }
    let private = nodes[0].dsm.blocks().private + nodes[1].dsm.blocks().private;
    nodes[0].dsm.free(0x1000, 2000 * 4096);
    let (freed, copies): (Vec<u64>, Vec<u32>) =
        nodes.iter().map(|n| (n.dsm.counters().unwrap().0.pages_freed, n.dsm.copies().pages)).unzip();
    assert_eq!((freed, copies), (vec![1023, 977, 0], vec![0, 0, 0]));
    assert!(nodes[0].dsm.blocks().private + nodes[1].dsm.blocks().private < private);
    for page in 0..6 * 512 {
        let expected = if (1..2001).contains(&page) { 0 } else { 7 };
        let node = &nodes[page as usize % 3];
        assert_eq!(node.word(page, 1).load(SeqCst), expected, "page {page}");
        node.word(page, 1).store(u64::from(page), SeqCst);
    }
    for page in 0..6 * 512 {
        assert_eq!(nodes[1].word(page, 1).load(SeqCst), u64::from(page));
    }
    // Nothing, and what is no RAM.
    nodes[1].dsm.free(0x1001, 0x1ffe);
    nodes[1].dsm.free(1 << 40, 1 << 20);
    stop(&nodes);
}

/// Two threads on different nodes write to one page in turn; its home is a third node.
#[test]
fn who_waits_for_pages_is_known_with_the_node_that_had_them() {
    const TURNS: u64 = 20;
    let nodes = cluster(3);
    let page = 30;
    let turns = AtomicU64::new(0);
    let threads: Vec<u32> = std::thread::scope(|scope| {
        let writers = [0, 2].map(|node| {
            let (nodes, turns) = (&nodes, &turns);
            scope.spawn(move || {
                let mine = node as u64 / 2;
                for turn in (0..TURNS).filter(|turn| turn % 2 == mine) {
                    while turns.load(SeqCst) != turn {
                        std::thread::yield_now();
                    }
                    nodes[node].word(page, 0).fetch_add(1, SeqCst);
                    turns.store(turn + 1, SeqCst);
                }
                // SAFETY: it takes nothing and can't fail.
                u32::try_from(unsafe { libc::gettid() }).unwrap()
            })
        });
        writers.map(|writer| writer.join().unwrap()).into()
    });
    for (node, other, thread) in [(0, 2, threads[0]), (2, 0, threads[1])] {
        let (stalls, pages) = nodes[node].dsm.take_stalls(16);
        let told = stalls.iter().find(|told| told.thread == thread).unwrap();
        let faults = told.sources.iter().find(|(source, _)| *source == other).unwrap().1;
        assert!(u64::from(faults) >= TURNS / 2 - 1, "{told:?}");
        assert!(told.stalled > 0 && !told.waits && told.footprint == 1, "{told:?}");
        let fetched = pages.iter().find(|told| told.page == page).unwrap();
        assert!(fetched.fetches.contains(&(thread, other, faults)), "{fetched:?}");
        assert_eq!(nodes[node].dsm.take_stalls(16).1, [], "taken");
    }
    assert!(nodes[1].dsm.take_stalls(16).0.is_empty(), "nobody waited at home");
    stop(&nodes);
}
