//! What users ask of a running machine over the control socket, carried out: moves, pins, capabilities. Whether
//! they may is decided before anybody hears of it; an answer comes when the thing is done.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use krg_scheduler::Placement;
use serde_json::{Value, json};

use super::api::{Failure, Request};
use super::attend::{FrontEvent, Statistics};
use super::explain;
use super::vcpus::{Refusal, Why, Wishes};
use crate::node::MoveAnswer;

/// What decides where vCPUs run, as users see it.
pub trait Scheduling: Send + Sync {
    /// `{"cmd":"sched"}`: at least `"policy"`, the name of the policy at work, or `off`.
    fn show(&self) -> Value;

    /// Has another policy decide from now on, or with `off` none.
    ///
    /// # Errors
    /// EINVAL for a name that is none.
    fn set(&self, policy: &str) -> Result<(), Failure>;

    /// What it has to say about a vCPU: null, or members for programs and a `"message"` for people.
    fn explain(&self, vcpu: u32) -> Value;
}

/// There is no such policy.
pub fn no_policy(name: &str) -> Failure {
    Failure::new("EINVAL", format!("there is no policy {name:?}; there are {} and off", krg_scheduler::NAMES.join(", ")))
}

/// A running machine, as its users may ask about and change it.
pub struct Admin {
    /// The machine's name.
    pub name: String,
    /// What the machine is made of.
    pub placement: Placement,
    /// What each node's host is called.
    pub names: Vec<String>,
    /// Hosts of the file that did not answer: nodes that are not online, numbered after those that are.
    pub offline: Vec<String>,
    /// What the nodes told.
    pub statistics: Statistics,
    /// What the user decided.
    pub wishes: Wishes,
    /// Who decides where vCPUs run.
    pub scheduling: Arc<dyn Scheduling>,
    /// The way to the machine.
    pub events: Sender<FrontEvent>,
}

/// Where a vCPU is to go.
#[derive(Clone, Copy)]
enum Goal {
    Node(usize),
    /// Where the placement put it.
    Home,
}

/// A move that was asked for, and how it will end.
struct Asked {
    vcpu: u32,
    from: Option<usize>,
    to: usize,
    answer: Receiver<MoveAnswer>,
}

/// How a request to move ended well.
enum Went {
    Moved,
    WasThere,
}

impl Admin {
    /// Answers one request with the members that a good answer has besides `ok`.
    ///
    /// # Errors
    /// Each reason has an errno of its own. Nothing is changed then.
    pub fn answer(&self, request: Request) -> Result<Value, Failure> {
        match request {
            Request::Status => Ok(json!({"status": self.status()})),
            Request::Stop => {
                let _ = self.events.send(FrontEvent::Quit("asked over the control socket".into()));
                Ok(json!({}))
            }
            Request::Migrate { vcpu, node } => self.migrate(&vcpu, &node),
            Request::Pin { vcpu, node } => self.pin(&vcpu, &node),
            Request::Capset { vcpu, migrate } => self.capset(&vcpu, migrate),
            Request::Sched { policy: None } => Ok(json!({"sched": self.scheduling.show()})),
            Request::Sched { policy: Some(name) } => {
                self.scheduling.set(&name)?;
                Ok(json!({"sched": self.scheduling.show()}))
            }
            Request::Explain { vcpu: Some(vcpu), page: None } => {
                let vcpu = self.vcpu(&vcpu)?;
                Ok(json!({"explain": explain::vcpu(self, vcpu)}))
            }
            Request::Explain { vcpu: None, page: Some(page) } => Ok(json!({"explain": explain::page(self, &page)?})),
            Request::Explain { .. } => Err(Failure::new("EINVAL", "explain either a vcpu or a page".into())),
        }
    }

