use std::io::{BufRead, BufReader};

use krg_scheduler::{Reason, replay};
use vmm_sys_util::tempdir::TempDir;

use super::join::tests::{measured, report};
use super::*;

/// A machine of two nodes with two CPUs each.
fn schedule(policy: &str, log: Option<PathBuf>) -> (Schedule, Wishes) {
    let wishes = Wishes::new(2);
    let wanted = Wanted { policy: policy.into(), log };
    (Schedule::new(&wanted, vec![2, 2], wishes.clone()).unwrap(), wishes)
}

/// What the nodes report of vCPUs 0 on node 0 and 1 on node 1 that fight for a page.
fn fight() -> [NodeLoad; 2] {
    let fetches = |vcpu: u32, from: usize| {
        let mut load = report(vec![measured(vcpu, 0.1, 0.9)], &[(0x1000, vcpu, from, 900.0)]);
        load.vcpus[0].faults = vec![(from, 900.0)];
        load
    };
    [fetches(0, 1), fetches(1, 0)]
}

const APART: [(usize, u64); 2] = [(0, 0), (1, 0)];

/// Both nodes report at this time; the moves.
fn both(schedule: &Schedule, at: u64) -> Vec<Decision> {
    let [zero, one] = fight();
    let mut scheduler = schedule.lock();
    assert_eq!(scheduler.report(0, zero, &APART, at - 1), Ok(vec![]), "the other node has not reported");
    scheduler.report(1, one, &APART, at).unwrap()
}

#[test]
fn a_decision_is_made_when_every_node_has_reported_since_the_last() {
    let (schedule, wishes) = schedule("affinity", None);
    let moves = both(&schedule, 500);
    assert_eq!((moves.len(), moves[0].vcpu, moves[0].from, moves[0].to), (1, 0, 0, 1));
    assert!(matches!(moves[0].reason, Reason::Together { with: 1, .. }));
    assert_eq!(schedule.show()["last"][0]["outcome"], "under way");
    // Nothing more while it moves.
    assert_eq!(both(&schedule, 6500), []);
    schedule.lock().ended(&moves[0], MoveAnswer::Moved(1), 6600);
    let shown = schedule.show();
    assert_eq!((&shown["moves"], &shown["last"][0]["outcome"], &shown["last"][0]["at_ms"]), (&json!(1), &json!("moved"), &json!(500)));
    assert!(matches!(wishes.why(0), Some(Why::Scheduled(why)) if why.contains("vCPU 1")));
    assert!(schedule.explain(0)["message"].as_str().unwrap().contains("vCPU 1"), "{}", schedule.explain(0));
    assert_eq!(schedule.explain(7), Value::Null);
}

#[test]
fn an_old_report_is_not_used_and_neither_is_a_bad_one() {
    let (schedule, _) = schedule("affinity", None);
    let [zero, one] = fight();
    let mut scheduler = schedule.lock();
    assert_eq!(scheduler.report(0, zero.clone(), &APART, 0), Ok(vec![]));
    assert_eq!(scheduler.report(1, one.clone(), &APART, 1 + STALE), Ok(vec![]), "node 0 was heard of too long ago");
    let mut bad = zero.clone();
    bad.vcpus[0].ran = f64::NAN;
    assert!(scheduler.report(0, bad, &APART, 2 + STALE).is_err());
    assert!(scheduler.report(7, zero.clone(), &APART, 2 + STALE).is_err());
    let mut elsewhere = zero.clone();
    elsewhere.vcpus[0].epoch = 5;
    assert_eq!(scheduler.report(0, elsewhere, &APART, 2 + STALE), Ok(vec![]), "a stay that is not known");
    assert_eq!(scheduler.report(0, zero, &APART, 3 + STALE).unwrap().len(), 1);
}

#[test]
fn pins_and_capabilities_are_obeyed() {
    let (schedule, wishes) = schedule("affinity", None);
    wishes.pin(0, Some(0));
    let moves = both(&schedule, 500);
    assert_eq!(moves.iter().map(|m| (m.vcpu, m.to)).collect::<Vec<_>>(), [(1, 0)], "the one that may");
    schedule.lock().ended(&moves[0], MoveAnswer::NodeLost, 600);
    wishes.allow(1, false);
    assert_eq!(both(&schedule, 20_000), []);
    wishes.allow(1, true);
    assert_eq!(both(&schedule, 40_000).len(), 1);
}

#[test]
fn off_moves_nobody_and_another_policy_takes_over() {
    let (schedule, wishes) = schedule(OFF, None);
    wishes.pin(0, Some(1));
    assert_eq!(both(&schedule, 500), []);
    assert_eq!(schedule.show()["policy"], OFF);
    assert_eq!(schedule.set("fair").unwrap_err().errno, "EINVAL");
    schedule.set("static").unwrap();
    assert_eq!(schedule.show()["policy"], "static");
    let moves = both(&schedule, 1000);
    assert_eq!((moves.len(), &moves[0].reason), (1, &Reason::Pinned));
    schedule.set(OFF).unwrap();
    schedule.lock().ended(&moves[0], MoveAnswer::Moved(1), 1100);
    assert_eq!(both(&schedule, 1500), []);
    wishes.pin(0, None);
    schedule.set("affinity").unwrap();
    assert_eq!(both(&schedule, 2000).len(), 1);
}

#[test]
fn after_a_failure_a_vcpu_is_left_alone_longer_each_time() {
    let (schedule, wishes) = schedule("affinity", None);
    wishes.allow(1, false);
    let mut tried = Vec::new();
    for at in (500..300_000).step_by(500) {
        for decision in both(&schedule, at) {
            schedule.lock().ended(&decision, MoveAnswer::Busy, at);
            tried.push(at);
        }
    }
    assert!(tried.len() > 3 && tried.len() < 20, "{tried:?}");
    assert!(tried.windows(3).all(|t| t[2] - t[1] >= t[1] - t[0]), "{tried:?}");
    assert_eq!(schedule.show()["failures"], tried.len());
    assert_eq!(schedule.show()["last"][0]["outcome"], "failed");
}

#[test]
fn a_guest_that_restarts_waits_for_no_move_of_before() {
    let (schedule, _) = schedule("affinity", None);
    assert_eq!(both(&schedule, 500).len(), 1);
    schedule.start();
    assert_eq!(schedule.show()["last"][0]["outcome"], "failed");
    assert_eq!(both(&schedule, 20_000).len(), 1);
}

#[test]
fn what_is_logged_can_be_replayed() {
    let dir = TempDir::new_with_prefix("/tmp/krg-sched").unwrap();
    let path = dir.as_path().join("log");
    let (schedule, wishes) = schedule("affinity", Some(path.clone()));
    wishes.allow(1, false);
    for at in (500..20_000).step_by(500) {
        for decision in both(&schedule, at) {
            schedule.lock().ended(&decision, MoveAnswer::Busy, at);
        }
    }
    let lines = BufReader::new(std::fs::File::open(&path).unwrap()).lines();
    let records: Vec<Record> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!(records.len() as u64, schedule.lock().decisions);
    assert!(records.iter().any(|record| !record.decisions.is_empty()));
    assert_eq!(replay(&records), Ok(()));
    let refused = Schedule::new(&Wanted { policy: OFF.into(), log: Some(dir.as_path().into()) }, vec![1], wishes);
    assert!(refused.is_err_and(|error| error.to_string().contains("EISDIR")));
}
