//! Read misses beside many replicated page tables: before a page leaves, its owner compares those that may have changed.

use super::Bench;
use super::figures::Times;
use super::guest::{ARENA, Job, Touch};
use super::node::SHARE;

/// Tables of the lowest level, as 4 GiB of memory mapped by 4 KiB pages have.
const TABLES: u64 = 2048;
/// The directories above them.
const DIRECTORIES: u64 = TABLES / 512;
/// Where all of them are, from the root's entry downwards: in memory of the first node.
const AT: u64 = SHARE - (16 << 20);
const ALL: u64 = 1 + DIRECTORIES + TABLES;
/// What node 0 writes there before the start, as pages.
pub const PAGES: std::ops::Range<u32> = (AT >> 12) as u32..((AT >> 12) + ALL) as u32;
/// Present, writable, user, accessed.
const LINK: u64 = 0b10_0111;

/// Pages of the other node that are read.
const READ_AT: u64 = SHARE + ARENA + (208 << 20);
const READ_PAGES: u64 = 4096;
/// Touches at a time: fewer than flushes have to find a replica unchanged before it rests.
const TOUCHES: u64 = 200;
/// Rounds until all of them rest, one at a flush, and half as many again.
const UNTIL_REST: u64 = (256 + ALL) * 3 / (2 * TOUCHES);

/// The tables' content, and the entry of the root that leads to them. They are empty: no address needs them.
pub fn writes(root: u64) -> Vec<(u64, Vec<u8>)> {
    let links = |first: u64, count: u64| (first..first + count).flat_map(|table| ((AT + table * 4096) | LINK).to_le_bytes()).collect();
    let pointers = (AT, links(1, DIRECTORIES));
    let directories = (AT + 4096, links(1 + DIRECTORIES, TABLES));
    let tables = (AT + (1 + DIRECTORIES) * 4096, vec![0; (TABLES * 4096) as usize]);
    vec![(root + 8, links(0, 1)), pointers, directories, tables]
}

/// What the misses of some rounds took: of pages that their owner, who serves them, has written again.
fn misses(bench: &mut Bench, rounds: u64) -> anyhow::Result<Times> {
    let mut times = Times::new();
    for round in 0..rounds {
        let job = Job::scattered(Touch::Read, READ_AT, READ_PAGES, TOUCHES, round * 977);
        bench.peer.run(Job { touch: Touch::Write, ..job })?;
        bench.add(job, &mut times)?;
    }
    Ok(times)
}

/// Has both nodes write to all tables what is there, until they have replicas.
fn replicate(bench: &mut Bench) -> anyhow::Result<()> {
    let root = Job::forward(Touch::Rewrite, bench.node.root, 1);
    let all = Job::forward(Touch::Rewrite, AT, ALL);
    // A page that bounces has the roots looked at.
    for job in [root, root, root, root, all, all] {
        bench.peer.run(job)?;
        bench.node.run(&[(0, job)])?;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let (held, resting) = bench.peer.replicas()?;
    anyhow::ensure!(held as u64 > ALL, "only {held} of {ALL} tables below the root were replicated");
    anyhow::ensure!(resting == 0, "{resting} of them rest already");
    Ok(())
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    bench.figures.section(&format!("Read misses beside {TABLES} replicated page tables; the floor is without"));
    // The pages come in the same order again and again.
    bench.node.dsm.read_ahead(false);
    // The first time their blocks are parted.
    misses(bench, bench.rounds)?;
    let without = misses(bench, bench.rounds)?;
    replicate(bench)?;
    let compared = misses(bench, 1)?;
    misses(bench, UNTIL_REST)?;
    let (held, resting) = bench.peer.replicas()?;
    anyhow::ensure!(resting as u64 >= ALL, "of {held} replicas {resting} rest");
    let at_rest = misses(bench, bench.rounds)?;
    bench.node.dsm.read_ahead(true);
    bench.figures.times("all of them compared before each", &compared, Some(without.three()));
    bench.figures.times("once they rest", &at_rest, Some(without.three()));
    Ok(())
}
