//! Answers as text.

use krg_vmm::cluster::status::{Status, Told, Vcpu, text};
use serde_json::Value;

/// What is not known.
pub const UNKNOWN: &str = "-";

/// `krg nodes status`.
pub fn nodes(status: &Status) -> String {
    let head = ["NODE", "HOST", "STATE", "VCPUS", "MEMORY", "FAULTS", "US/FAULT", "PAGES IN", "PAGES OUT", "SENT", "BOUNCES"];
    let rows = status.nodes.iter().enumerate().map(|(number, node)| {
        let told = node.told.as_ref();
        let count = |of: fn(&Told) -> Option<u64>| or_unknown(told.and_then(of), |n| n.to_string());
        vec![
            number.to_string(),
            node.host.clone(),
            if node.online { "online" } else { "offline" }.into(),
            ranges(&node.vcpus),
            or_unknown(node.memory, bytes),
            count(Told::faults),
            or_unknown(told.and_then(|told| told.fault_us), |us| format!("{us:.0}")),
            count(|told| told.pages_in),
            count(|told| told.pages_out),
            or_unknown(told.and_then(|told| told.bytes_out), bytes),
            count(|told| told.bounces),
        ]
    });
    table(&head, rows)
}

/// `krg ps`.
pub fn vcpus(status: &Status) -> String {
    let head = ["VCPU", "STATE", "NODE", "HOST", "RAN", "WAITED", "STALLED", "FAULTS/S", "PIN", "MIGRATE", "WHY"];
    let rows = status.vcpus.iter().enumerate().map(|(number, vcpu)| {
        let host = vcpu.node.and_then(|node| status.nodes.get(usize::try_from(node).ok()?)).map(|node| node.host.clone());
        let mut row = Vec::from(vcpu_row(number, vcpu));
        row.insert(3, host.unwrap_or_else(|| UNKNOWN.into()));
        row
    });
    table(&head, rows)
}

/// Number, state, node, load, pin, capability and reason of one vCPU.
pub fn vcpu_row(number: usize, vcpu: &Vcpu) -> [String; 10] {
    let [state, ran, waited, stalled, faults] = load(vcpu);
    [
        number.to_string(),
        state,
        or_unknown(vcpu.node, |node| node.to_string()),
        ran,
        waited,
        stalled,
        faults,
        or_unknown(vcpu.pin, |pin| pin.to_string()),
        if vcpu.migrate { "yes" } else { "no" }.into(),
        vcpu.reason.clone().unwrap_or_else(|| UNKNOWN.into()),
    ]
}

/// State, shares of the time it ran, waited and stalled, and faults a second.
fn load(vcpu: &Vcpu) -> [String; 5] {
    let share = |part: Option<f64>| or_unknown(part, |part| format!("{:.0}%", part * 100.0));
    [
        vcpu.state.clone().unwrap_or_else(|| UNKNOWN.into()),
        share(vcpu.ran),
        share(vcpu.waited),
        share(vcpu.stalled),
        or_unknown(vcpu.remote_faults(), rate),
    ]
}

/// `krg migrate`.
pub fn moved(answer: &Value) -> String {
    match (answer["moved"] == true, &answer["vcpu"], &answer["from"], &answer["node"]) {
        (true, vcpu, Value::Null, node) => format!("vCPU {vcpu} moved to node {node}\n"),
        (true, vcpu, from, node) => format!("vCPU {vcpu} moved from node {from} to node {node}\n"),
        (false, vcpu, _, node) => format!("vCPU {vcpu} is on node {node} already\n"),
    }
}

/// `krg migrate all`, without what was refused.
pub fn all_moved(answer: &Value) -> String {
    let list = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let moved_ones = list("moved").into_iter().map(|mut one| {
        one["moved"] = true.into();
        moved(&one)
    });
    moved_ones.chain(list("there").iter().map(moved)).collect()
}

/// `krg pin`.
pub fn pinned(answer: &Value) -> String {
    let (vcpu, pin) = (&answer["vcpu"], &answer["pin"]);
    match (pin, answer["moved"] == true) {
        (Value::Null, _) => format!("vCPU {vcpu} is not pinned\n"),
        (_, true) => format!("vCPU {vcpu} is pinned to node {pin}, and was moved there\n"),
        (_, false) => format!("vCPU {vcpu} is pinned to node {pin}\n"),
    }
}

