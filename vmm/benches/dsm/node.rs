//! One node of the measured machine: its VM, its shared memory, and its vCPUs' jobs.

use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use krg_dsm::memory::GuestRam;
use krg_dsm::node::{Client, Dsm, DsmError, Start, TABLES_REST};
use krg_dsm::transport::rdma::RdmaTransport;
use krg_dsm::transport::{Config, Streams, TcpTransport, Transport};
use serde::{Deserialize, Serialize};
use krg_guest_kernel::micro::{MicroGuest, PORT_YIELD};
use krg_scheduler::{HostShare, Placement};
use krg_vmm::machine::{Access, End, Fabric, Machine, MachineConfig, Space};
use krg_vmm::ownership::Message;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use vm_memory::{Bytes, GuestAddress};

use zerocopy::IntoBytes;

use super::floor;
use super::guest::{self, Job, LOADED};
use super::tables;

/// Memory of each node.
pub const SHARE: u64 = 256 << 20;
/// A job that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// What joins the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Kind {
    Tcp,
    Rdma,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Tcp => "TCP",
            Kind::Rdma => "RDMA",
        }
    }
}

/// What a vCPU is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Not started yet, or at work.
    #[default]
    Away,
    /// In its `out`.
    Waiting,
    /// Told to go on.
    Called,
}

/// Where vCPUs wait for jobs. Also the end of every other access, of which these guests have none.
#[derive(Default)]
pub struct Gate {
    places: Mutex<(Vec<Place>, bool)>,
    changed: Condvar,
    failed: Mutex<Option<String>>,
}

impl Gate {
    fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Gate {
            places: Mutex::new((vec![Place::Away; vcpus], false)),
            ..Gate::default()
        })
    }

    /// The calling vCPU waits here until it is called. Its thread's name says which it is.
    fn wait(&self) {
        let thread = std::thread::current();
        let Some(vcpu) = thread
            .name()
            .and_then(|n| n.strip_prefix("vcpu"))
            .and_then(|n| n.parse::<usize>().ok())
        else {
            return;
        };
        let mut places = self.places.lock().unwrap();
        places.0[vcpu] = Place::Waiting;
        self.changed.notify_all();
        while places.0[vcpu] != Place::Called && !places.1 {
            places = self.changed.wait(places).unwrap();
        }
        places.0[vcpu] = Place::Away;
    }

    /// Waits until `vcpus` wait.
    fn all_waiting(&self, vcpus: &[usize]) -> anyhow::Result<()> {
        let places = self.places.lock().unwrap();
        let away = |places: &mut (Vec<Place>, bool)| vcpus.iter().any(|v| places.0[*v] != Place::Waiting);
        let (_places, timeout) = self.changed.wait_timeout_while(places, PATIENCE, away).unwrap();
        if let Some(line) = self.failed.lock().unwrap().take() {
            bail!(line);
        }
        if timeout.timed_out() {
            bail!("vCPUs {vcpus:?} are not through after {PATIENCE:?}")
        } else {
            Ok(())
        }
    }

    fn call(&self, vcpus: &[usize]) {
        let mut places = self.places.lock().unwrap();
        vcpus.iter().for_each(|v| places.0[*v] = Place::Called);
        self.changed.notify_all();
    }

    fn open(&self) {
        self.places.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn fail(&self, line: String) {
        self.failed.lock().unwrap().get_or_insert(line);
    }
}

impl Fabric for Gate {
    fn send(&self, _: usize, _: u32, _: Message) {}

    fn io(&self, access: Access) -> Option<u64> {
        if access.space == Space::Port && access.address == u64::from(PORT_YIELD) {
            self.wait();
        } else {
            self.fail(format!("the guest failed: {access:x?}"));
        }
        Some(0)
    }

    fn before_local_io(&self) {
        self.wait();
    }
}

/// What the shared memory tells.
struct Listener {
    gate: Arc<Gate>,
    machine: OnceLock<Weak<Machine>>,
}

