//! Nodes in one process: each has its own VM, userfaultfds and TCP streams to the others, as two
//! hosts have.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use krg_dsm::memory::{BlockCounters, GuestRam};
use krg_dsm::node::{Client, Copies, Dsm, DsmError, Start};
use krg_dsm::protocol::{Bug, Counters, Patience};
use krg_dsm::transport::{Config, Streams, TcpTransport, Transport};
use krg_guest_kernel::micro::{InitialRegs, PORT_DONE, PORT_FAULT, PORT_YIELD};
use krg_scheduler::{HostShare, Placement};
use krg_vmm::machine::boot::Entry;
use krg_vmm::machine::state::Registers;
use krg_vmm::machine::{Access, Direction, End, Event, Fabric, Machine, MachineConfig, Space, Touch};
use krg_vmm::node::wire::Wire;
use krg_vmm::ownership::{Message, Outcome};
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// RAM of a machine, shared out evenly.
pub const MEMORY: u64 = 48 << 20;
/// What node 0 may write before the start: `0..LOADED`.
pub const LOADED: u64 = 1 << 20;

/// Port of the reset control register.
const RESET: u64 = 0xcf9;

/// Several machines at a time would only wait for each other's processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Waits until no other machine of these tests runs.
pub fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub nodes: usize,
    /// vCPU i runs on node i modulo `nodes`.
    pub vcpus: u32,
    /// Page tables are replicated.
    pub replicate: bool,
    /// When their replicas rest.
    pub tables_rest: Patience,
    /// Bytes of copies a node may have.
    pub cache: u64,
    /// A protocol bug to plant.
    pub bug: Option<Bug>,
}

/// Joins one node's machine and shared memory.
struct Link {
    me: usize,
    dsm: OnceLock<Weak<Dsm>>,
    machine: OnceLock<Weak<Machine>>,
    sent: Mutex<Vec<(u32, Event)>>,
    /// Bytes of the largest vCPU state that left.
    largest: AtomicUsize,
    stopping: AtomicBool,
    ends: Mutex<Sender<End>>,
    failed: Sender<String>,
}

impl Fabric for Link {
    fn send(&self, to: usize, vcpu: u32, message: Message) {
        match &message {
            Message::Event { event, .. } if event.origin == self.me => self.sent.lock().unwrap().push((vcpu, event.event)),
            Message::State(handover) => drop(self.largest.fetch_max(handover.state.len(), Ordering::Relaxed)),
            _ => {}
        }
        if let Some(dsm) = self.dsm.get().and_then(Weak::upgrade) {
            dsm.send(to, Wire::Vcpu { vcpu, message }.encode());
        }
    }

    fn announce(&self, to: usize, touches: &[Touch]) {
        if let Some(dsm) = self.dsm.get().and_then(Weak::upgrade) {
            dsm.send(to, Wire::Announce { touches: touches.to_vec() }.encode());
        }
    }

    /// Micro guests away from node 0 report by their ports; other guests here have no device.
    fn io(&self, access: Access) -> Option<u64> {
        let port = |port: u8| access.space == Space::Port && access.address == u64::from(port);
        match access.direction {
            Direction::Write(_) if port(PORT_YIELD) => std::thread::yield_now(),
            Direction::Write(_) if port(PORT_DONE) => std::thread::sleep(Duration::from_millis(1)),
            _ if self.stopping.load(Ordering::SeqCst) => {}
            Direction::Write(6) if access.space == Space::Port && access.address == RESET => {
                let _ = self.ends.lock().unwrap().send(End::Reset);
            }
            Direction::Write(vector) if port(PORT_FAULT) => {
                let _ = self
                    .failed
                    .send(format!("node {}: a vCPU took exception {vector}", self.me));
            }
            _ => drop(self.failed.send(format!("node {}: {access:x?}", self.me))),
        }
        Some(0)
    }

    /// On node 0 every port access of a micro guest means that it waits or is done.
    fn before_local_io(&self) {
        std::thread::yield_now();
    }
}

