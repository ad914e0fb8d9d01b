//! A machine's figures as metrics (`vmm/METRICS.md` has their names), in the text format of OpenMetrics.
//! What is not known has no sample: a figure is never made up.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::status::{Node, Status, Told, Vcpu};

/// The content type of [`text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of a machine, as a scrape gets them.
///
/// # Errors
/// The encoder's, which has none while there is memory.
pub fn text(status: &Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Machine(families(status))));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

/// Labels and a value.
type Sample = (Vec<(&'static str, String)>, f64);

#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Machine(Vec<Family>);

impl Collector for Machine {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for Family { name, help, kind, samples } in self.0.iter().filter(|family| !family.samples.is_empty()) {
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for (labels, value) in samples {
                if labels.is_empty() {
                    sample(&mut family, *kind, *value)?;
                } else {
                    // The encoder takes values as they are to be in the text.
                    let labels: Vec<_> = labels.iter().map(|(name, value)| (*name, escaped(value))).collect();
                    sample(&mut family.encode_family(&labels)?, *kind, *value)?;
                }
            }
        }
        Ok(())
    }
}

fn sample(encoder: &mut MetricEncoder<'_>, kind: MetricType, value: f64) -> Result<(), fmt::Error> {
    match kind {
        MetricType::Counter => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
        _ => encoder.encode_gauge(&value),
    }
}

/// A label's value between quotes; there are no line breaks in it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"")
}

/// What a node counts: names, meaning, and where it is in what the node tells.
type Count = (&'static str, &'static str, Figure);

/// Where a number is in what a node tells.
type Figure = fn(&Told) -> Option<u64>;

const COUNTERS: [Count; 19] = [
    ("krg_pages_in", "Pages that came from other nodes", |told| told.pages_in),
    ("krg_pages_out", "Pages that went to other nodes", |told| told.pages_out),
    ("krg_messages_sent", "Messages to other nodes", |told| told.messages_out),
    ("krg_sent_bytes", "Bytes to other nodes", |told| told.bytes_out),
    ("krg_bounces", "Pages taken away soon after they had come", |told| told.bounces),
    ("krg_page_table_flushes", "Comparisons of replicated page tables before a release", |told| told.flushes),
    ("krg_page_table_compared", "Replicated page tables compared", |told| told.pages_compared),
    ("krg_page_table_rests", "Replicated page tables that came to rest, and are not compared", |told| told.rests),
    ("krg_page_table_rests_ended", "Resting page tables that were walked or written again", |told| told.rests_ended),
    ("krg_page_table_departures", "Replicated page tables given up after a long rest", |told| told.departures),
    ("krg_page_table_words_merged", "Changed words of replicated page tables sent", |told| told.words_merged),
    ("krg_page_table_promotions", "Pages that became replicated page tables", |told| told.promotions),
    ("krg_page_table_demotions", "Replicated page tables taken back, as they are tables no longer or nobody else has one", |told| told.demotions),
    ("krg_page_table_conflicts", "Words two nodes had changed differently since the last merge", |told| told.conflicts),
    ("krg_evictions", "Copies of other nodes' pages given up for room", |told| told.evictions),
    ("krg_vcpu_exits", "Exits of vCPUs from KVM", |told| told.exits),
    ("krg_vcpu_arrivals", "vCPUs that came from other nodes", |told| told.arrivals),
    ("krg_interrupts_sent", "Interrupts sent to vCPUs on other nodes", |told| told.interrupts_out),
    ("krg_interrupts_received", "Interrupts that came from other nodes", |told| told.interrupts_in),
];

const FAULTS: [(&str, Figure); 3] = [
    ("read", |told| told.read_faults),
    ("write", |told| told.write_faults),
    ("upgrade", |told| told.upgrade_faults),
];

/// Every metric, also without samples.
fn families(status: &Status) -> Vec<Family> {
    let mut families = machine(status);
    families.extend(nodes(status));
    families.extend(vcpus(status));
    families.extend(pages(status));
    families
}

fn machine(status: &Status) -> Vec<Family> {
    let one = |value: Option<u64>| value.map(|value| (vec![], value as f64)).into_iter();
    vec![
        gauge("krg_vcpus", "vCPUs of the machine", one(Some(status.cpus))),
        gauge("krg_memory_bytes", "Guest memory", one(Some(status.memory))),
        gauge(
            "krg_sched_policy",
            "1 for who decides where vCPUs run",
            status.policy.iter().map(|policy| (vec![("policy", policy.clone())], 1.0)),
        ),
        counter("krg_sched_decisions", "Decisions of the scheduler", one(status.decisions)),
        counter("krg_sched_moves", "vCPUs the scheduler has moved", one(status.moves)),
        counter("krg_sched_failures", "Moves of the scheduler that failed", one(status.failures)),
    ]
}

