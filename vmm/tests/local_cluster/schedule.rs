//! The scheduler in the running program: two node processes, the front end that decides, and a guest whose vCPUs
//! share pages or crowd a host.

use std::io::{BufRead, BufReader};
use std::sync::MutexGuard;
use std::thread;
use std::time::{Duration, Instant};

use krg_guest_kernel::micro::boot::{self, Begin};
use krg_guest_kernel::micro::load::{self, Phase, Work};
use krg_scheduler::{Reason, Record, replay};
use serde_json::{Value, json};

use super::nodes;
use super::program::{PATIENCE, Program};

const MEMORY: u64 = 256 << 20;
/// A page of the first node and one of the second.
const SHARED: u64 = boot::DATA + (2 << 20);
/// Ticks of the TSC between two words on the console.
const EVERY: u32 = 1 << 30;
/// As long as the scheduler needs for several decisions, in which nothing must happen.
const QUIET: Duration = Duration::from_secs(4);

/// A guest with a vCPU for each of these; `None`: it halts.
fn guest(works: &[Option<Work>]) -> Vec<u8> {
    let phase = |work| Phase { work, until: u64::MAX };
    let program = |vcpu: usize| [phase(works[vcpu].unwrap_or(Work::Count))];
    let micro = boot::builder(MEMORY).build(works.len(), |asm, vcpu| load::program(asm, vcpu, &program(vcpu), EVERY)).unwrap();
    boot::elf(&micro, |vcpu| if works[vcpu].is_some() { Begin::Now } else { Begin::Never }).unwrap()
}

const TURNS: [Option<Work>; 2] = [Some(Work::Turns { word: SHARED, odd: false }), Some(Work::Turns { word: SHARED, odd: true })];

struct Machine {
    program: Program,
    _turn: MutexGuard<'static, ()>,
}

impl Machine {
    /// Two hosts with two CPUs each; the vCPUs are shared out evenly, in order.
    fn start(works: &[Option<Work>], words: &[&str]) -> Self {
        let turn = nodes::turn();
        let cpus = works.len().to_string();
        let all = [&["--cpus", &cpus, "--memory", "256M"], words].concat();
        let program = Program::start_with(&guest(works), Some("127.0.0.1 cpus=2\n127.0.0.1 cpus=2\n"), &all);
        let until = Instant::now() + PATIENCE;
        while !program.place.as_path().join("api").exists() {
            assert!(Instant::now() < until, "nobody listens on the control socket");
            thread::sleep(Duration::from_millis(10));
        }
        Machine { program, _turn: turn }
    }

