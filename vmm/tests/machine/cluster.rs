//! Nodes in one process, joined by function calls, on one memory.

use std::io::Write;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use krg_scheduler::{HostShare, Placement};
use krg_vmm::machine::boot::{self, Entry};
use krg_vmm::ownership::Message;
use krg_vmm::machine::{Access, End, Event, Fabric, Machine, MachineConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest;

const MEMORY: u64 = 4 << 20;
const BOOT_CODE: u64 = 0x10_0000;
const BOOT_HANDLER: u64 = 0x10_1000;
const SECOND_CODE: u64 = 0x8000;
const SECOND_HANDLER: u64 = 0x8100;
const SECOND_NMI: u64 = 0x8200;
const SECOND_FLOOD: u64 = 0x8300;
const IDT: u64 = 0x3000;

/// The guest's counters, by address.
#[derive(Clone, Copy, Debug)]
pub enum Count {
    Started = 0x600,
    Asked = 0x604,
    Answered = 0x608,
    Nmis = 0x60c,
    Flood = 0x628,
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

type Sent = Arc<Mutex<Vec<(u32, Event)>>>;

/// Calls the other machine directly.
struct Direct {
    node: usize,
    machines: Arc<OnceLock<Vec<Weak<Machine>>>>,
    sent: Sent,
}

impl Direct {
    fn machine(&self, node: usize) -> Option<Arc<Machine>> {
        self.machines.get()?.get(node)?.upgrade()
    }
}

impl Fabric for Direct {
    fn send(&self, to: usize, vcpu: u32, message: Message) {
        if let Message::Event { event, .. } = &message {
            self.sent.lock().unwrap().push((vcpu, event.event));
        }
        if let Some(machine) = self.machine(to) {
            machine.receive(self.node, vcpu, message);
        }
    }

    fn io(&self, access: Access) -> Option<u64> {
        Some(self.machine(0)?.serve(access))
    }
}

pub struct Cluster {
    pub machines: Vec<Arc<Machine>>,
    pub ends: Receiver<End>,
    pub sent: Sent,
    memory: GuestMemoryMmap<()>,
    screen: Screen,
}

impl Cluster {
    /// Two vCPUs over `nodes` nodes.
    pub fn new(nodes: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        Self::with_memory(nodes, memory)
    }

    pub fn with_memory(nodes: usize, memory: GuestMemoryMmap<()>) -> Self {
        let hosts = match nodes {
            1 => vec![HostShare {
                vcpus: vec![0, 1],
                memory: MEMORY,
            }],
            _ => (0..2)
                .map(|v| HostShare {
                    vcpus: vec![v],
                    memory: MEMORY / 2,
                })
                .collect(),
        };
        let placement = Placement { hosts };
        let (sender, ends) = channel();
        let (screen, sent, registry) = (Screen::default(), Sent::default(), Arc::new(OnceLock::new()));
        let machines: Vec<Arc<Machine>> = (0..nodes)
            .map(|node| {
                let fabric = Arc::new(Direct {
                    node,
                    machines: registry.clone(),
                    sent: sent.clone(),
                });
                let config = MachineConfig {
                    placement: placement.clone(),
                    node,
                    tsc_khz: 0,
                    cpuid: vec![],
                    console: Box::new(screen.clone()),
                    ends: sender.clone(),
                };
                Arc::new(Machine::new(config, memory.clone(), fabric).unwrap())
            })
            .collect();
        registry.set(machines.iter().map(Arc::downgrade).collect()).unwrap();
        Cluster {
            machines,
            ends,
            sent,
            memory,
            screen,
        }
    }

    /// Writes the exchange guest and points vCPU 0 at it.
    pub fn load_exchange(&self, cycles: u32, rounds: u32) {
        boot::write_tables(&self.memory).unwrap();
        let put = |bytes: &[u8], at: u64| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        put(guest::BOOT, BOOT_CODE);
        put(guest::BOOT_HANDLER, BOOT_HANDLER);
        put(guest::SECOND, SECOND_CODE);
        put(guest::SECOND_HANDLER, SECOND_HANDLER);
        put(guest::SECOND_NMI, SECOND_NMI);
        put(guest::SECOND_FLOOD, SECOND_FLOOD);
        // Real-mode vectors: NMI, 0x40 and 0x41.
        put(&(SECOND_NMI as u32).to_le_bytes(), 2 * 4);
        put(&(SECOND_HANDLER as u32).to_le_bytes(), 0x40 * 4);
        put(&(SECOND_FLOOD as u32).to_le_bytes(), 0x41 * 4);
        // Interrupt gate of vector 0x50 and the IDT register.
        let mut gate = [0u8; 16];
        gate[..2].copy_from_slice(&BOOT_HANDLER.to_le_bytes()[..2]);
        gate[2] = 0x10;
        gate[5] = 0x8e;
        gate[6..12].copy_from_slice(&BOOT_HANDLER.to_le_bytes()[2..]);
        put(&gate, IDT + 0x50 * 16);
        put(&0xfffu16.to_le_bytes(), 0x610);
        put(&IDT.to_le_bytes(), 0x612);
        put(&cycles.to_le_bytes(), 0x620);
        put(&rounds.to_le_bytes(), 0x624);
        for machine in &self.machines {
            machine.set_entry(&Entry { rip: BOOT_CODE, rsi: 0 }).unwrap();
        }
    }

    /// Starts all nodes, node 0's boot processor last.
    pub fn run(&self) {
        self.machines.iter().rev().for_each(|m| m.run().unwrap());
    }

    pub fn stop(&self) {
        self.machines.iter().for_each(|m| m.stop());
    }

    pub fn read(&self, count: Count) -> u32 {
        self.memory.read_obj(GuestAddress(count as u64)).unwrap()
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.screen.0.lock().unwrap()).into_owned()
    }

    /// What the memory holds, in a new one.
    pub fn copy_memory(&self) -> GuestMemoryMmap<()> {
        let copy = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        copy.write_slice(&bytes, GuestAddress(0)).unwrap();
        copy
    }

    /// Where everything stands, for a test that failed.
    pub fn describe(&self) -> String {
        let counts = [Count::Started, Count::Asked, Count::Answered, Count::Nmis].map(|c| (c, self.read(c)));
        let statistics: Vec<_> = self
            .machines
            .iter()
            .map(|m| [m.statistics(0), m.statistics(1)])
            .collect();
        let last: Vec<_> = self.sent.lock().unwrap().iter().rev().take(8).copied().collect();
        format!("{counts:?} {statistics:?} last sent {last:?}")
    }
}