fn nodes(status: &Status) -> Vec<Family> {
    let all = || status.nodes.iter().enumerate();
    let label = |number: usize, node: &Node| vec![("node", number.to_string()), ("host", node.host.clone())];
    let of = |value: &dyn Fn(usize, &Node) -> Option<f64>| -> Vec<Sample> {
        all().filter_map(|(number, node)| Some((label(number, node), value(number, node)?))).collect()
    };
    let told = |value: Figure| of(&|_, node| Some(value(node.told.as_ref()?)? as f64));
    let pages = |value: Figure| of(&|_, node| Some(value(node.told.as_ref()?)? as f64 * 4096.0));
    let age = |told: &Told| status.at_ms.checked_sub(told.at_ms).map(|ms| ms as f64 / 1e3);
    let mut families = vec![
        gauge("krg_node_online", "1 if the node runs, 0 if its host did not answer", of(&|_, node| Some(f64::from(u8::from(node.online))))),
        gauge("krg_node_memory_bytes", "Guest memory that is at home there", of(&|_, node| node.memory.map(|m| m as f64))),
        gauge("krg_node_vcpus", "vCPUs there", of(&|_, node| node.online.then_some(node.vcpus.len() as f64))),
        gauge("krg_node_load", "CPUs its vCPUs would use: time they ran or could have", of(&|number, _| status.load(number))),
        gauge("krg_node_figures_age_seconds", "Age of what the node counted", of(&|_, node| age(node.told.as_ref()?))),
        gauge(
            "krg_fault_mean_seconds",
            "Mean time a fault took, since the start",
            of(&|_, node| Some(node.told.as_ref()?.fault_us? / 1e6)),
        ),
        gauge("krg_copies_bytes", "Copies of other nodes' pages", pages(|told| told.copies)),
        gauge("krg_copies_limit_bytes", "Room for such copies", pages(|told| told.copies_limit)),
    ];
    let faults = FAULTS.iter().flat_map(|(kind, value)| {
        told(*value).into_iter().map(|(mut labels, value)| {
            labels.push(("kind", (*kind).to_owned()));
            (labels, value)
        })
    });
    families.push(counter("krg_faults", "Page faults", faults));
    families.extend(COUNTERS.iter().map(|(name, help, value)| counter(name, help, told(*value))));
    families
}

fn vcpus(status: &Status) -> Vec<Family> {
    let all = || status.vcpus.iter().enumerate();
    let of = |value: &dyn Fn(&Vcpu) -> Option<f64>| -> Vec<Sample> {
        all().filter_map(|(number, vcpu)| Some((vec![("vcpu", number.to_string())], value(vcpu)?))).collect()
    };
    let states = all().filter_map(|(number, vcpu)| {
        Some((vec![("vcpu", number.to_string()), ("state", vcpu.state.clone()?)], 1.0))
    });
    let faults = all().flat_map(|(number, vcpu)| {
        let rates = vcpu.faults.iter().flatten();
        rates.map(move |(node, rate)| (vec![("vcpu", number.to_string()), ("node", node.to_string())], *rate))
    });
    vec![
        gauge("krg_vcpu_node", "The node that runs the vCPU", of(&|vcpu| vcpu.node.map(|node| node as f64))),
        gauge("krg_vcpu_pin", "The node the vCPU is pinned to", of(&|vcpu| vcpu.pin.map(|pin| pin as f64))),
        gauge("krg_vcpu_may_migrate", "1 if the vCPU has the capability MIGRATE", of(&|vcpu| Some(f64::from(u8::from(vcpu.migrate))))),
        gauge("krg_vcpu_state", "1 for what the vCPU does: running, halted or waiting", states),
        gauge("krg_vcpu_ran_ratio", "Share of the time the vCPU ran", of(&|vcpu| vcpu.ran)),
        gauge("krg_vcpu_waited_ratio", "Share of the time the vCPU waited for a CPU", of(&|vcpu| vcpu.waited)),
        gauge("krg_vcpu_stalled_ratio", "Share of the time the vCPU waited for pages", of(&|vcpu| vcpu.stalled)),
        gauge("krg_vcpu_fault_rate", "Faults of the vCPU a second, by the node that had the page", faults),
    ]
}