    fn status(&self) -> Value {
        self.program.ask(r#"{"cmd":"status"}"#)["status"].clone()
    }

    fn good(&self, request: &str) -> Value {
        let answer = self.program.ask(request);
        assert_eq!(answer["ok"], true, "{request}: {answer}");
        answer
    }

    /// Asks until the answer is what is waited for.
    fn wait(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if is(&status) {
                return status;
            }
            assert!(Instant::now() < until, "{what}: {status:#}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn quiet(&self) -> Value {
        thread::sleep(QUIET);
        self.status()
    }

    fn end(self) {
        self.good(r#"{"cmd":"stop"}"#);
        assert_eq!(self.program.end().status, Some(5));
    }
}

fn vcpus(status: &Value) -> &Vec<Value> {
    status["vcpus"].as_array().unwrap()
}

fn places(status: &Value) -> Vec<u64> {
    vcpus(status).iter().map(|vcpu| vcpu["node"].as_u64().unwrap()).collect()
}

fn moves(status: &Value) -> u64 {
    status["sched"]["moves"].as_u64().unwrap()
}

/// The pages each vCPU fetched a second; `None`: it was not measured yet where it is.
fn faults(status: &Value) -> Option<Vec<f64>> {
    let of = |vcpu: &Value| Some(vcpu["load"]["faults"].as_array()?.iter().filter_map(|fault| fault[1].as_f64()).sum());
    vcpus(status).iter().map(of).collect()
}

/// The pair is measured, and fights.
fn fights(status: &Value) -> bool {
    faults(status).is_some_and(|faults| faults.iter().all(|rate| *rate > 10.0))
}

#[test]
fn two_vcpus_that_write_to_one_page_in_turn_are_brought_together_and_stay() {
    let machine = Machine::start(&TURNS, &["--sched-log", "log"]);
    let status = machine.wait("they don't come together", |status| moves(status) == 1);
    let last = status["sched"]["last"][0].clone();
    let moved = last["vcpu"].as_u64().unwrap();
    let pair = format!("it and vCPU {} there take pages from each other", 1 - moved);
    assert!(last["reason"].as_str().unwrap().contains(&pair), "{last}");
    assert_eq!((&last["outcome"], &status["vcpus"][moved as usize]["why"]), (&json!("moved"), &json!("scheduled")));
    let explained = machine.good(&format!(r#"{{"cmd":"explain","vcpu":{moved}}}"#))["explain"].clone();
    assert!(explained["message"].as_str().unwrap().contains(&pair), "{explained}");
    machine.wait("faults go on", |status| faults(status).is_some_and(|faults| faults == [0.0, 0.0]));
    let status = machine.quiet();
    assert_eq!(moves(&status), 1, "{status:#}");
    machine.wait("faults have begun again", |status| faults(status).is_some_and(|faults| faults == [0.0, 0.0]));
    let log = std::fs::File::open(machine.program.place.as_path().join("log")).unwrap();
    machine.end();
    let records = BufReader::new(log).lines().map(|line| serde_json::from_str(&line.unwrap()));
    let records: Vec<Record> = records.collect::<Result<_, _>>().unwrap();
    assert_eq!(replay(&records), Ok(()));
    let decisions: Vec<_> = records.iter().flat_map(|record| &record.decisions).collect();
    assert!(matches!(decisions[..], [d] if matches!(d.reason, Reason::Together { .. })), "{decisions:?}");
}

#[test]
fn pins_capabilities_and_off_keep_vcpus_apart() {
    let machine = Machine::start(&TURNS, &["--sched", "off"]);
    machine.wait("they don't fight", fights);
    let apart = |what: &str| {
        let status = machine.quiet();
        assert_eq!((places(&status), moves(&status)), (vec![0, 1], 0), "{what}: {status:#}");
        // One measurement may have fallen into a moment in which this machine was elsewhere.
        machine.wait(what, fights);
    };
    apart("off");
    machine.good(r#"{"cmd":"pin","vcpu":0,"node":0}"#);
    machine.good(r#"{"cmd":"capset","vcpu":1,"migrate":false}"#);
    assert_eq!(machine.good(r#"{"cmd":"sched","policy":"affinity"}"#)["sched"]["policy"], "affinity");
    apart("pinned and without the capability");
    // The one that may move does; the pinned one stays.
    machine.good(r#"{"cmd":"capset","vcpu":1,"migrate":true}"#);
    // The new host's word and the outcome of the move come one after the other.
    machine.wait("the other does not come", |status| moves(status) == 1 && places(status) == [0, 0]);
    machine.end();
}

#[test]
fn a_crowded_host_is_relieved_and_then_nothing_moves() {
    // Four that count, on two hosts with two CPUs each; the user has crowded the first.
    let machine = Machine::start(&[Some(Work::Count); 4], &["--sched", "off"]);
    machine.wait("they don't run", |status| faults(status).is_some());
    machine.good(r#"{"cmd":"migrate","vcpu":"all","node":0}"#);
    assert_eq!(places(&machine.status()), [0; 4]);
    machine.good(r#"{"cmd":"sched","policy":"affinity"}"#);
    // A new host's word and the outcome of the move come one after the other.
    let even = |status: &Value| places(status).iter().filter(|node| **node == 0).count() == 2 && moves(status) >= 2;
    let before = machine.wait("the load does not get even", even);
    let status = machine.quiet();
    assert_eq!((places(&status), moves(&status)), (places(&before), moves(&before)), "{status:#}");
    assert_eq!(moves(&status), 2);
    machine.end();
}
