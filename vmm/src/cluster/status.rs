//! What the control socket says of a machine, read into numbers. What a node did not say, or said in a form that
//! makes no sense, is `None`: figures come from other hosts, and a newer or older node may have others.

use serde_json::Value;

/// Longest text from elsewhere that is shown.
const LONGEST: usize = 2000;

/// Most contended pages of a node, and threads of a page, that are shown.
const MOST_PAGES: usize = 64;
const MOST_THREADS: usize = 32;

/// The answer to `{"cmd":"status"}`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The machine's name.
    pub name: String,
    /// When it was said, in milliseconds of the front end's clock.
    pub at_ms: u64,
    /// vCPUs of the machine.
    pub cpus: u64,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Who decides where vCPUs run.
    pub policy: Option<String>,
    /// How often the scheduler has decided.
    pub decisions: Option<u64>,
    /// vCPUs it has moved.
    pub moves: Option<u64>,
    /// Moves of it that failed.
    pub failures: Option<u64>,
    /// All nodes by number, those that are not online at the end.
    pub nodes: Vec<Node>,
    /// All vCPUs by number.
    pub vcpus: Vec<Vcpu>,
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Its host.
    pub host: String,
    /// It runs.
    pub online: bool,
    /// The vCPUs it runs.
    pub vcpus: Vec<u64>,
    /// Bytes of guest memory that are at home there.
    pub memory: Option<u64>,
    /// What it counted when it last told.
    pub told: Option<Told>,
}

/// Figures of a node, counted since the machine's start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// When they came, in milliseconds of the front end's clock.
    pub at_ms: u64,
    /// Faults for reading.
    pub read_faults: Option<u64>,
    /// Faults for writing to absent pages.
    pub write_faults: Option<u64>,
    /// Faults for writing to pages that could be read.
    pub upgrade_faults: Option<u64>,
    /// Mean time a fault took, in microseconds.
    pub fault_us: Option<f64>,
    /// Pages that came from other nodes.
    pub pages_in: Option<u64>,
    /// Pages that went to other nodes.
    pub pages_out: Option<u64>,
    /// Messages to other nodes.
    pub messages_out: Option<u64>,
    /// Bytes to other nodes.
    pub bytes_out: Option<u64>,
    /// Pages that were taken away soon after they had come.
    pub bounces: Option<u64>,
    /// Comparisons of replicas of page tables before a release.
    pub flushes: Option<u64>,
    /// Replicas compared in them.
    pub pages_compared: Option<u64>,
    /// Replicas that came to rest, and are not compared.
    pub rests: Option<u64>,
    /// Of these, those that were walked or written again.
    pub rests_ended: Option<u64>,
    /// And those that were given up after a long rest.
    pub departures: Option<u64>,
    /// Changed words of replicas that were sent.
    pub words_merged: Option<u64>,
    /// Pages that became replicated tables while the node owned them.
    pub promotions: Option<u64>,
    /// Replicas that the node asked to take back, as they are tables no longer or nobody else has one.
    pub demotions: Option<u64>,
    /// Words that two nodes had changed differently since the last merge.
    pub conflicts: Option<u64>,
    /// Copies that were given up for room.
    pub evictions: Option<u64>,
    /// Copies of other nodes' pages now.
    pub copies: Option<u64>,
    /// Copies there is room for.
    pub copies_limit: Option<u64>,
    /// Exits of vCPUs from KVM.
    pub exits: Option<u64>,
    /// vCPUs that came from other nodes.
    pub arrivals: Option<u64>,
    /// Interrupts sent to vCPUs on other nodes.
    pub interrupts_out: Option<u64>,
    /// Interrupts that came from other nodes.
    pub interrupts_in: Option<u64>,
    /// The pages that are fought for most, as this node sees it.
    pub hot_pages: Vec<HotPage>,
}

/// A page that hosts fight for, as one node sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HotPage {
    /// Guest-physical address.
    pub address: u64,
    /// Faults on it there.
    pub faults: u64,
    /// Times it was taken away there soon after it had come.
    pub bounces: u64,
    /// Who faults on it there, and how often.
    pub threads: Vec<(String, u64)>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vcpu {
    /// The node that runs it.
    pub node: Option<u64>,
    /// The only node it may run on.
    pub pin: Option<u64>,
    /// It has the capability MIGRATE.
    pub migrate: bool,
    /// Why it is there.
    pub reason: Option<String>,
    /// `running`, `halted` or `waiting`.
    pub state: Option<String>,
    /// Share of the time it ran, 0 to 1.
    pub ran: Option<f64>,
    /// Share of the time it waited for a CPU.
    pub waited: Option<f64>,
    /// Share of the time it waited for pages.
    pub stalled: Option<f64>,
    /// Faults a second, by the node that had the page.
    pub faults: Option<Vec<(u64, f64)>>,
}