    /// Everything that is known of the machine.
    pub fn status(&self) -> Value {
        let told: Vec<Value> = (0..self.names.len()).map(|node| self.statistics.of(node)).collect();
        let of = |vcpu| self.vcpu_told(vcpu, self.statistics.owner(vcpu).and_then(|node| told.get(node)));
        let vcpus: Vec<Value> = (0..self.placement.cpus()).map(of).collect();
        let nodes = self.names.iter().zip(&self.placement.hosts).zip(told).enumerate().map(|(node, ((host, share), told))| {
            json!({"node": node, "host": host, "online": true, "vcpus": self.statistics.vcpus(node),
                "memory": share.memory, "statistics": told})
        });
        let offline = self.offline.iter().zip(self.names.len()..);
        let offline = offline.map(|(host, node)| json!({"node": node, "host": host, "online": false}));
        let nodes: Vec<Value> = nodes.chain(offline).collect();
        json!({"name": self.name, "state": "running", "at_ms": self.statistics.now_ms(), "cpus": self.placement.cpus(),
            "memory": self.placement.memory(), "sched": self.scheduling.show(), "nodes": nodes, "vcpus": vcpus})
    }

    /// One vCPU: where it is and why, what the user decided, and its load as its node told last.
    pub fn vcpu_status(&self, vcpu: u32) -> Value {
        self.vcpu_told(vcpu, self.statistics.owner(vcpu).map(|node| self.statistics.of(node)).as_ref())
    }

    /// The same, with what its node told last.
    fn vcpu_told(&self, vcpu: u32, told: Option<&Value>) -> Value {
        let loads = told.and_then(|told| told["vcpu_loads"].as_array());
        let load = loads.and_then(|loads| loads.iter().find(|load| load["vcpu"] == vcpu));
        let wish = self.wishes.of(vcpu);
        let why = self.wishes.why(vcpu);
        json!({"vcpu": vcpu, "node": self.statistics.owner(vcpu), "home": self.placement.owner(vcpu),
            "pin": wish.and_then(|wish| wish.pin), "migrate": wish.is_some_and(|wish| wish.may_migrate),
            "why": why.as_ref().map(Why::name), "reason": why.map(|why| why.to_string()), "load": load})
    }

    fn migrate(&self, vcpu: &Value, node: &Value) -> Result<Value, Failure> {
        let goal = self.goal(node)?;
        if vcpu == "all" {
            return Ok(self.migrate_all(goal));
        }
        let vcpu = self.vcpu(vcpu)?;
        let to = self.resolve(vcpu, goal);
        let from = self.statistics.owner(vcpu);
        Ok(match self.move_one(vcpu, to)? {
            Went::Moved => json!({"moved": true, "vcpu": vcpu, "from": from, "node": to}),
            Went::WasThere => json!({"moved": false, "vcpu": vcpu, "node": to,
                "message": format!("vCPU {vcpu} is on node {to} already")}),
        })
    }

