//! The measured machine: the program itself over two node processes of this host, with a guest that tells its
//! progress on the console.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use krg_guest_kernel::micro::boot::{self, Begin};
use krg_guest_kernel::micro::load::{self, MOST, Phase, Progress};
use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

const MEMORY: u64 = 256 << 20;
/// Two hosts with two CPUs each. Both are this one, which need not have four.
const HOSTS: &str = "127.0.0.1 cpus=2\n127.0.0.1 cpus=2\n";
/// If set, where the scheduler's decisions go.
const LOG: &str = "KRG_SCHED_LOG";
/// What takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(10);
/// The guest tells its progress so often a second.
const A_SECOND: u64 = 10;

/// What the console showed, and when each vCPU told its progress last.
#[derive(Clone, Default)]
struct Shown {
    progress: Progress,
    told: [Option<Instant>; MOST],
}

/// A running machine; dropping it ends it.
pub struct Machine {
    front: Child,
    place: TempDir,
    shown: Arc<Mutex<Shown>>,
    /// The last line that the program said.
    said: Arc<Mutex<String>>,
}

/// The host's TSC in ticks a second; the guest's is the same.
pub fn tsc_hz() -> anyhow::Result<u64> {
    let kvm = kvm_ioctls::Kvm::new().context("/dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let khz = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?.get_tsc_khz().context("KVM_GET_TSC_KHZ")?;
    Ok(u64::from(khz) * 1000)
}

impl Machine {
    /// A machine whose vCPUs begin so and have these phases, shared out evenly over the hosts in order, nobody moving them.
    pub fn start(loads: &[(Begin, Vec<Phase>)]) -> anyhow::Result<Self> {
        let every = u32::try_from(tsc_hz()? / A_SECOND)?;
        let micro = boot::builder(MEMORY).build(loads.len(), |asm, vcpu| load::program(asm, vcpu, &loads[vcpu].1, every))?;
        let place = TempDir::new_with_prefix("/tmp/krg-bench").map_err(|error| anyhow!("a folder in /tmp: {error}"))?;
        std::fs::write(place.as_path().join("kernel"), boot::elf(&micro, |vcpu| loads[vcpu].0)?)?;
        std::fs::write(place.as_path().join("hosts.txt"), HOSTS)?;
        let mut front = Command::new(env!("CARGO_BIN_EXE_krg-vmm"))
            .args(["--nodes", "hosts.txt", "--kernel", "kernel", "--memory", "256M", "--api", "api", "--sched", "off"])
            .args(std::env::var_os(LOG).map(|file| ["--sched-log".into(), file]).into_iter().flatten())
            .args(["--cpus", &loads.len().to_string()])
            .current_dir(place.as_path())
            .env("HOME", place.as_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting krg-vmm")?;
        let (console, errors) = (front.stdout.take(), front.stderr.take());
        let machine = Machine { front, place, shown: Arc::default(), said: Arc::default() };
        let (shown, said) = (machine.shown.clone(), machine.said.clone());
        if let Some(console) = console {
            thread::spawn(move || watch(console, &shown));
        }
        if let Some(errors) = errors {
            thread::spawn(move || {
                for line in BufReader::new(errors).lines().map_while(Result::ok) {
                    *said.lock().unwrap_or_else(PoisonError::into_inner) = line;
                }
            });
        }
        let begun: Vec<usize> = (0..loads.len()).filter(|vcpu| loads[*vcpu].0 == Begin::Now).collect();
        let all_tell = |machine: &Machine| Ok(begun.iter().all(|vcpu| machine.shown().told[*vcpu].is_some()));
        machine.wait("the guest does not tell its progress", all_tell)?;
        Ok(machine)
    }

    fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Phases a vCPU has begun.
    pub fn phases(&self, vcpu: usize) -> u32 {
        self.shown().progress.phases[vcpu]
    }

    /// Rounds a second of these vCPUs together in the next `time`, each from one of its words on the console to
    /// another.
    pub fn rate(&self, vcpus: &[usize], time: Duration) -> anyhow::Result<f64> {
        // From the next word on: the last one may be of before what is to be measured.
        let first = self.next_words(vcpus)?;
        thread::sleep(time);
        let last = self.next_words(vcpus)?;
        let rate = |(before, after): (&(u32, Instant), &(u32, Instant))| {
            f64::from(after.0.wrapping_sub(before.0)) / (after.1 - before.1).as_secs_f64()
        };
        Ok(first.iter().zip(&last).map(rate).sum())
    }

    /// The next word of each of these, and when it came.
    fn next_words(&self, vcpus: &[usize]) -> anyhow::Result<Vec<(u32, Instant)>> {
        let before = self.shown().told;
        let later = |machine: &Machine| Ok(vcpus.iter().all(|vcpu| machine.shown().told[*vcpu] > before[*vcpu]));
        self.wait("the guest tells no progress any more", later)?;
        let shown = self.shown();
        let word = |vcpu: usize| Some((shown.progress.rounds[vcpu], shown.told[vcpu]?));
        vcpus.iter().map(|vcpu| word(*vcpu).context("a vCPU that told nothing")).collect()
    }

    /// Looks until `is` says so; how long it took.
    pub fn wait(&self, what: &str, is: impl Fn(&Machine) -> anyhow::Result<bool>) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        while !is(self)? {
            if begun.elapsed() > PATIENCE {
                let status = self.status().unwrap_or_default();
                let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                bail!("{what}; scheduler {}, vCPUs {}; {said}", status["sched"], status["vcpus"]);
            }
            thread::sleep(LOOK);
        }
        Ok(begun.elapsed())
    }

    /// A request on the control socket; its answer, if it is a good one.
    pub fn ask(&self, request: &Value) -> anyhow::Result<Value> {
        let mut socket = UnixStream::connect(self.place.as_path().join("api")).context("the control socket")?;
        socket.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer)?;
        let answer: Value = serde_json::from_str(&answer)?;
        if answer["ok"] == true { Ok(answer) } else { bail!("{request}: {answer}") }
    }

    fn status(&self) -> anyhow::Result<Value> {
        Ok(self.ask(&serde_json::json!({"cmd": "status"}))?["status"].clone())
    }

    /// Another policy decides from now on.
    pub fn policy(&self, name: &str) -> anyhow::Result<()> {
        self.ask(&serde_json::json!({"cmd": "sched", "policy": name})).map(drop)
    }

    /// Moves a vCPU, as the user.
    pub fn migrate(&self, vcpu: Value, node: usize) -> anyhow::Result<()> {
        self.ask(&serde_json::json!({"cmd": "migrate", "vcpu": vcpu, "node": node})).map(drop)
    }

    /// Keeps a vCPU on a node, or lets it go.
    pub fn pin(&self, vcpu: usize, node: Option<usize>) -> anyhow::Result<()> {
        self.ask(&serde_json::json!({"cmd": "pin", "vcpu": vcpu, "node": node})).map(drop)
    }

    /// The node of each vCPU.
    pub fn places(&self) -> anyhow::Result<Vec<u64>> {
        let status = self.status()?;
        let vcpus = status["vcpus"].as_array().context("status without vCPUs")?;
        vcpus.iter().map(|vcpu| vcpu["node"].as_u64().context("a vCPU without a node")).collect()
    }

    /// Moves of the scheduler so far.
    pub fn moves(&self) -> anyhow::Result<u64> {
        self.status()?["sched"]["moves"].as_u64().context("status without moves")
    }

    /// CPUs that the vCPUs of each node would use, as measured last.
    pub fn demands(&self) -> anyhow::Result<[f64; 2]> {
        let status = self.status()?;
        let mut demands = [0.0; 2];
        for vcpu in status["vcpus"].as_array().context("status without vCPUs")? {
            let part = |name: &str| vcpu["load"][name].as_f64().context("a vCPU that was not measured");
            let node = vcpu["node"].as_u64().and_then(|node| demands.get_mut(node as usize)).context("a node too many")?;
            *node += (part("ran")? + part("waited")? + part("stalled")?).min(1.0);
        }
        Ok(demands)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its nodes end with it.
        let _ = self.ask(&serde_json::json!({"cmd": "stop"}));
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.front.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(LOOK);
        }
        let _ = self.front.kill();
        let _ = self.front.wait();
    }
}

/// Reads the console to its end.
fn watch(mut console: impl Read, shown: &Mutex<Shown>) {
    let mut bytes = [0; 4096];
    while let Ok(len @ 1..) = console.read(&mut bytes) {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in &bytes[..len] {
            if let Some(vcpu) = shown.progress.take(*byte) {
                shown.told[vcpu] = Some(Instant::now());
            }
        }
    }
}
