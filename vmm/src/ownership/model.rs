//! Exhaustive search over every order of messages, of what the vCPU's thread, the nodes' vCPUs and users
//! do, and the loss of any node at any moment. Messages between two nodes may arrive in any order: the state
//! machine relies on none.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Bug, Input, Message, Outcome, Output, Ownership};
use crate::machine::Event;

const NODES: usize = 3;
/// Devices of node 0, beside the three nodes' vCPUs.
const SENDERS: usize = NODES + 1;
/// Vectors of a sender.
const VECTORS: u8 = 16;

/// What the vCPU's thread does on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Thread {
    /// Runs the vCPU.
    Owner,
    /// Has stopped, and saves.
    Saving,
    /// Has taken out what was pending, and is about to hand over.
    Drained,
    /// Runs the proxy.
    Proxy,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    ownership: Ownership,
    thread: Thread,
    /// Pending in the local APIC that this node has for the vCPU.
    lapic: Vec<Event>,
    /// What the thread took out of it when it saved.
    pending: Vec<Event>,
    /// The thread was asked to leave.
    leave: bool,
    /// To be restored by the thread.
    restore: Option<Vec<u8>>,
    dead: bool,
    /// Lost nodes this one has heard of.
    knows: Vec<usize>,
}

/// What may happen.
#[derive(Clone, Debug)]
struct Scenario {
    /// Events each sender sends.
    events: [u8; SENDERS],
    /// Moves: who asks, and where to.
    moves: Vec<(usize, usize)>,
    /// A vCPU's thread may find that it can't be saved now.
    refusing: bool,
    /// Nodes one of which may be lost.
    losing: Vec<usize>,
    bug: Option<Bug>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    nodes: Vec<Node>,
    /// Messages under way: from, to, what; in no order.
    under_way: Vec<(usize, usize, Message)>,
    sent: [u8; SENDERS],
    moves: usize,
    lost: bool,
    /// What the vCPU took of each sender.
    taken: [Vec<u8>; SENDERS],
    answers: BTreeMap<usize, Outcome>,
    wrong: Option<String>,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Deliver(usize),
    /// A sender's next event.
    Send(usize),
    /// The vCPU takes an event, on this node.
    Take(usize),
    /// A proxy hands one on.
    Drain(usize),
    Stop(usize),
    TakeOut(usize),
    Refuse(usize),
    Save(usize),
    Restore(usize),
    /// The next move is asked for.
    Move,
    Lose(usize),
    /// A node hears of a loss; what was on its way from the lost node doesn't come.
    Notice(usize, usize),
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let node = |me| {
            let mut ownership = Ownership::new(me, NODES, 0);
            if let Some(bug) = scenario.bug {
                ownership.plant(bug);
            }
            let thread = if me == 0 { Thread::Owner } else { Thread::Proxy };
            Node {
                ownership,
                thread,
                lapic: Vec::new(),
                pending: Vec::new(),
                leave: false,
                restore: None,
                dead: false,
                knows: Vec::new(),
            }
        };
        World {
            nodes: (0..NODES).map(node).collect(),
            under_way: Vec::new(),
            sent: [0; SENDERS],
            moves: 0,
            lost: false,
            taken: Default::default(),
            answers: BTreeMap::new(),
            wrong: None,
        }
    }

    fn actions(&self, scenario: &Scenario) -> Vec<Action> {
        let mut actions = Vec::new();
        for (index, (_, to, _)) in self.under_way.iter().enumerate() {
            if !self.nodes[*to].dead {
                actions.push(Action::Deliver(index));
            }
        }
        for sender in 0..SENDERS {
            if self.sent[sender] < scenario.events[sender] && !self.nodes[sender % NODES].dead {
                actions.push(Action::Send(sender));
            }
        }
        if let Some((from, _)) = scenario.moves.get(self.moves) {
            if !self.nodes[*from].dead {
                actions.push(Action::Move);
            }
        }
        for (n, node) in self.nodes.iter().enumerate().filter(|(_, node)| !node.dead) {
            match node.thread {
                Thread::Owner => {
                    if !node.lapic.is_empty() {
                        actions.push(Action::Take(n));
                    }
                    if node.leave {
                        actions.push(Action::Stop(n));
                    }
                }
                Thread::Saving => {
                    actions.push(Action::TakeOut(n));
                    if scenario.refusing {
                        actions.push(Action::Refuse(n));
                    }
                }
                Thread::Drained => actions.push(Action::Save(n)),
                Thread::Proxy => {
                    if !node.lapic.is_empty() {
                        actions.push(Action::Drain(n));
                    }
                    if node.restore.is_some() {
                        actions.push(Action::Restore(n));
                    }
                }
            }
            if !self.lost && scenario.losing.contains(&n) {
                actions.push(Action::Lose(n));
            }
            for (dead, _) in self.nodes.iter().enumerate().filter(|(_, node)| node.dead) {
                if !node.knows.contains(&dead) {
                    actions.push(Action::Notice(n, dead));
                }
            }
        }
        actions
    }

    fn act(&mut self, action: Action, scenario: &Scenario) {
        match action {
            Action::Deliver(index) => {
                let (from, to, message) = self.under_way.remove(index);
                // What a lost node sent is ignored by those who have heard of the loss.
                if !self.nodes[to].knows.contains(&from) {
                    self.step(to, Input::Message { from, message });
                }
            }
            Action::Send(sender) => {
                let event = Event::Fixed(sender as u8 * VECTORS + self.sent[sender]);
                self.sent[sender] += 1;
                match sender {
                    NODES => self.step(0, Input::Raise(event)),
                    node => self.nodes[node].lapic.push(event),
                }
            }
            Action::Take(n) => {
                if let Event::Fixed(vector) = self.nodes[n].lapic.remove(0) {
                    self.taken[usize::from(vector / VECTORS)].push(vector % VECTORS);
                }
            }
            Action::Drain(n) => {
                let event = self.nodes[n].lapic.remove(0);
                self.step(n, Input::Raise(event));
            }
            Action::Stop(n) => {
                self.nodes[n].leave = false;
                self.step(n, Input::Stopped);
                if self.nodes[n].ownership.is_leaving() {
                    self.nodes[n].thread = Thread::Saving;
                }
            }
            Action::Refuse(n) => {
                self.nodes[n].thread = Thread::Owner;
                self.step(n, Input::Refused);
            }
            Action::TakeOut(n) => {
                self.nodes[n].pending = std::mem::take(&mut self.nodes[n].lapic);
                self.nodes[n].thread = Thread::Drained;
            }
            Action::Save(n) => {
                let pending = std::mem::take(&mut self.nodes[n].pending);
                self.nodes[n].thread = Thread::Proxy;
                self.step(
                    n,
                    Input::Saved {
                        state: vec![7],
                        pending,
                    },
                );
            }
            Action::Restore(n) => {
                if self.nodes[n].restore.take() != Some(vec![7]) {
                    self.wrong = Some("another state came".into());
                }
                for event in std::mem::take(&mut self.nodes[n].lapic) {
                    self.step(n, Input::Raise(event));
                }
                self.nodes[n].thread = Thread::Owner;
                self.step(n, Input::Restored);
            }
            Action::Move => {
                let (from, to) = scenario.moves[self.moves];
                self.moves += 1;
                self.step(
                    from,
                    Input::Move {
                        id: self.moves as u64 - 1,
                        to,
                    },
                );
            }
            Action::Lose(n) => {
                self.lost = true;
                self.nodes[n].dead = true;
                self.under_way.retain(|(_, to, _)| *to != n);
            }
            Action::Notice(n, dead) => {
                self.nodes[n].knows.push(dead);
                self.under_way.retain(|(from, to, _)| (*from, *to) != (dead, n));
                self.step(n, Input::Lost(dead));
            }
        }
        self.under_way.sort_by_key(print);
    }

    fn step(&mut self, n: usize, input: Input) {
        let mut out = Output::default();
        if let Err(error) = self.nodes[n].ownership.step(input, &mut out) {
            self.wrong = Some(format!("node {n}: {error}"));
        }
        let node = &mut self.nodes[n];
        node.lapic.extend(out.deliver);
        if let Some(leave) = out.leave {
            node.leave = leave;
        }
        if let Some(state) = out.restore {
            node.restore = Some(state);
        }
        for (to, message) in out.sends {
            if to == n {
                self.wrong = Some(format!("node {n} sends {message:?} to itself"));
            } else if !self.nodes[to].dead {
                self.under_way.push((n, to, message));
            }
        }
        for (id, outcome) in out.answers {
            if self.answers.insert(id as usize, outcome).is_some() {
                self.wrong = Some(format!("move {id} is answered twice"));
            }
        }
    }

    /// What must hold in every state.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let live = || self.nodes.iter().filter(|node| !node.dead);
        let running = live().filter(|node| node.thread == Thread::Owner).count();
        let saved = self
            .under_way
            .iter()
            .filter(|(_, _, message)| matches!(message, Message::State(_)))
            .count();
        if running > 1 || running + saved > 1 {
            return Err(format!("{running} nodes run the vCPU, {saved} states are on their way"));
        }
        if live().any(|node| node.ownership.runs_here() != (node.thread == Thread::Owner)) {
            return Err("a thread runs what it may not, or doesn't run what it may".into());
        }
        for (sender, taken) in self.taken.iter().enumerate() {
            let doubled = (1..taken.len()).any(|at| taken[..at].contains(&taken[at]));
            if doubled || !self.lost && !taken.is_sorted() {
                return Err(format!("the events of sender {sender} came as {taken:?}"));
            }
        }
        Ok(())
    }

    /// What must hold when nothing can happen any more.
    fn check_end(&self, scenario: &Scenario) -> Result<(), String> {
        for (number, (from, _)) in scenario.moves.iter().enumerate().take(self.moves) {
            if !self.nodes[*from].dead && !self.answers.contains_key(&number) {
                return Err(format!("move {number} was never answered"));
            }
        }
        if self
            .nodes
            .iter()
            .any(|node| !node.dead && node.restore.is_none() && node.ownership.is_stuck())
        {
            return Err("a vCPU arrives for ever".into());
        }
        if self.lost {
            return Ok(());
        }
        if self.nodes.iter().filter(|node| node.ownership.runs_here()).count() != 1 {
            return Err("nobody runs the vCPU".into());
        }
        for (sender, taken) in self.taken.iter().enumerate() {
            if taken.len() != usize::from(self.sent[sender]) {
                return Err(format!(
                    "of {} events of sender {sender} came {taken:?}",
                    self.sent[sender]
                ));
            }
        }
        self.nodes
            .iter()
            .try_for_each(|node| node.ownership.at_rest().map_err(|error| error.to_string()))
    }
}