    /// Moves all that may, at once. What can't does not keep the others.
    fn migrate_all(&self, goal: Goal) -> Value {
        let asked: Vec<_> = (0..self.placement.cpus())
            .map(|vcpu| (vcpu, self.ask(vcpu, self.resolve(vcpu, goal))))
            .collect();
        let (mut moved, mut there, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for (vcpu, asked) in asked {
            let to = self.resolve(vcpu, goal);
            let went = match asked {
                Ok(Some(asked)) => {
                    let from = asked.from;
                    self.wait(asked).map(|went| (went, from))
                }
                Ok(None) => Ok((Went::WasThere, None)),
                Err(failure) => Err(failure),
            };
            match went {
                Ok((Went::Moved, from)) => moved.push(json!({"vcpu": vcpu, "from": from, "node": to})),
                Ok((Went::WasThere, _)) => there.push(json!({"vcpu": vcpu, "node": to})),
                Err(Failure { errno, line }) => refused.push(json!({"vcpu": vcpu, "errno": errno, "error": line})),
            }
        }
        json!({"moved": moved, "there": there, "refused": refused})
    }

    /// Pins a vCPU to a node, where it is when this is answered; null lifts the pin.
    fn pin(&self, vcpu: &Value, node: &Value) -> Result<Value, Failure> {
        if node.is_null() {
            let vcpu = self.vcpu(vcpu)?;
            self.wishes.pin(vcpu, None);
            return Ok(json!({"vcpu": vcpu, "pin": null, "moved": false, "node": self.statistics.owner(vcpu)}));
        }
        let to = self.node(node)?;
        let vcpu = self.vcpu(vcpu)?;
        let Some(wish) = self.wishes.of(vcpu) else { return Err(no_vcpu(&json!(vcpu))) };
        if !wish.may_migrate && self.statistics.owner(vcpu) != Some(to) {
            return Err(refused(vcpu, Refusal::Dropped));
        }
        // From now on nobody moves it elsewhere; a scheduler may even be quicker to move it there.
        self.wishes.pin(vcpu, Some(to));
        let went = self.move_one(vcpu, to).inspect_err(|_| self.wishes.pin_again(vcpu, Some(to), wish.pin))?;
        Ok(json!({"vcpu": vcpu, "pin": to, "moved": matches!(went, Went::Moved), "node": to}))
    }

    fn capset(&self, vcpu: &Value, migrate: bool) -> Result<Value, Failure> {
        let vcpus = match vcpu {
            all if all == "all" => (0..self.placement.cpus()).collect(),
            one => vec![self.vcpu(one)?],
        };
        vcpus.iter().for_each(|vcpu| self.wishes.allow(*vcpu, migrate));
        Ok(json!({"vcpus": vcpus, "migrate": migrate}))
    }

    /// Moves a vCPU and waits until it is there.
    fn move_one(&self, vcpu: u32, to: usize) -> Result<Went, Failure> {
        self.ask(vcpu, to)?.map_or(Ok(Went::WasThere), |asked| self.wait(asked))
    }

    /// Asks for a move that is permitted; `None`: it is there already.
    fn ask(&self, vcpu: u32, to: usize) -> Result<Option<Asked>, Failure> {
        let from = self.statistics.owner(vcpu);
        let (reply, answer) = channel();
        let send = || self.events.send(FrontEvent::Migrate { vcpu, node: to, reply });
        match self.wishes.if_permitted(vcpu, to, send) {
            None => Err(no_vcpu(&json!(vcpu))),
            Some(Err(_)) if from == Some(to) => Ok(None),
            Some(Err(refusal)) => Err(refused(vcpu, refusal)),
            Some(Ok(Err(_))) => Err(over()),
            Some(Ok(Ok(()))) => Ok(Some(Asked { vcpu, from, to, answer })),
        }
    }

    fn wait(&self, Asked { vcpu, to, answer, .. }: Asked) -> Result<Went, Failure> {
        match answer.recv().map_err(|_| over())? {
            MoveAnswer::Moved(_) => {
                self.wishes.came(vcpu, Why::Moved);
                Ok(Went::Moved)
            }
            MoveAnswer::AlreadyThere => Ok(Went::WasThere),
            MoveAnswer::Busy => {
                let line = format!("vCPU {vcpu}, or one that its host is starting, waits for its start-up; try again");
                Err(Failure::new("EAGAIN", line))
            }
            MoveAnswer::NoVcpu => Err(no_vcpu(&json!(vcpu))),
            MoveAnswer::NoNode => Err(self.no_node(&json!(to))),
            MoveAnswer::NodeLost => Err(Failure::new("ENONET", format!("node {to} is lost"))),
            MoveAnswer::OwnerLost => Err(Failure::new("EHOSTDOWN", format!("a node was lost, perhaps with vCPU {vcpu}"))),
        }
    }

    fn goal(&self, node: &Value) -> Result<Goal, Failure> {
        if node == "home" { Ok(Goal::Home) } else { self.node(node).map(Goal::Node) }
    }

    fn resolve(&self, vcpu: u32, goal: Goal) -> usize {
        match goal {
            Goal::Node(node) => node,
            Goal::Home => self.placement.owner(vcpu).unwrap_or(0),
        }
    }

    /// The node of a request, which is online.
    fn node(&self, node: &Value) -> Result<usize, Failure> {
        let nodes = self.names.len();
        let number = number(node).map(|node| node as usize).filter(|node| *node < nodes + self.offline.len());
        match number.ok_or_else(|| self.no_node(node))? {
            node if node < nodes => Ok(node),
            node => Err(Failure::new("ENONET", format!("node {node} is not online: its host did not answer at the start"))),
        }
    }

    /// The vCPU of a request.
    fn vcpu(&self, vcpu: &Value) -> Result<u32, Failure> {
        number(vcpu).filter(|vcpu| *vcpu < self.placement.cpus()).ok_or_else(|| no_vcpu(vcpu))
    }

    fn no_node(&self, node: &Value) -> Failure {
        Failure::new("EINVAL", format!("there is no node {}; nodes are 0 to {}", plain(node), self.names.len() - 1))
    }
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// A value of a request in a message: words without quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn no_vcpu(vcpu: &Value) -> Failure {
    Failure::new("ESRCH", format!("there is no vCPU {}", plain(vcpu)))
}

fn over() -> Failure {
    Failure::new("ECANCELED", "the machine does not run".into())
}

fn refused(vcpu: u32, refusal: Refusal) -> Failure {
    let line = match refusal {
        Refusal::Pinned(pin) => {
            format!("vCPU {vcpu} is pinned to node {pin}; lift that first (krg pin vcpu{vcpu} none) or pin it elsewhere")
        }
        Refusal::Dropped => {
            format!("vCPU {vcpu} lacks the capability MIGRATE; give it first (krg capset +MIGRATE vcpu{vcpu})")
        }
    };
    Failure::new("EPERM", line)
}

#[cfg(test)]
mod tests {
    use std::thread::{self, JoinHandle};