impl Client for Listener {
    fn machine(&self, _: usize, _: &[u8]) {}
    fn setup(&self, _: usize, _: &[u8]) {}
    fn roots(&self) -> Vec<u64> {
        let Some(machine) = self.machine.get().and_then(Weak::upgrade) else {
            return Vec::new();
        };
        machine
            .page_table_roots()
            .into_iter()
            .map(|(_, root)| root >> 12 & 0xff_ffff_ffff)
            .collect()
    }
    fn failed(&self, error: DsmError) {
        self.gate.fail(error.to_string());
    }
}

/// A node, its vCPUs waiting for jobs.
pub struct Node {
    machine: Arc<Machine>,
    pub dsm: Arc<Dsm>,
    transport: Arc<dyn Transport>,
    gate: Arc<Gate>,
    ends: Receiver<End>,
    share: u64,
    /// The guest's top-level page table.
    pub root: u64,
}

/// The nodes' vCPUs: node 0 has the first `vcpus`, node 1 one.
pub fn placement(vcpus: usize) -> Placement {
    let first = HostShare {
        vcpus: (0..vcpus as u32).collect(),
        memory: SHARE,
    };
    Placement {
        hosts: vec![
            first,
            HostShare {
                vcpus: vec![vcpus as u32],
                memory: SHARE,
            },
        ],
    }
}

/// Builds this node's VM with the guest in it. Only node 0's memory is written to.
pub fn machine(
    placement: &Placement,
    me: usize,
    ram: &GuestRam,
    gate: &Arc<Gate>,
) -> anyhow::Result<(Arc<Machine>, MicroGuest, Receiver<End>)> {
    let shares: Vec<u64> = (0..placement.cpus())
        .map(|v| placement.owner(v).unwrap_or(0) as u64 * SHARE)
        .collect();
    let micro = guest::build(placement.memory(), &shares)?;
    let (end, ends) = channel();
    let config = MachineConfig {
        placement: placement.clone(),
        node: me,
        tsc_khz: 0,
        cpuid: vec![],
        console: Box::new(std::io::sink()),
        ends: end,
    };
    let machine = Machine::new(config, ram.memory().clone(), gate.clone())?;
    // The guest's clock is the host's: its times and ours can be subtracted.
    machine.set_tsc_offset(0)?;
    if me == 0 {
        for (at, bytes) in &micro.writes {
            ram.memory().write_slice(bytes, GuestAddress(*at))?;
        }
    }
    Ok((Arc::new(machine), micro, ends))
}

/// Starts the vCPUs of this node; returns when all wait for a job.
pub fn start(machine: &Machine, micro: &MicroGuest, gate: &Gate, vcpus: &[usize]) -> anyhow::Result<()> {
    let mut state = machine.save()?;
    for (vcpu, start) in state
        .vcpus
        .iter_mut()
        .zip(&micro.vcpus)
        .filter(|(v, _)| vcpus.contains(&(v.id as usize)))
    {
        let registers = vcpu
            .registers
            .as_mut()
            .context("a vCPU of this node without registers")?;
        start.apply(&mut registers.sregs);
        registers.regs = start.regs();
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE;
    }
    machine.restore(&state)?;
    machine.run()?;
    gate.all_waiting(vcpus)
}

/// Has vCPUs do jobs at the same time; the times of their touches, in ticks.
pub fn run(ram: &GuestRam, gate: &Gate, share: u64, jobs: &[(usize, Job)]) -> anyhow::Result<Vec<Vec<(u64, u64)>>> {
    let vcpus: Vec<usize> = jobs.iter().map(|(vcpu, _)| *vcpu).collect();
    let words = |gpa: u64| -> anyhow::Result<_> {
        ram.index_of(gpa)
            .and_then(|page| ram.words(page))
            .ok_or_else(|| anyhow!("{gpa:#x} is no memory"))
    };
    for (vcpu, job) in jobs {
        if job.timed() > guest::MOST_TIMED {
            bail!("{} touches are more than can be timed", job.count);
        }
        let page = words(guest::job_at(share, *vcpu))?;
        for (to, word) in page.iter().zip(job.words(guest::results_at(share, *vcpu))) {
            to.store(word, std::sync::atomic::Ordering::Release);
        }
    }
    gate.call(&vcpus);
    gate.all_waiting(&vcpus)?;
    let times = |(vcpu, job): &(usize, Job)| {
        let at = guest::results_at(share, *vcpu);
        let word = |n: u64| -> anyhow::Result<u64> {
            let gpa = at + n * 8;
            Ok(words(gpa)?[(gpa & 0xfff) as usize / 8].load(std::sync::atomic::Ordering::Acquire))
        };
        (0..job.timed()).map(|n| Ok((word(2 * n)?, word(2 * n + 1)?))).collect()
    };
    jobs.iter().map(times).collect()
}