impl Client for Link {
    fn machine(&self, from: usize, bytes: &[u8]) {
        let (vcpu, message) = match Wire::decode(bytes) {
            Some(Wire::Vcpu { vcpu, message }) => (vcpu, message),
            Some(Wire::Announce { touches }) => {
                if let Some(dsm) = self.dsm.get().and_then(Weak::upgrade) {
                    touches.iter().for_each(|touch| dsm.prefetch(touch.gpa, 1, touch.write));
                }
                return;
            }
            other => panic!("{other:?}: {bytes:?}"),
        };
        if let Some(machine) = self.machine.get().and_then(Weak::upgrade) {
            machine.receive(from, vcpu, message);
        }
    }

    fn setup(&self, _: usize, _: &[u8]) {}

    fn roots(&self) -> Vec<u64> {
        let Some(machine) = self.machine.get().and_then(Weak::upgrade) else {
            return Vec::new();
        };
        machine.sample_roots();
        machine
            .page_table_roots()
            .into_iter()
            .map(|(_, root)| root >> 12 & 0xff_ffff_ffff)
            .collect()
    }

    fn failed(&self, error: DsmError) {
        if !self.stopping.load(Ordering::SeqCst) {
            let _ = self.failed.send(format!("node {}: {error}", self.me));
        }
    }
}

struct Node {
    machine: Arc<Machine>,
    dsm: Arc<Dsm>,
    transport: Arc<TcpTransport>,
    link: Arc<Link>,
}

/// A machine over several nodes, running.
pub struct Nodes {
    nodes: Vec<Node>,
    owners: Vec<usize>,
    /// How node 0's machine ended, by its guest.
    pub ends: Receiver<End>,
    /// What must not happen.
    pub failures: Receiver<String>,
    _turn: MutexGuard<'static, ()>,
}

impl Nodes {
    /// Has `load` write to the first [`LOADED`] bytes, and makes the memory coherent.
    pub fn new(plan: Plan, load: impl FnOnce(&GuestMemoryMmap<()>)) -> Self {
        let turn = turn();
        let owners: Vec<usize> = (0..plan.vcpus as usize).map(|vcpu| vcpu % plan.nodes).collect();
        let share = |node: usize| HostShare {
            vcpus: (0..plan.vcpus).filter(|vcpu| owners[*vcpu as usize] == node).collect(),
            memory: MEMORY / plan.nodes as u64,
        };
        let placement = Placement {
            hosts: (0..plan.nodes).map(share).collect(),
        };
        let (end, ends) = channel();
        let (failed, failures) = channel();
        let mut load = Some(load);
        let nodes = mesh(plan.nodes).into_iter().enumerate().map(|(me, peers)| {
            let ram = Arc::new(GuestRam::new(&[(0, MEMORY)], true).unwrap());
            let link = Arc::new(Link {
                me,
                dsm: OnceLock::new(),
                machine: OnceLock::new(),
                sent: Mutex::default(),
                largest: AtomicUsize::new(0),
                stopping: AtomicBool::new(false),
                ends: Mutex::new(end.clone()),
                failed: failed.clone(),
            });
            let config = MachineConfig {
                placement: placement.clone(),
                node: me,
                tsc_khz: 0,
                cpuid: vec![],
                console: Box::new(std::io::sink()),
                ends: end.clone(),
            };
            let machine = Arc::new(Machine::new(config, ram.memory().clone(), link.clone()).unwrap());
            if let Some(load) = load.take() {
                load(ram.memory());
            }
            let transport = Arc::new(TcpTransport::new(peers, Config::default()).unwrap());
            let dsm = Dsm::new(me, ram, transport.clone());
            assert!(link.dsm.set(Arc::downgrade(&dsm)).is_ok() && link.machine.set(Arc::downgrade(&machine)).is_ok());
            transport.start(dsm.handler(link.clone())).unwrap();
            let start = Start {
                me,
                shares: placement.hosts.iter().map(|host| host.memory).collect(),
                preloaded: std::iter::once(0..(LOADED >> 12) as u32).collect(),
                // Where micro guests have their tables: roots within the image are taken for such.
                image: 0x10..(LOADED >> 12) as u32,
                replicate: plan.replicate,
                tables_rest: plan.tables_rest,
                merge_after: Duration::from_millis(300),
                cache: plan.cache,
                bug: plan.bug,
            };
            dsm.start(start).unwrap();
            Node {
                machine,
                dsm,
                transport,
                link,
            }
        });
        let nodes = nodes.collect();
        Nodes {
            nodes,
            owners,
            ends,
            failures,
            _turn: turn,
        }
    }