impl Status {
    /// Reads the member `status` of an answer.
    pub fn read(status: &Value) -> Self {
        Self {
            name: text(&status["name"]).unwrap_or_default(),
            at_ms: status["at_ms"].as_u64().unwrap_or(0),
            cpus: status["cpus"].as_u64().unwrap_or(0),
            memory: status["memory"].as_u64().unwrap_or(0),
            policy: text(&status["sched"]["policy"]),
            decisions: status["sched"]["decisions"].as_u64(),
            moves: status["sched"]["moves"].as_u64(),
            failures: status["sched"]["failures"].as_u64(),
            nodes: items(&status["nodes"]).map(Node::read).collect(),
            vcpus: items(&status["vcpus"]).map(Vcpu::read).collect(),
        }
    }

    /// CPUs' worth of work that a node's vCPUs have: the time they ran, or could have.
    pub fn load(&self, node: usize) -> Option<f64> {
        let online = self.nodes.get(node)?.online;
        let mut here = self.vcpus.iter().filter(|vcpu| vcpu.node == Some(node as u64));
        online.then(|| here.try_fold(0.0, |sum, vcpu| Some(sum + vcpu.ran? + vcpu.waited?)))?
    }
}

impl Node {
    fn read(node: &Value) -> Self {
        Self {
            host: text(&node["host"]).unwrap_or_default(),
            online: node["online"] == true,
            vcpus: items(&node["vcpus"]).filter_map(Value::as_u64).collect(),
            memory: node["memory"].as_u64(),
            // Loads of vCPUs come before the first figures.
            told: node["statistics"]["at_ms"].is_u64().then(|| Told::read(&node["statistics"])),
        }
    }
}

impl Told {
    fn read(told: &Value) -> Self {
        let dsm = |name: &str| told["dsm"][name].as_u64();
        Self {
            at_ms: told["at_ms"].as_u64().unwrap_or(0),
            read_faults: dsm("read_faults"),
            write_faults: dsm("write_faults"),
            upgrade_faults: dsm("upgrade_faults"),
            fault_us: number(&told["fault_mean_us"]),
            pages_in: dsm("pages_in"),
            pages_out: dsm("pages_out"),
            messages_out: told["messages_out"].as_u64(),
            bytes_out: told["bytes_out"].as_u64(),
            bounces: told["bounces"].as_u64(),
            flushes: dsm("flushes"),
            pages_compared: dsm("pages_compared"),
            rests: dsm("rests"),
            rests_ended: dsm("rests_ended"),
            departures: dsm("departures"),
            words_merged: dsm("words_merged"),
            promotions: dsm("promotions"),
            demotions: dsm("demotions"),
            conflicts: dsm("conflicts"),
            evictions: dsm("evictions"),
            copies: told["copies"]["pages"].as_u64(),
            copies_limit: told["copies"]["limit"].as_u64(),
            exits: told["vcpu_exits"].as_u64(),
            arrivals: told["vcpu_arrivals"].as_u64(),
            interrupts_out: told["remote_interrupts_out"].as_u64(),
            interrupts_in: told["remote_interrupts_in"].as_u64(),
            hot_pages: items(&told["hot_pages"]).filter_map(HotPage::read).take(MOST_PAGES).collect(),
        }
    }

    /// Faults of all kinds.
    pub fn faults(&self) -> Option<u64> {
        self.read_faults?.checked_add(self.write_faults?)?.checked_add(self.upgrade_faults?)
    }

    /// How much a counter rose a second since `before`; `None` if that can't be told: not counted, the same figures,
    /// or those of another start of the machine.
    pub fn rate(&self, before: Option<&Told>, counter: impl Fn(&Told) -> Option<u64>) -> Option<f64> {
        let before = before?;
        let ms = self.at_ms.checked_sub(before.at_ms).filter(|ms| *ms > 0)?;
        let rise = counter(self)?.checked_sub(counter(before)?)?;
        Some(rise as f64 * 1000.0 / ms as f64)
    }
}

impl HotPage {
    fn read(page: &Value) -> Option<Self> {
        let threads = items(&page["threads"]).filter_map(|t| Some((text(&t["thread"])?, t["faults"].as_u64()?)));
        Some(Self {
            address: page["address"].as_u64()?,
            faults: page["faults"].as_u64()?,
            bounces: page["bounces"].as_u64()?,
            threads: threads.take(MOST_THREADS).collect(),
        })
    }
}