fn pages(status: &Status) -> Vec<Family> {
    let (mut bounces, mut faults) = (Vec::new(), Vec::new());
    for (number, node) in status.nodes.iter().enumerate() {
        for page in node.told.iter().flat_map(|told| &told.hot_pages) {
            let labels = vec![("node", number.to_string()), ("page", format!("{:#x}", page.address))];
            for (thread, count) in &page.threads {
                let mut labels = labels.clone();
                labels.push(("thread", thread.clone()));
                faults.push((labels, *count as f64));
            }
            bounces.push((labels, page.bounces as f64));
        }
    }
    vec![
        gauge("krg_hot_page_bounces", "Times one of the most contended pages was taken away soon after it had come", bounces),
        gauge("krg_hot_page_faults", "Faults of a thread on one of the most contended pages", faults),
    ]
}

fn gauge(name: &'static str, help: &'static str, samples: impl IntoIterator<Item = Sample>) -> Family {
    Family { name, help, kind: MetricType::Gauge, samples: samples.into_iter().collect() }
}

fn counter(name: &'static str, help: &'static str, samples: impl IntoIterator<Item = Sample>) -> Family {
    Family { name, help, kind: MetricType::Counter, samples: samples.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn status() -> Status {
        Status::read(&json!({"name": "m", "at_ms": 9500, "cpus": 2, "memory": 4096, "sched": {"policy": "affinity", "moves": 3},
            "nodes": [{"host": "a", "online": true, "vcpus": [0, 1], "statistics": {"at_ms": 5000, "bounces": 7,
                "dsm": {"read_faults": 11, "flushes": 12, "words_merged": 13}, "copies": {"pages": 2},
                "hot_pages": [{"address": 0x1000, "faults": 5, "bounces": 4, "threads": [{"thread": "a\"b\\", "faults": 5}]}]}},
                {"host": "b", "online": false}],
            "vcpus": [{"node": 0, "migrate": true, "load": {"ran": 0.25, "waited": 0.5, "faults": [[1, 2.5]], "state": "halted"}}]}))
    }

    #[test]
    fn what_is_known_has_a_sample_and_what_is_not_has_none() {
        let text = text(&status()).unwrap();
        for line in [
            "krg_vcpus 2.0",
            "krg_sched_policy{policy=\"affinity\"} 1.0",
            "krg_sched_moves_total 3.0",
            "krg_node_online{node=\"1\",host=\"b\"} 0.0",
            "krg_node_load{node=\"0\",host=\"a\"} 0.75",
            "krg_node_figures_age_seconds{node=\"0\",host=\"a\"} 4.5",
            "krg_faults_total{node=\"0\",host=\"a\",kind=\"read\"} 11.0",
            "krg_bounces_total{node=\"0\",host=\"a\"} 7.0",
            "krg_page_table_flushes_total{node=\"0\",host=\"a\"} 12.0",
            "krg_page_table_words_merged_total{node=\"0\",host=\"a\"} 13.0",
            "krg_copies_bytes{node=\"0\",host=\"a\"} 8192.0",
            "krg_vcpu_state{vcpu=\"0\",state=\"halted\"} 1.0",
            "krg_vcpu_fault_rate{vcpu=\"0\",node=\"1\"} 2.5",
            "krg_hot_page_bounces{node=\"0\",page=\"0x1000\"} 4.0",
            "krg_hot_page_faults{node=\"0\",page=\"0x1000\",thread=\"a\\\"b\\\\\"} 5.0",
            "# TYPE krg_bounces counter",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        for name in ["krg_pages_in", "krg_page_table_conflicts", "krg_vcpu_pin", "krg_vcpu_stalled_ratio", "krg_sched_decisions", "kind=\"write\""] {
            assert!(!text.contains(name), "{name} in\n{text}");
        }
    }

    #[test]
    fn every_metric_is_documented_and_nothing_else() {
        let words = include_str!("../../METRICS.md").split('`');
        let documented: BTreeSet<&str> = words.filter(|word| word.starts_with("krg_")).collect();
        let families = families(&status());
        let names: BTreeSet<String> = families
            .iter()
            .map(|family| format!("{}{}", family.name, if matches!(family.kind, MetricType::Counter) { "_total" } else { "" }))
            .collect();
        assert_eq!(names.iter().map(String::as_str).collect::<BTreeSet<_>>(), documented);
        assert_eq!(names.len(), families.len());
    }
}