/// A number that tells one thing from another.
fn print(of: &impl Hash) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        of.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}

/// Visits every state; returns how many there are, or how one went wrong.
fn explore(scenario: &Scenario) -> Result<usize, String> {
    const LIMIT: usize = 6_000_000;
    let start = World::new(scenario);
    let mut seen = HashSet::from([print(&start)]);
    let mut steps: Vec<Option<(usize, Action)>> = vec![None];
    let mut stack = vec![(start, 0)];
    while let Some((world, number)) = stack.pop() {
        let actions = world.actions(scenario);
        let mut verdict = world.check();
        // Moves that nobody has to ask for, and a loss that need not be.
        let over = actions.iter().all(|action| matches!(action, Action::Lose(_)));
        if over {
            verdict = verdict.and_then(|()| world.check_end(scenario));
        }
        if seen.len() > LIMIT {
            verdict = Err("too many states".into());
        }
        if let Err(what) = verdict {
            let mut story = Vec::new();
            let mut at = number;
            while let Some((before, action)) = steps[at] {
                story.push(format!("{action:?}"));
                at = before;
            }
            story.reverse();
            return Err(format!("{what} after {}: {world:?}", story.join(", ")));
        }
        for action in actions {
            let mut next = world.clone();
            next.act(action, scenario);
            if seen.insert(print(&next)) {
                steps.push(Some((number, action)));
                stack.push((next, steps.len() - 1));
            }
        }
    }
    Ok(seen.len())
}