    use krg_scheduler::HostShare;

    use super::super::schedule::{Schedule, Wanted};
    use super::*;

    /// A machine of two nodes, of three hosts in the file, with vCPUs 0 and 1 on node 0, 2 and 3 on node 1. vCPU 2
    /// waits for its start-up; vCPU 3 is lost when it is to move. The thread ends with the moves that were asked for.
    fn machine() -> (Admin, JoinHandle<Vec<(u32, usize)>>) {
        let share = |vcpus: [u32; 2]| HostShare { vcpus: vcpus.into(), memory: 128 << 20 };
        let placement = Placement { hosts: vec![share([0, 1]), share([2, 3])] };
        let (events, asked) = channel();
        let statistics = Statistics::default();
        statistics.start(&placement);
        let wishes = Wishes::new(4);
        let admin = Admin {
            name: "m".into(),
            placement,
            names: vec!["a".into(), "b".into()],
            offline: vec!["c".into()],
            statistics: statistics.clone(),
            scheduling: Arc::new(Schedule::new(&Wanted { policy: "off".into(), log: None }, vec![2, 2], wishes.clone()).unwrap()),
            wishes,
            events,
        };
        let nodes = thread::spawn(move || {
            let mut moves = Vec::new();
            for event in asked {
                let FrontEvent::Migrate { vcpu, node, reply } = event else { continue };
                moves.push((vcpu, node));
                let answer = match vcpu {
                    _ if statistics.owner(vcpu) == Some(node) => MoveAnswer::AlreadyThere,
                    2 => MoveAnswer::Busy,
                    3 => MoveAnswer::OwnerLost,
                    _ => {
                        let epoch = moves.len() as u64;
                        statistics.moved(vcpu.into(), node, epoch);
                        MoveAnswer::Moved(epoch)
                    }
                };
                reply.send(answer).unwrap();
            }
            moves
        });
        (admin, nodes)
    }

    fn migrate(vcpu: Value, node: Value) -> Request {
        Request::Migrate { vcpu, node }
    }

    fn pin(vcpu: Value, node: Value) -> Request {
        Request::Pin { vcpu, node }
    }

    #[test]
    fn what_is_not_possible_is_refused_by_distinct_errors_before_anybody_is_asked() {
        let (admin, nodes) = machine();
        let errno = |request| admin.answer(request).unwrap_err().errno;
        for node in [json!(99), json!(3), json!(-1), json!("abc"), json!(1.5), json!(u64::MAX)] {
            assert_eq!(errno(migrate(json!(0), node.clone())), "EINVAL");
            assert_eq!(errno(pin(json!(0), node.clone())), "EINVAL");
            assert_eq!(errno(migrate(json!("all"), node)), "EINVAL");
        }
        assert_eq!(errno(migrate(json!(0), json!(null))), "EINVAL");
        assert_eq!([errno(migrate(json!(0), json!(2))), errno(pin(json!(0), json!(2)))], ["ENONET"; 2]);
        for vcpu in [json!(4), json!(-1), json!("x"), json!(null)] {
            assert_eq!(errno(migrate(vcpu.clone(), json!(1))), "ESRCH");
            assert_eq!(errno(pin(vcpu.clone(), json!(1))), "ESRCH");
            assert_eq!(errno(pin(vcpu.clone(), json!(null))), "ESRCH");
            assert_eq!(errno(Request::Capset { vcpu: vcpu.clone(), migrate: false }), "ESRCH");
            assert_eq!(errno(Request::Explain { vcpu: Some(vcpu), page: None }), "ESRCH");
        }
        assert_eq!(errno(Request::Explain { vcpu: None, page: Some(json!("zero")) }), "EINVAL");
        assert_eq!(errno(Request::Explain { vcpu: None, page: None }), "EINVAL");
        assert_eq!(errno(Request::Explain { vcpu: None, page: Some(json!(1u64 << 40)) }), "EFAULT");
        assert_eq!(errno(Request::Sched { policy: Some("fair".into()) }), "EINVAL");
        drop(admin);
        assert_eq!(nodes.join().unwrap(), []);
    }