impl Node {
    /// Node `me`, joined to the other by `messages`, and for whole blocks over TCP by `blocks`.
    pub fn new(me: usize, vcpus: usize, kind: Kind, messages: TcpStream, blocks: Option<TcpStream>) -> anyhow::Result<Self> {
        let placement = placement(vcpus);
        let gate = Gate::new(placement.cpus() as usize);
        let ram = Arc::new(GuestRam::new(&[(0, placement.memory())], true)?);
        let (machine, micro, ends) = machine(&placement, me, &ram, &gate)?;
        let root = micro.roots[0];
        if me == 0 {
            for (at, bytes) in tables::writes(root) {
                ram.memory().write_slice(&bytes, GuestAddress(at))?;
            }
        }
        let transport: Arc<dyn Transport> = match kind {
            Kind::Tcp => Arc::new(TcpTransport::new(to_other(me, Streams { messages, blocks }), Config::default())?),
            Kind::Rdma => Arc::new(RdmaTransport::connect(to_other(me, messages), Config::default())?),
        };
        let dsm = Dsm::new(me, ram, transport.clone());
        let listener = Listener {
            gate: gate.clone(),
            machine: OnceLock::from(Arc::downgrade(&machine)),
        };
        transport.start(dsm.handler(Arc::new(listener)))?;
        dsm.start(Start {
            me,
            shares: placement.hosts.iter().map(|host| host.memory).collect(),
            preloaded: vec![0..(LOADED >> 12) as u32, tables::PAGES],
            image: 0x10..(LOADED >> 12) as u32,
            replicate: true,
            tables_rest: TABLES_REST,
            merge_after: Duration::from_secs(10),
            cache: u64::MAX,
            bug: None,
        })?;
        let own: Vec<usize> = placement.hosts[me].vcpus.iter().map(|v| *v as usize).collect();
        start(&machine, &micro, &gate, &own)?;
        Ok(Node {
            machine,
            dsm,
            transport,
            gate,
            ends,
            share: me as u64 * SHARE,
            root,
        })
    }

    /// Has vCPUs of this node do jobs at the same time; the times of their touches, in ticks.
    pub fn run(&self, jobs: &[(usize, Job)]) -> anyhow::Result<Vec<Vec<(u64, u64)>>> {
        if let Ok(end) = self.ends.try_recv() {
            bail!("the guest ended: {end:?}");
        }
        run(self.dsm.ram(), &self.gate, self.share, jobs)
    }

    /// Ticks of the guest's clock in a microsecond.
    pub fn ticks_per_us(&self) -> f64 {
        f64::from(self.machine.tsc_khz()) / 1000.0
    }
}

/// A connection by the node it leads to, of two.
fn to_other<T>(me: usize, stream: T) -> Vec<Option<T>> {
    if me == 0 { vec![None, Some(stream)] } else { vec![Some(stream), None] }
}

impl Drop for Node {
    /// vCPUs first, while their pages still arrive.
    fn drop(&mut self) {
        self.gate.open();
        self.machine.stop();
        self.dsm.stop();
        self.transport.shutdown();
    }
}

/// A VM whose faults are answered at once, by a thread that does nothing else: what no fault over a
/// network can be faster than.
pub struct Bare {
    machine: Arc<Machine>,
    gate: Arc<Gate>,
    ram: Arc<GuestRam>,
    answers: Option<std::thread::JoinHandle<()>>,
    stop: krg_dsm::memory::FaultStop,
    memory: Arc<Mutex<krg_dsm::memory::UffdMemory>>,
    /// Where pages come from, if not from here.
    source: Arc<Mutex<Option<Arc<Mutex<floor::Bare>>>>>,
    /// How long each took to come from there.
    trips: Arc<Mutex<Vec<Duration>>>,
}

