//! What a node counted, told while it runs and at the end; and its console's input.

use std::sync::Arc;

use krg_dsm::contention::HotPage;
use krg_dsm::node::Dsm;
use serde_json::{Value, json};

use super::{NodeOutput, NodeSpec};
use crate::machine::Machine;

/// Types on the console. What the UART has no room for is lost, as on a real line without flow
/// control, but not before it had some time to drain.
pub(super) fn type_in(machine: &Machine, bytes: &[u8]) {
    let mut rest = bytes;
    for _ in 0..200 {
        rest = &rest[machine.type_in(rest)..];
        if rest.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    tracing::warn!("the guest doesn't read its console: {} typed bytes dropped", rest.len());
}

/// Tells that a vCPU came to run on this node.
pub(super) fn arrived(spec: &NodeSpec, vcpu: u32, epoch: u64, output: &Arc<dyn NodeOutput>) {
    tracing::info!(vcpu, epoch, "a vCPU came");
    output.event("", json!({"event": "migrated", "node": spec.node, "vcpu": vcpu, "epoch": epoch}));
}

/// Contended pages that are told.
const HOT_PAGES: usize = 16;

/// Tells this node's counters, at its end.
pub(super) fn counters(spec: &NodeSpec, machine: &Machine, dsm: Option<&Dsm>, output: &Arc<dyn NodeOutput>) {
    let (line, figures) = figures(spec, machine, dsm, "counters");
    output.event(&line, figures);
}

/// Tells this node's counters so far, to programs only.
pub(super) fn statistics(spec: &NodeSpec, machine: &Machine, dsm: &Dsm, output: &Arc<dyn NodeOutput>) {
    let (line, figures) = figures(spec, machine, Some(dsm), "statistics");
    tracing::info!("{line}");
    output.event("", figures);
}

fn figures(spec: &NodeSpec, machine: &Machine, dsm: Option<&Dsm>, event: &str) -> (String, Value) {
    let (mut sent, mut received, mut exits, mut arrivals) = (0, 0, 0, 0);
    for s in (0..spec.placement.cpus()).filter_map(|v| machine.statistics(v)) {
        sent += s.sent;
        received += s.received;
        exits += s.exits();
        arrivals += s.arrivals;
    }
    let own: Vec<u32> = (0..spec.placement.cpus()).filter(|v| machine.owner(*v).is_some_and(|o| o.0 == spec.node)).collect();
    let name = spec.host_names.get(spec.node).map(String::as_str).unwrap_or("this host");
    let mut line = format!("node {} ({name}): {exits} vCPU exits, remote interrupts {sent} out {received} in", spec.node);
    let mut figures = json!({"event": event, "node": spec.node, "host": name, "vcpu_exits": exits, "vcpus": own,
        "vcpu_arrivals": arrivals,
        "remote_interrupts_out": sent, "remote_interrupts_in": received});
    let vcpus: Vec<String> = own.iter().map(u32::to_string).collect();
    line += &format!("; its vCPUs: {}", if vcpus.is_empty() { "none".into() } else { vcpus.join(" ") });
    if let Some((c, replicas)) = dsm.and_then(Dsm::counters) {
        let (mut messages, mut bytes) = (0, 0);
        for peer in (0..spec.placement.hosts.len()).filter(|p| *p != spec.node) {
            let total = dsm.map(|d| d.traffic(peer).total()).unwrap_or_default();
            messages += total.frames_out;
            bytes += total.bytes_out;
        }
        line += &format!(
            "; faults: {} read, {} write, {} upgrade ({} of them zero pages, {} neighbours taken along), {} stale; pages {} in {} out; {} messages, {} KiB sent; \
             page tables: {} replicated, {} of them at rest, {} promoted, {} demoted, {} words merged in {} flushes of {} pages compared, {} conflicts, \
             {} came to rest, {} of them were used again, {} given up",
            c.read_faults, c.write_faults, c.upgrade_faults, c.zero_grants, c.zero_neighbours, c.stale_faults, c.pages_in, c.pages_out,
            messages, bytes >> 10, replicas.held, replicas.resting, c.promotions, c.demotions, c.words_merged, c.flushes, c.pages_compared,
            c.conflicts, c.rests, c.rests_ended, c.departures
        );
        let blocks = dsm.map(Dsm::blocks).unwrap_or_default();
        line += &format!(
            "; 2 MiB blocks: {} private, {} taken at the first touch, {} split, {} merged",
            blocks.private, blocks.taken, blocks.splits, blocks.merges
        );
        figures["blocks"] = json!(blocks);
        let copies = dsm.map(Dsm::copies).unwrap_or_default();
        line += &format!(
            "; copies of other hosts' pages: {} MiB, {} at most, of {}; {} evicted, {} overruns",
            copies.pages >> 8, copies.peak >> 8, copies.limit >> 8, c.evictions, copies.overruns
        );
        line += &format!("; {} MiB that were at home here came back free", c.pages_freed >> 8);
        figures["copies"] = json!(copies);
        let ahead = dsm.map(Dsm::accuracy).unwrap_or_default();
        line += &format!(
            "; ahead of need: {} pages asked for ({} not given), of those before streams {} used, {} wasted",
            c.prefetches, c.prefetches_refused, ahead.used, ahead.wasted
        );
        figures["read_ahead"] = json!(ahead);
        let followers = dsm.map(Dsm::followers).unwrap_or_default();
        line += &format!(
            "; following others: {} pages asked for; not asked for were {} that came and {} that did not",
            followers.asked, followers.came, followers.stayed_away
        );
        figures["followers"] = json!(followers);
        let lending = dsm.map(Dsm::lending).unwrap_or_default();
        line += &format!(
            "; whole blocks: {} asked for ({} not given), {} given, {} taken back ({} of them wanted back, {} of those soon), {} kept for that",
            c.blocks_asked, c.blocks_refused, lending.given, lending.taken_back, lending.wanted_back, lending.contested, lending.kept
        );
        figures["lending"] = json!(lending);
        let waited = dsm.map(Dsm::waited).unwrap_or_default();
        let mean_us = waited.total.as_secs_f64() * 1e6 / waited.faults.max(1) as f64;
        line += &format!("; a fault took {mean_us:.0} us on average");
        figures["fault_mean_us"] = json!(mean_us);
        figures["dsm"] = json!(c);
        figures["replicas"] = json!(replicas.held);
        figures["replicas_resting"] = json!(replicas.resting);
        figures["messages_out"] = json!(messages);
        figures["bytes_out"] = json!(bytes);
    }
    if let Some(dsm) = dsm {
        let (hottest, bounces) = dsm.hottest(HOT_PAGES);
        line += &format!("; {bounces} pages taken away soon after they had come");
        figures["bounces"] = json!(bounces);
        figures["hot_pages"] = hottest.iter().map(|hot| hot_page(dsm, hot)).collect();
    }
    (line, figures)
}

/// A contended page: where it is, and which threads here fight for it, by their names (`vcpu3`).
fn hot_page(dsm: &Dsm, hot: &HotPage) -> Value {
    let name = |thread: u32| {
        let comm = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
        comm.map_or_else(|_| format!("thread {thread}"), |comm| fighter(comm.trim()))
    };
    let threads: Vec<Value> =
        hot.threads.iter().map(|(thread, faults)| json!({"thread": name(*thread), "faults": faults})).collect();
    json!({"address": dsm.ram().gpa_of(hot.page), "faults": hot.faults, "bounces": hot.bounces, "threads": threads})
}

/// A vCPU that has left had its faults when its thread was not yet a proxy, which itself touches no guest memory.
fn fighter(comm: &str) -> String {
    comm.strip_prefix("proxy").map_or_else(|| comm.to_owned(), |vcpu| format!("vcpu{vcpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fighter_keeps_its_name_when_it_has_left() {
        assert_eq!(["vcpu3", "proxy3", "virtio-blk"].map(fighter), ["vcpu3", "vcpu3", "virtio-blk"]);
    }
}