    /// Starts every vCPU of a micro guest at once.
    pub fn run_micro(&self, starts: &[InitialRegs]) {
        for (number, node) in self.nodes.iter().enumerate() {
            let mut state = node.machine.save().unwrap();
            for (vcpu, start) in state
                .vcpus
                .iter_mut()
                .zip(starts)
                .filter(|(v, _)| self.owners[v.id as usize] == number)
            {
                let registers = vcpu.registers.as_mut().unwrap();
                start.apply(&mut registers.sregs);
                registers.regs = start.regs();
                vcpu.mp_state = KVM_MP_STATE_RUNNABLE;
            }
            node.machine.restore(&state).unwrap();
        }
        self.run();
    }

    /// Starts every vCPU at once in 64-bit kernel mode at `entry`; `differ` makes them differ.
    pub fn run_all(&self, entry: &Entry, differ: impl Fn(u32, &mut Registers)) {
        let first = &self.nodes[self.owners[0]].machine;
        first.set_entry(entry).unwrap();
        let model = first.save().unwrap().vcpus.remove(0).registers.unwrap();
        for (number, node) in self.nodes.iter().enumerate() {
            let mut state = node.machine.save().unwrap();
            for vcpu in state.vcpus.iter_mut().filter(|v| self.owners[v.id as usize] == number) {
                let registers = vcpu.registers.as_mut().unwrap();
                let apic_base = registers.sregs.apic_base;
                (registers.regs, registers.sregs) = (model.regs, model.sregs);
                registers.sregs.apic_base = apic_base;
                differ(vcpu.id, registers);
                vcpu.mp_state = KVM_MP_STATE_RUNNABLE;
            }
            node.machine.restore(&state).unwrap();
        }
        self.run();
    }