impl Vcpu {
    /// Reads a vCPU of the status or of `explain`.
    pub fn read(vcpu: &Value) -> Self {
        let load = &vcpu["load"];
        let rate = |pair: &Value| Some((pair[0].as_u64()?, number(&pair[1])?));
        Self {
            node: vcpu["node"].as_u64(),
            pin: vcpu["pin"].as_u64(),
            migrate: vcpu["migrate"] == true,
            reason: text(&vcpu["reason"]),
            state: text(&load["state"]),
            ran: number(&load["ran"]),
            waited: number(&load["waited"]),
            stalled: number(&load["stalled"]),
            faults: load["faults"].as_array().map(|pairs| pairs.iter().filter_map(rate).collect()),
        }
    }

    /// Faults a second on pages that other nodes had.
    pub fn remote_faults(&self) -> Option<f64> {
        self.faults.as_ref().map(|faults| faults.iter().filter(|(n, _)| Some(*n) != self.node).map(|(_, rate)| rate).sum())
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.is_finite() && *number >= 0.0)
}

/// Text for a terminal: one line, no control sequences, not endless.
pub fn text(value: &Value) -> Option<String> {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    value.as_str().map(|text| text.chars().map(clean).take(LONGEST).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_is_read() {
        let status = Status::read(&json!({
            "name": "m", "at_ms": 7000, "cpus": 1, "memory": 4096, "sched": {"policy": "affinity"},
            "nodes": [{"host": "a", "online": true, "vcpus": [0], "memory": 4096, "statistics": {
                "at_ms": 5000, "dsm": {"read_faults": 1, "write_faults": 2, "upgrade_faults": 3, "flushes": 4, "pages_compared": 5,
                    "words_merged": 6, "promotions": 7, "demotions": 8, "conflicts": 9},
                "hot_pages": [{"address": 4096, "faults": 5, "bounces": 4, "threads": [{"thread": "vcpu0", "faults": 5}]}]}}],
            "vcpus": [{"vcpu": 0, "node": 0, "pin": null, "migrate": true, "reason": "so",
                "load": {"ran": 0.25, "faults": [[0, 4.0], [1, 2.5]], "state": "halted"}}]}));
        assert_eq!((status.policy.as_deref(), status.nodes[0].online), (Some("affinity"), true));
        let told = status.nodes[0].told.as_ref().unwrap();
        assert_eq!((told.faults(), told.pages_in), (Some(6), None));
        assert_eq!((told.flushes, told.pages_compared, told.words_merged), (Some(4), Some(5), Some(6)));
        assert_eq!((told.promotions, told.demotions, told.conflicts), (Some(7), Some(8), Some(9)));
        assert_eq!(told.hot_pages[0].threads, [("vcpu0".to_owned(), 5)]);
        let vcpu = &status.vcpus[0];
        assert_eq!((vcpu.ran, vcpu.stalled, vcpu.remote_faults()), (Some(0.25), None, Some(2.5)));
        assert_eq!(vcpu.state.as_deref(), Some("halted"));
    }

    #[test]
    fn nonsense_is_nothing_and_not_a_number() {
        let early = json!({"nodes": [{"statistics": {"vcpu_loads": []}}]});
        assert_eq!(Status::read(&early).nodes[0].told, None);
        assert_eq!(Status::read(&json!(null)), Status::default());
        let told = Told::read(&json!({"at_ms": -1, "dsm": 7, "bounces": "many", "fault_mean_us": -3.0, "hot_pages": [3, {}]}));
        assert_eq!(told, Told::default());
        let vcpu = Vcpu::read(&json!({"node": "x", "load": {"ran": -1, "faults": [[0], "x", [0, -2]]}}));
        assert_eq!((vcpu.ran, vcpu.remote_faults(), Vcpu::default().remote_faults()), (None, Some(0.0), None));
        assert_eq!(text(&json!("a\u{1b}[2J\nb")).unwrap(), "a [2J b");
        assert_eq!(text(&json!("x".repeat(10_000))).unwrap().len(), LONGEST);
    }

    #[test]
    fn rates_are_differences_and_nothing_where_there_is_none() {
        let told = |at_ms, bounces| Told { at_ms, bounces, ..Told::default() };
        let rate = |before, now: Told| now.rate(before, |told| told.bounces);
        let before = told(1000, Some(10));
        assert_eq!(rate(Some(&before), told(3000, Some(60))), Some(25.0));
        assert_eq!(rate(None, told(3000, Some(60))), None);
        // The same figures twice, a start of the guest between, and nothing counted.
        assert_eq!(rate(Some(&before), told(1000, Some(10))), None);
        assert_eq!(rate(Some(&before), told(3000, Some(9))), None);
        assert_eq!(rate(Some(&before), told(3000, None)), None);
    }
}