/// `krg capset`.
pub fn capable(answer: &Value) -> String {
    let vcpus: Vec<u64> = answer["vcpus"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let may = if answer["migrate"] == true { "may migrate" } else { "may not migrate" };
    format!("vCPU {} {may}\n", ranges(&vcpus))
}

/// `krg sched`: the policy, what it has decided so far, and its last moves, the newest first.
pub fn sched(answer: &Value) -> String {
    let sched = &answer["sched"];
    let count = |name: &str| or_unknown(sched[name].as_u64(), |count| count.to_string());
    let mut lines = format!("policy {}\n", text(&sched["policy"]).unwrap_or_else(|| UNKNOWN.into()));
    lines += &format!("decisions {}, moves {}, failed moves {}\n", count("decisions"), count("moves"), count("failures"));
    for made in sched["last"].as_array().into_iter().flatten() {
        let ago = sched["at_ms"].as_u64().zip(made["at_ms"].as_u64()).and_then(|(now, at)| now.checked_sub(at));
        lines += &format!(
            "{} s ago: vCPU {} from node {} to node {}, {}: {}\n",
            or_unknown(ago, |ms| (ms / 1000).to_string()),
            made["vcpu"],
            made["from"],
            made["to"],
            text(&made["failure"]).or_else(|| text(&made["outcome"])).unwrap_or_else(|| UNKNOWN.into()),
            text(&made["reason"]).unwrap_or_else(|| UNKNOWN.into())
        );
    }
    if let Some(log) = text(&sched["log"]) {
        lines += &format!("log {log}\n");
    }
    lines
}

/// `krg explain vcpuN`.
pub fn vcpu_explained(explain: &Value) -> String {
    let vcpu = Vcpu::read(explain);
    let [state, ran, waited, stalled, faults] = load(&vcpu);
    let mut lines = format!("{}\n", text(&explain["message"]).unwrap_or_default());
    lines += &format!("state {state}; ran {ran}, waited {waited} for a CPU, stalled {stalled} for pages\n");
    lines += &format!("faults on pages of other hosts: {faults} a second");
    for (node, per_second) in vcpu.faults.iter().flatten().filter(|(node, _)| Some(*node) != vcpu.node) {
        lines += &format!("; {} on node {node}'s", rate(*per_second));
    }
    lines += "\n";
    for page in explain["pages"].as_array().into_iter().flatten() {
        let (address, count) = (page["address"].as_u64(), page["faults"].as_u64());
        let of = |number, show: fn(u64) -> String| or_unknown(number, show);
        lines += &format!("fights for page {}: {} faults on node {}\n", of(address, hex), of(count, |n| n.to_string()), page["node"]);
    }
    lines
}

/// `krg explain PAGE`.
pub fn page_explained(explain: &Value) -> String {
    let mut lines = format!("{}\n", text(&explain["message"]).unwrap_or_default());
    for node in explain["nodes"].as_array().into_iter().flatten() {
        lines += &format!("node {}: {} faults, taken away {} times", node["node"], node["faults"], node["bounces"]);
        for thread in node["threads"].as_array().into_iter().flatten() {
            lines += &format!("; {} {}", text(&thread["thread"]).unwrap_or_default(), thread["faults"]);
        }
        lines += "\n";
    }
    lines
}

/// What is known, or the sign for what is not.
pub fn or_unknown<T>(known: Option<T>, show: impl Fn(T) -> String) -> String {
    known.map_or_else(|| UNKNOWN.into(), show)
}

/// A number a second: short, and never 0 if it is not.
pub fn rate(per_second: f64) -> String {
    match per_second {
        0.0 => "0".into(),
        r if r < 0.05 => "<0.1".into(),
        r if r < 9.95 => format!("{r:.1}"),
        r if r < 99_999.5 => format!("{r:.0}"),
        r if r < 9_999_500.0 => format!("{:.0}k", r / 1e3),
        r => format!("{:.0}M", r / 1e6),
    }
}

/// Bytes in binary units.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut amount, mut unit) = (bytes as f64 / 1024.0, 0);
    while amount >= 1023.95 && unit + 1 < UNITS.len() {
        (amount, unit) = (amount / 1024.0, unit + 1);
    }
    let digits = usize::from(amount < 99.95 && amount.fract() >= 0.05 && amount.fract() < 0.95);
    format!("{amount:.digits$} {}", UNITS[unit])
}

/// An address.
pub fn hex(address: u64) -> String {
    format!("{address:#x}")
}

/// Ascending numbers, runs of them shortened: `0-3,7`.
pub fn ranges(numbers: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let part = |(first, last): &(u64, u64)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    if parts.is_empty() { UNKNOWN.into() } else { parts.iter().map(part).collect::<Vec<_>>().join(",") }
}