/// What faults took whose pages came over the bare network.
pub struct Fetched {
    /// The touches, in ticks.
    pub touches: Vec<(u64, u64)>,
    /// Of each, the round trip: from just before the request is sent until its page is about to be put in place.
    pub trips: Vec<Duration>,
}

impl Bare {
    pub fn new() -> anyhow::Result<Self> {
        use krg_dsm::memory::{PAGE_WORDS, UffdMemory};
        use krg_dsm::protocol::Memory;
        let placement = placement(1);
        let gate = Gate::new(placement.cpus() as usize);
        let ram = Arc::new(GuestRam::new(&[(0, placement.memory())], true)?);
        let (machine, micro, _) = machine(&placement, 0, &ram, &gate)?;
        let kept = 0..(LOADED >> 12) as u32;
        let (memory, mut sources) = UffdMemory::keeping(ram.clone(), 1, std::slice::from_ref(&kept))?;
        let memory = Arc::new(Mutex::new(memory));
        let mut source = sources.pop().context("a userfaultfd without faults")?;
        let stop = source.stopper();
        let filled = memory.clone();
        let from = Arc::new(Mutex::new(None::<Arc<Mutex<floor::Bare>>>));
        let network = from.clone();
        let trips = Arc::new(Mutex::new(Vec::new()));
        let times = trips.clone();
        let answers = std::thread::spawn(move || {
            floor::raise();
            let (mut faults, data) = (Vec::new(), Box::new([1; PAGE_WORDS]));
            while let Ok(true) = source.next_batch(&mut faults) {
                for &fault in &faults {
                    let network = network.lock().unwrap().clone();
                    let Some(network) = network else {
                        filled.lock().unwrap().install(fault.page, &data, fault.write);
                        continue;
                    };
                    let (filled, times, begun) = (filled.clone(), times.clone(), Instant::now());
                    let install = move |page: &[u8]| {
                        times.lock().unwrap().push(begun.elapsed());
                        let mut words = [0; PAGE_WORDS];
                        words.as_mut_bytes().copy_from_slice(page);
                        filled.lock().unwrap().install(fault.page, &words, fault.write);
                    };
                    // Without an answer the vCPU waits until the job has taken too long.
                    if let Err(error) = network.lock().unwrap().fetch(Box::new(install)) {
                        eprintln!("asking the second node for a page: {error:#}");
                    }
                }
            }
        });
        start(&machine, &micro, &gate, &[0])?;
        Ok(Bare {
            machine,
            gate,
            ram,
            answers: Some(answers),
            stop,
            memory,
            source: from,
            trips,
        })
    }

    /// As [`Node::run`], on the only vCPU; the touched pages are absent again afterwards.
    pub fn run(&self, job: Job) -> anyhow::Result<Vec<(u64, u64)>> {
        use krg_dsm::protocol::Memory;
        let times = run(&self.ram, &self.gate, 0, &[(0, job)])?;
        let mut memory = self.memory.lock().unwrap();
        job.frames().for_each(|frame| memory.discard(frame as u32));
        Ok(times.into_iter().next().unwrap_or_default())
    }

    /// The same with every page fetched over the bare network: what no fault can be faster than that has to ask another
    /// node, whatever that does.
    pub fn run_over(&self, network: &Arc<Mutex<floor::Bare>>, job: Job) -> anyhow::Result<Fetched> {
        *self.source.lock().unwrap() = Some(network.clone());
        let touches = self.run(job);
        *self.source.lock().unwrap() = None;
        let trips = std::mem::take(&mut *self.trips.lock().unwrap());
        Ok(Fetched { touches: touches?, trips })
    }

    /// The same with the pages there before: what the guest's reading and KVM's own faults take.
    pub fn run_present(&self, job: Job) -> anyhow::Result<Vec<(u64, u64)>> {
        use krg_dsm::memory::PAGE_WORDS;
        use krg_dsm::protocol::Memory;
        let data = Box::new([1; PAGE_WORDS]);
        let mut memory = self.memory.lock().unwrap();
        job.frames().for_each(|frame| memory.install(frame as u32, &data, false));
        drop(memory);
        self.run(job)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.gate.open();
        self.machine.stop();
        self.stop.stop();
        if let Some(answers) = self.answers.take() {
            let _ = answers.join();
        }
    }
}