fn holds(name: &str, scenario: Scenario) {
    match explore(&scenario) {
        Ok(states) => println!("{name}: {states} states"),
        Err(what) => panic!("{name}: {what}"),
    }
}

fn is_caught(scenario: Scenario, bug: Bug) {
    let found = explore(&Scenario {
        bug: Some(bug),
        ..scenario
    });
    match found {
        Err(what) => println!("{bug:?} is caught: {}", what.lines().next().unwrap_or_default()),
        Ok(states) => panic!("{bug:?} is not caught in {states} states"),
    }
}

fn scenario(events: [u8; SENDERS], moves: &[(usize, usize)]) -> Scenario {
    Scenario {
        events,
        moves: moves.to_vec(),
        refusing: false,
        losing: Vec::new(),
        bug: None,
    }
}

const ANY: &[usize] = &[0, 1, 2];

#[test]
fn one_move_loses_and_doubles_nothing() {
    holds("one move, all send", scenario([2, 1, 1, 1], &[(0, 1)]));
    holds("one move, the target sends", scenario([1, 3, 0, 1], &[(2, 1)]));
    holds("one move, a third node sends", scenario([1, 0, 3, 1], &[(2, 1)]));
}

#[test]
fn moves_that_meet_lose_and_double_nothing() {
    holds("there and back", scenario([1, 2, 0, 0], &[(0, 1), (0, 0)]));
    holds("round", scenario([0, 0, 2, 0], &[(0, 1), (1, 2), (2, 0)]));
    holds("two at once", scenario([0, 1, 1, 0], &[(0, 1), (2, 2)]));
    holds("to where it is", scenario([0, 1, 0, 1], &[(1, 0), (1, 1), (2, 1)]));
}