    #[test]
    fn a_move_is_answered_when_it_is_made_and_its_own_node_is_no_move() {
        let (admin, nodes) = machine();
        let moved = admin.answer(migrate(json!(0), json!(1))).unwrap();
        assert_eq!((&moved["moved"], &moved["from"], &moved["node"]), (&json!(true), &json!(0), &json!(1)));
        assert_eq!(admin.vcpu_status(0)["why"], "moved");
        let stays = admin.answer(migrate(json!(0), json!(1))).unwrap();
        assert_eq!((&stays["moved"], stays["message"].is_string()), (&json!(false), true));
        assert_eq!(admin.answer(migrate(json!(0), json!("home"))).unwrap()["node"], 0);
        assert_eq!(admin.answer(migrate(json!(2), json!(0))).unwrap_err().errno, "EAGAIN");
        assert_eq!(admin.answer(migrate(json!(3), json!(0))).unwrap_err().errno, "EHOSTDOWN");
        assert_eq!(admin.vcpu_status(2)["why"], "placed");
        drop(admin);
        assert_eq!(nodes.join().unwrap(), [(0, 1), (0, 1), (0, 0), (2, 0), (3, 0)]);
    }

    #[test]
    fn pins_and_capabilities_are_obeyed_before_anybody_is_asked() {
        let (admin, nodes) = machine();
        let errno = |request| admin.answer(request).unwrap_err().errno;
        let pinned = admin.answer(pin(json!(0), json!(1))).unwrap();
        assert_eq!((&pinned["pin"], &pinned["moved"]), (&json!(1), &json!(true)));
        assert_eq!(admin.vcpu_status(0)["why"], "pinned");
        assert_eq!(errno(migrate(json!(0), json!(0))), "EPERM");
        // Its own node is no move, whatever it may.
        assert_eq!(admin.answer(migrate(json!(0), json!(1))).unwrap()["moved"], false);
        assert_eq!(admin.answer(Request::Capset { vcpu: json!(1), migrate: false }).unwrap()["vcpus"], json!([1]));
        assert_eq!(errno(migrate(json!(1), json!(1))), "EPERM");
        assert_eq!(errno(pin(json!(1), json!(1))), "EPERM");
        assert_eq!(admin.vcpu_status(1)["pin"], json!(null));
        assert_eq!(admin.answer(pin(json!(1), json!(0))).unwrap()["moved"], false);
        assert_eq!(admin.answer(migrate(json!(1), json!(0))).unwrap()["moved"], false);
        // A pin that can't be carried out is none.
        assert_eq!(errno(pin(json!(2), json!(0))), "EAGAIN");
        assert_eq!(admin.vcpu_status(2)["pin"], json!(null));
        admin.answer(pin(json!(0), json!(null))).unwrap();
        admin.answer(migrate(json!(0), json!(0))).unwrap();
        drop(admin);
        assert_eq!(nodes.join().unwrap(), [(0, 1), (0, 1), (2, 0), (0, 0)]);
    }

    #[test]
    fn all_are_moved_that_may_and_the_others_named() {
        let (admin, nodes) = machine();
        admin.answer(Request::Capset { vcpu: json!(1), migrate: false }).unwrap();
        let answer = admin.answer(migrate(json!("all"), json!(1))).unwrap();
        assert_eq!(answer["moved"], json!([{"vcpu": 0, "from": 0, "node": 1}]));
        assert_eq!(answer["there"], json!([{"vcpu": 2, "node": 1}, {"vcpu": 3, "node": 1}]));
        let refused = answer["refused"].as_array().unwrap();
        assert_eq!((refused.len(), &refused[0]["vcpu"], &refused[0]["errno"]), (1, &json!(1), &json!("EPERM")));
        let answer = admin.answer(migrate(json!("all"), json!("home"))).unwrap();
        assert_eq!((&answer["moved"], &answer["refused"]), (&json!([{"vcpu": 0, "from": 1, "node": 0}]), &json!([])));
        assert_eq!(admin.answer(Request::Capset { vcpu: json!("all"), migrate: false }).unwrap()["vcpus"], json!([0, 1, 2, 3]));
        drop(admin);
        assert!(!nodes.join().unwrap().contains(&(1, 1)));
    }