/// Columns as wide as they need to be; the last has no spaces after it.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = head.iter().map(|word| (*word).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers() {
        assert_eq!([0.0, 0.01, 4.25, 812.4, 120_000.0, 3e7].map(rate), ["0", "<0.1", "4.2", "812", "120k", "30M"]);
        assert_eq!([0, 1023, 1024, 1536, 128 << 20, 1 << 30].map(bytes), ["0 B", "1023 B", "1 KiB", "1.5 KiB", "128 MiB", "1 GiB"]);
        assert_eq!(bytes((1 << 20) - 1), "1 MiB");
        assert_eq!([ranges(&[]), ranges(&[4]), ranges(&[0, 1, 2, 7, 9, 10])], ["-", "4", "0-2,7,9-10"]);
        assert_eq!(ranges(&[u64::MAX, 0]), format!("{},0", u64::MAX));
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let status = Status::read(&json!({
            "nodes": [{"node": 0, "host": "a", "online": true, "vcpus": [0, 1], "memory": 134_217_728u64},
                {"node": 1, "host": "10.0.0.9", "online": false}],
            "vcpus": [{"node": 0, "migrate": true, "reason": "so", "load": {"ran": 0.5, "state": "running", "faults": [[1, 3.0]]}},
                {"node": 7, "pin": 7, "migrate": false}]}));
        assert_eq!(
            nodes(&status),
            "NODE  HOST      STATE    VCPUS  MEMORY   FAULTS  US/FAULT  PAGES IN  PAGES OUT  SENT  BOUNCES\n\
             0     a         online   0-1    128 MiB  -       -         -         -          -     -\n\
             1     10.0.0.9  offline  -      -        -       -         -         -          -     -\n"
        );
        assert_eq!(
            vcpus(&status),
            "VCPU  STATE    NODE  HOST  RAN  WAITED  STALLED  FAULTS/S  PIN  MIGRATE  WHY\n\
             0     running  0     a     50%  -       -        3.0       -    yes      so\n\
             1     -        7     -     -    -       -        -         7    no       -\n"
        );
    }

    #[test]
    fn sentences() {
        assert_eq!(moved(&json!({"moved": true, "vcpu": 1, "from": 0, "node": 2})), "vCPU 1 moved from node 0 to node 2\n");
        assert_eq!(moved(&json!({"moved": false, "vcpu": 1, "node": 2})), "vCPU 1 is on node 2 already\n");
        assert_eq!(pinned(&json!({"vcpu": 1, "pin": 0, "moved": true})), "vCPU 1 is pinned to node 0, and was moved there\n");
        assert_eq!(pinned(&json!({"vcpu": 1, "pin": null, "moved": false})), "vCPU 1 is not pinned\n");
        assert_eq!(capable(&json!({"vcpus": [0, 1, 2], "migrate": false})), "vCPU 0-2 may not migrate\n");
        let last = json!([{"at_ms": 1000, "vcpu": 2, "from": 0, "to": 1, "reason": "so", "outcome": "moved", "failure": null},
            {"vcpu": 3, "from": 1, "to": 0, "reason": "so", "outcome": "failed", "failure": "the node is lost"}]);
        let answer = json!({"sched": {"policy": "balance", "decisions": 9, "moves": 1, "at_ms": 8500, "last": last}});
        assert_eq!(
            sched(&answer),
            "policy balance\ndecisions 9, moves 1, failed moves -\n7 s ago: vCPU 2 from node 0 to node 1, moved: so\n\
             - s ago: vCPU 3 from node 1 to node 0, the node is lost: so\n"
        );
    }

    #[test]
    fn explanations() {
        let vcpu = json!({"message": "vCPU 1 is on node 0: so", "node": 0,
            "load": {"state": "running", "ran": 0.3, "waited": 0, "stalled": 0.7, "faults": [[0, 9.0], [1, 812.0]]},
            "pages": [{"address": 0x1000, "node": 0, "faults": 25}]});
        assert_eq!(
            vcpu_explained(&vcpu),
            "vCPU 1 is on node 0: so\n\
             state running; ran 30%, waited 0% for a CPU, stalled 70% for pages\n\
             faults on pages of other hosts: 812 a second; 812 on node 1's\n\
             fights for page 0x1000: 25 faults on node 0\n"
        );
        let page = json!({"message": "page 0x1000 is at home on node 0", "nodes": [
            {"node": 1, "faults": 9, "bounces": 8, "threads": [{"thread": "vcpu1", "faults": 9}]}]});
        assert_eq!(
            page_explained(&page),
            "page 0x1000 is at home on node 0\nnode 1: 9 faults, taken away 8 times; vcpu1 9\n"
        );
    }
}