    /// Sets the guest's TSC on all nodes, which have one clock here.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.nodes.iter().for_each(|node| node.machine.set_tsc_offset(offset).unwrap());
    }

    /// Every node's machine.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        self.nodes.iter().map(|node| node.machine.clone()).collect()
    }

    /// Bytes of the largest state of a vCPU that was sent.
    pub fn largest_state(&self) -> usize {
        self.nodes.iter().map(|node| node.link.largest.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// The 32-bit word at a guest-physical address, as node 0 sees it now.
    pub fn dword(&self, address: u64) -> u32 {
        (self.word(address & !7) >> (8 * (address & 4))) as u32
    }

    /// Writes the 64-bit word at a guest-physical address, as a device of node 0 would.
    pub fn store(&self, address: u64, value: u64) {
        let page = &self.nodes[0].dsm.ram().words((address >> 12) as u32).unwrap();
        page[(address & 0xfff) as usize / 8].store(value, Ordering::SeqCst);
    }

    /// Starts all nodes, node 0 last: its vCPU 0 starts the others.
    pub fn run(&self) {
        self.nodes.iter().rev().for_each(|node| node.machine.run().unwrap());
    }

    /// Node 0's machine.
    pub fn first(&self) -> &Machine {
        &self.nodes[0].machine
    }

    /// The 64-bit word at a guest-physical address, as node 0 sees it now.
    pub fn word(&self, address: u64) -> u64 {
        let page = &self.nodes[0].dsm.ram().words((address >> 12) as u32).unwrap();
        page[(address & 0xfff) as usize / 8].load(Ordering::SeqCst)
    }

    /// `count` words from an address on.
    pub fn words(&self, address: u64, count: usize) -> Vec<u64> {
        (0..count as u64).map(|index| self.word(address + index * 8)).collect()
    }

    /// What a node's vCPUs sent to vCPUs elsewhere, in order.
    pub fn sent(&self, node: usize) -> Vec<(u32, Event)> {
        self.nodes[node].link.sent.lock().unwrap().clone()
    }

    /// Counters of all nodes.
    pub fn counters(&self) -> Vec<Counters> {
        self.nodes
            .iter()
            .map(|node| node.dsm.counters().unwrap_or_default().0)
            .collect()
    }

    /// Copies of other nodes' pages, node by node.
    pub fn copies(&self) -> Vec<Copies> {
        self.nodes.iter().map(|node| node.dsm.copies()).collect()
    }

    /// Blocks of all nodes.
    pub fn blocks(&self) -> Vec<BlockCounters> {
        self.nodes.iter().map(|node| node.dsm.blocks()).collect()
    }

    /// Pages that went from one node to another.
    pub fn transfers(&self) -> u64 {
        self.counters().iter().map(|counters| counters.pages_in).sum()
    }

    /// Whether some node tells of the page at `gpa` as one that hosts fight for, and of a thread that does.
    pub fn contended(&self, gpa: u64) -> bool {
        self.nodes.iter().any(|node| {
            let (hottest, _) = node.dsm.hottest(16);
            hottest.iter().any(|hot| node.dsm.ram().gpa_of(hot.page) == Some(gpa) && hot.bounces > 0 && !hot.threads.is_empty())
        })
    }

    /// Stops the vCPUs and tells where each stood: for a test that failed.
    pub fn describe(&self) -> String {
        self.stop_machines();
        let mut text = format!("{:?}", self.counters());
        for node in &self.nodes {
            let Ok(state) = node.machine.save() else { continue };
            for (vcpu, registers) in state.vcpus.iter().filter_map(|v| Some((v, v.registers.as_ref()?))) {
                let (r, s) = (&registers.regs, &registers.sregs);
                text += &format!(
                    "; vCPU {} at {:#x} cs {:#x} rax {:#x} rcx {:#x} cr2 {:#x}",
                    vcpu.id, r.rip, s.cs.selector, r.rax, r.rcx, s.cr2
                );
            }
        }
        text
    }

    fn stop_machines(&self) {
        self.nodes
            .iter()
            .for_each(|node| node.link.stopping.store(true, Ordering::SeqCst));
        std::thread::scope(|scope| {
            for node in &self.nodes {
                scope.spawn(|| node.machine.stop());
            }
        });
    }
}

impl Drop for Nodes {
    /// vCPUs first, while their pages still arrive.
    fn drop(&mut self) {
        self.stop_machines();
        self.nodes.iter().for_each(|node| node.dsm.stop());
        self.nodes.iter().for_each(|node| node.transport.shutdown());
    }
}

/// Asks a node to move a vCPU, and waits for the outcome.
pub fn migrate(asked: &Machine, vcpu: u32, to: usize) -> Result<Outcome, String> {
    let (reply, outcome) = channel();
    let reply = Box::new(move |outcome| {
        let _ = reply.send(outcome);
    });
    asked.migrate(vcpu, to, reply).map_err(|error| error.to_string())?;
    outcome.recv_timeout(Duration::from_secs(30)).map_err(|error| error.to_string())
}

/// A full mesh of loopback connections: `streams[i][j]` is node i's end to node j.
fn mesh(nodes: usize) -> Vec<Vec<Option<Streams>>> {
    let mut streams: Vec<Vec<Option<Streams>>> = (0..nodes).map(|_| (0..nodes).map(|_| None).collect()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0);
    for (a, b) in (0..nodes).flat_map(|b| (0..b).map(move |a| (a, b))) {
        let ((near, far), (near_blocks, far_blocks)) = (pair(), pair());
        streams[a][b] = Some(Streams { messages: near, blocks: Some(near_blocks) });
        streams[b][a] = Some(Streams { messages: far, blocks: Some(far_blocks) });
    }
    streams
}

/// Writes the pieces of a guest.
pub fn load_pieces(memory: &GuestMemoryMmap<()>, pieces: &[(u64, Vec<u8>)]) {
    for (at, bytes) in pieces {
        assert!(at + bytes.len() as u64 <= LOADED);
        memory.write_slice(bytes, GuestAddress(*at)).unwrap();
    }
}