#[test]
fn a_move_that_is_off_loses_and_doubles_nothing() {
    let refusing = |scenario: Scenario| Scenario {
        refusing: true,
        ..scenario
    };
    holds("one move, perhaps off", refusing(scenario([1, 1, 2, 1], &[(0, 1)])));
    holds(
        "two moves, perhaps off",
        refusing(scenario([0, 1, 1, 0], &[(0, 1), (2, 2)])),
    );
    let losing = Scenario {
        losing: ANY.to_vec(),
        ..scenario([0, 1, 1, 0], &[(0, 1)])
    };
    holds("one move, perhaps off, and a loss", refusing(losing));
}

#[test]
fn the_loss_of_any_node_at_any_moment_leaves_one_owner_at_most_and_nobody_waiting() {
    let losing = |scenario: Scenario| Scenario {
        losing: ANY.to_vec(),
        ..scenario
    };
    holds("one move and a loss", losing(scenario([1, 1, 1, 0], &[(0, 1)])));
    holds(
        "one move, asked from elsewhere, and a loss",
        losing(scenario([0, 2, 0, 1], &[(2, 1)])),
    );
    holds(
        "two moves and a loss",
        losing(scenario([0, 1, 1, 0], &[(0, 1), (2, 2)])),
    );
    holds(
        "there and back, and a loss",
        losing(scenario([1, 1, 0, 0], &[(1, 1), (0, 0)])),
    );
}

#[test]
fn planted_bugs_are_caught() {
    is_caught(scenario([0, 0, 2, 0], &[(0, 1)]), Bug::OrderIgnored);
    is_caught(scenario([0, 2, 0, 0], &[(0, 1)]), Bug::OwnEventsNotAwaited);
    is_caught(scenario([0, 0, 2, 0], &[(0, 1)]), Bug::DeliveredAfterStop);
    is_caught(scenario([0, 0, 1, 0], &[(0, 1)]), Bug::KeptForgotten);
    is_caught(scenario([0, 0, 0, 0], &[(0, 1)]), Bug::StaysOwner);
    let losing = Scenario {
        losing: ANY.to_vec(),
        ..scenario([0, 1, 0, 0], &[(2, 1)])
    };
    is_caught(losing, Bug::LossIgnored);
}
