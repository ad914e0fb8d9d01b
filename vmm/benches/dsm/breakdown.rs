//! Where the time of a fault goes.

use std::collections::HashMap;

use krg_dsm::trace::{Mark, Stage};

use super::Bench;
use super::figures::Times;
use super::guest::Job;

/// Parts of a read miss, in order.
const PARTS: [(&str, &str); 6] = [
    ("detect", "touch to fault thread"),
    ("request", "fault thread to owner's receiver"),
    ("remote", "owner's receiver to page handed to its socket"),
    ("data", "owner's socket to our receiver"),
    ("install", "our receiver to page in place"),
    ("wake", "page in place to the guest's next instruction"),
];

pub struct Breakdown(Vec<Times>);

impl Default for Breakdown {
    fn default() -> Self {
        Breakdown(PARTS.iter().map(|_| Times::new()).collect())
    }
}

/// When each stage of each page was first over.
fn by_page(marks: Vec<Mark>) -> HashMap<u32, Vec<Mark>> {
    let mut pages: HashMap<u32, Vec<Mark>> = HashMap::new();
    marks
        .into_iter()
        .for_each(|mark| pages.entry(mark.page).or_default().push(mark));
    pages
}

fn first(marks: &[Mark], stage: Stage) -> Option<u64> {
    marks.iter().find(|mark| mark.stage == stage).map(|mark| mark.at)
}

impl Breakdown {
    /// Has vCPU 0 do a job of read misses with the traces on.
    pub fn run(&mut self, bench: &mut Bench, job: Job) -> anyhow::Result<()> {
        bench.node.dsm.trace(true);
        bench.peer.trace(true)?;
        let touches = bench.node.run(&[(0, job)])?;
        let (ours, theirs) = (by_page(bench.node.dsm.take_trace()), by_page(bench.peer.take_trace()?));
        bench.node.dsm.trace(false);
        bench.peer.trace(false)?;
        for (frame, &(from, to)) in job.frames().zip(&touches[0]) {
            let page = frame as u32;
            let stages = |marks: &HashMap<u32, Vec<Mark>>, wanted: [Stage; 2]| {
                let marks = marks.get(&page)?;
                Some((first(marks, wanted[0])?, first(marks, wanted[1])?))
            };
            let Some((detected, _)) = stages(&ours, [Stage::Detected, Stage::Sent]) else {
                continue;
            };
            let Some((arrived, installed)) = stages(&ours, [Stage::Received, Stage::Installed]) else {
                continue;
            };
            let Some((asked, answered)) = stages(&theirs, [Stage::Received, Stage::Sent]) else {
                continue;
            };
            let remote = answered.saturating_sub(asked);
            // Two hosts' clocks can't be compared: the ways there and back are taken for equal.
            let way = (arrived - detected).saturating_sub(remote) / 2;
            let (request, data) = if bench.one_clock {
                (asked.saturating_sub(detected), arrived.saturating_sub(answered))
            } else {
                (way, way)
            };
            let parts = [
                detected.saturating_sub(from),
                request,
                remote,
                data,
                installed - arrived,
                to.saturating_sub(installed),
            ];
            for (times, ticks) in self.0.iter_mut().zip(parts) {
                times.add(ticks as f64 / bench.node.ticks_per_us());
            }
        }
        Ok(())
    }

    pub fn put(&self, bench: &Bench) {
        for ((part, what), times) in PARTS.iter().zip(&self.0) {
            bench.figures.plain(&format!("{part}: {what}"), times.mean(), "us");
        }
    }
}
