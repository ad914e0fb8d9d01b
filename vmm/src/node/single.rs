//! A machine on one host: ordinary memory, no protocol.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use krg_dsm::memory::GuestRam;

use super::console::Console;
use super::fabric::Alone;
use super::measure::{self, Measure};
use super::{Happening, NodeEnd, NodeInput, NodeOutput, NodeSpec, boot, devices, end_of, forward, migrate, report};
use crate::machine::layout::ram_ranges;
use crate::machine::{Machine, MachineConfig};

pub(super) fn run(spec: &NodeSpec, input: Receiver<NodeInput>, output: &Arc<dyn NodeOutput>) -> Result<NodeEnd, String> {
    let ranges: Vec<_> = ram_ranges(spec.placement.memory()).iter().map(|r| (r.start, r.end - r.start)).collect();
    let ram = Arc::new(GuestRam::new(&ranges, false).map_err(|e| e.to_string())?);
    let (ends, ended) = channel();
    let (happen, happenings) = channel();
    let config = MachineConfig {
        placement: spec.placement.clone(),
        node: 0,
        tsc_khz: spec.tsc_khz,
        cpuid: spec.cpuid.clone(),
        console: Box::new(Console::new(Arc::clone(output))),
        ends,
    };
    let machine = Machine::new(config, ram.memory().clone(), Arc::new(Alone)).map_err(|e| e.to_string())?;
    let booted = boot::load(spec, ram.memory(), machine.tsc_khz())?;
    output.event(&booted.line, serde_json::json!({"event": "boot", "what": booted.line}));
    let pci = devices::make(spec, booted.disks, &ram, &machine, None)?;
    machine.attach(pci.clone());
    machine.set_entry(&booted.loaded.entry).map_err(|e| e.to_string())?;
    forward(input, happen.clone(), Happening::Input);
    forward(ended, happen, Happening::Machine);
    machine.run().map_err(|e| e.to_string())?;
    let mut measure = Measure::new(0, spec.placement.cpus());
    let mut next = Instant::now() + measure::INTERVAL;
    let end = loop {
        let now = Instant::now();
        if now >= next {
            measure.tell(&machine, None, output);
            next = now + measure::INTERVAL;
        }
        match happenings.recv_timeout(next.saturating_duration_since(now)) {
            Ok(Happening::Input(NodeInput::Console(bytes))) => report::type_in(&machine, &bytes),
            Ok(Happening::Input(NodeInput::Migrate { id, vcpu, node })) => migrate(&machine, id, vcpu, node, output),
            Ok(Happening::Input(NodeInput::Stop(why))) => break NodeEnd::Stopped(why),
            Ok(Happening::Machine(end)) => break end_of(end),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break NodeEnd::Stopped("the front end is gone".into()),
        }
    };
    machine.stop();
    pci.0.stop();
    report::counters(spec, &machine, None, output);
    Ok(end)
}