    #[test]
    fn the_status_has_all_nodes_and_all_vcpus() {
        let (admin, _nodes) = machine();
        admin.answer(Request::Capset { vcpu: json!(3), migrate: false }).unwrap();
        let status = admin.answer(Request::Status).unwrap()["status"].take();
        assert_eq!(status["nodes"][2], json!({"node": 2, "host": "c", "online": false}));
        assert_eq!((&status["nodes"][1]["vcpus"], &status["nodes"][1]["online"]), (&json!([2, 3]), &json!(true)));
        let vcpu = json!({"vcpu": 3, "node": 1, "home": 1, "pin": null, "migrate": false, "why": "placed",
            "reason": "it was placed there at the start", "load": null});
        assert_eq!((&status["vcpus"][3], &status["sched"]["policy"]), (&vcpu, &json!("off")));
    }

    #[test]
    fn a_page_and_a_vcpu_are_explained_from_what_the_nodes_told() {
        let (admin, _nodes) = machine();
        let explain = |vcpu, page| admin.answer(Request::Explain { vcpu, page }).unwrap()["explain"].take();
        let untold = explain(None, Some(json!("0x8000010")));
        assert_eq!((&untold["page"], &untold["home"], &untold["nodes"]), (&json!(0x800_0000), &json!(1), &json!([])));
        assert_eq!(admin.vcpu_status(0)["load"], json!(null));
        let hot = json!({"address": 0x1000, "faults": 30, "bounces": 0, "threads": [{"thread": "vcpu0", "faults": 25}]});
        let fetched_once = json!({"address": 0x2000, "faults": 1, "bounces": 0, "threads": [{"thread": "vcpu0", "faults": 1}]});
        let load = json!({"vcpu": 0, "ran": 0.5, "state": "running"});
        admin.statistics.keep(0, &json!({"event": "statistics", "hot_pages": [hot, fetched_once], "vcpu_loads": [load]}));
        let hot = json!({"address": 0x1000, "faults": 9, "bounces": 8, "threads": "none"});
        admin.statistics.keep(1, &json!({"event": "statistics", "hot_pages": [hot, 7], "vcpu_loads": 3}));
        let page = explain(None, Some(json!(0x1fff)));
        assert_eq!((&page["page"], &page["home"], &page["bounces"]), (&json!(0x1000), &json!(0), &json!(8)));
        assert_eq!(page["nodes"][0]["threads"][0], json!({"thread": "vcpu0", "faults": 25}));
        let vcpu = explain(Some(json!(0)), None);
        assert_eq!(vcpu["pages"], json!([{"address": 0x1000, "node": 0, "faults": 25}]));
        assert_eq!((&vcpu["load"]["ran"], &vcpu["why"]), (&json!(0.5), &json!("placed")));
        assert_eq!(vcpu["message"], "vCPU 0 is on node 0: it was placed there at the start");
        assert_eq!(explain(Some(json!(2)), None)["load"], json!(null));
    }

    #[test]
    fn who_schedules_is_shown_and_changed() {
        let (admin, _nodes) = machine();
        let sched = |policy: Option<&str>| admin.answer(Request::Sched { policy: policy.map(Into::into) });
        assert_eq!(sched(None).unwrap()["sched"]["policy"], "off");
        assert_eq!(sched(Some("balance")).unwrap()["sched"]["policy"], "balance");
        assert_eq!(admin.status()["sched"]["policy"], "balance");
        assert_eq!(sched(Some("off")).unwrap()["sched"]["policy"], "off");
    }

    #[test]
    fn the_answer_when_the_machine_has_ended() {
        let (mut admin, _nodes) = machine();
        (admin.events, _) = channel();
        assert_eq!(admin.answer(migrate(json!(0), json!(1))).unwrap_err().errno, "ECANCELED");
    }
}
