//! Fills nearly all memory there is, with words that depend on their address, and checks each of them.
//!
//! Each CPU has a process: threads would share page tables and the lock of their memory, and this is about the
//! memory. It fills what is free on its own NUMA node, and a part of the next one's. When all have filled, it
//! checks both, and the part of its own node that another process filled.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::region::{Region, Seen};

/// Spreads consecutive numbers over all bits; odd, so no two words of the machine are equal.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the process of one CPU fills.
struct Part {
    cpu: usize,
    /// Bytes on its own node.
    own: usize,
    /// On the next CPU's node.
    far: Region,
}

/// A worker process, as the first one sees it.
struct Worker {
    cpu: usize,
    stream: UnixStream,
}

impl Worker {
    /// What it has to say at the end of a step.
    fn answer(&mut self) -> Result<u64, String> {
        let mut answer = [0; 8];
        self.stream.read_exact(&mut answer).map_err(|_| format!("the process of CPU {} has ended", self.cpu))?;
        Ok(u64::from_le_bytes(answer))
    }
}

/// Fills and checks; whether all words were right.
pub fn run(keep: usize, far: usize, cpus: &[usize]) -> Result<bool, String> {
    let nodes = cpus.iter().map(|cpu| node_of(*cpu)).collect::<Result<Vec<_>, _>>()?;
    let mut parts = Vec::new();
    for (i, &cpu) in cpus.iter().enumerate() {
        let workers = nodes.iter().filter(|node| **node == nodes[i]).count();
        // As many parts of others come to this node as it has CPUs.
        let own = (free(nodes[i])? / workers).saturating_sub(keep / workers + far) & !4095;
        let next = nodes[(i + 1) % nodes.len()];
        let far = Region::new(far, Seen::ByAll, Some(next)).map_err(|e| format!("memory of node {next}: {e}"))?;
        parts.push(Part { cpu, own, far });
    }
    let far_bytes = far * parts.len();
    let own_bytes: usize = parts.iter().map(|part| part.own).sum();
    let mut workers = Vec::new();
    for i in 0..parts.len() {
        let (stream, theirs) = UnixStream::pair().map_err(|e| format!("socket pair: {e}"))?;
        // SAFETY: this process has one thread, so the child may go on as it likes.
        match unsafe { libc::fork() } {
            -1 => return Err(format!("fork: {}", std::io::Error::last_os_error())),
            0 => {
                drop((stream, workers));
                let done = work(i, &mut parts, nodes[i], theirs);
                if let Err(error) = &done {
                    eprintln!("guest-memory: CPU {}: {error}", cpus[i]);
                }
                std::process::exit(i32::from(done.is_err()));
            }
            _ => workers.push(Worker { cpu: cpus[i], stream }),
        }
    }
    let mut wrong = 0;
    for worker in &mut workers {
        worker.answer()?;
    }
    println!("memory: filled {} MiB on {} CPUs, {} MiB of them on other CPUs' nodes", (own_bytes + far_bytes) >> 20, cpus.len(), far_bytes >> 20);
    for worker in &mut workers {
        worker.stream.write_all(&[1]).map_err(|e| format!("the process of CPU {}: {e}", worker.cpu))?;
    }
    for worker in &mut workers {
        wrong += worker.answer()?;
    }
    println!("memory: checked {} MiB, and {} MiB on both CPUs: {wrong} wrong words", (own_bytes + far_bytes) >> 20, far_bytes >> 20);
    Ok(wrong == 0)
}

/// The work of CPU number `i` of all.
fn work(i: usize, parts: &mut [Part], node: usize, mut stream: UnixStream) -> Result<(), String> {
    let lost = |e: std::io::Error| format!("the first process: {e}");
    pin(parts[i].cpu)?;
    let mut own = Region::new(parts[i].own, Seen::Here, Some(node)).map_err(|e| format!("memory of node {node}: {e}"))?;
    let before = (i + parts.len() - 1) % parts.len();
    fill(parts[i].far.words(), salt(i, 1));
    fill(own.words(), salt(i, 0));
    stream.write_all(&0u64.to_le_bytes()).map_err(lost)?;
    stream.read_exact(&mut [0]).map_err(lost)?;
    let wrong = wrong(own.words(), salt(i, 0)) + wrong(parts[i].far.words(), salt(i, 1)) + wrong(parts[before].far.words(), salt(before, 1));
    stream.write_all(&wrong.to_le_bytes()).map_err(lost)
}

/// The number of a region's first word: no two regions have a number in common.
fn salt(part: usize, region: u64) -> u64 {
    (2 * part as u64 + region + 1) << 40
}

fn fill(words: &mut [u64], salt: u64) {
    for (number, word) in words.iter_mut().enumerate() {
        *word = (salt + number as u64).wrapping_mul(SPREAD);
    }
}

/// How many words are not what `fill` wrote.
fn wrong(words: &[u64], salt: u64) -> u64 {
    words.iter().enumerate().map(|(number, word)| u64::from(*word != (salt + number as u64).wrapping_mul(SPREAD))).sum()
}

/// The NUMA node of a CPU.
fn node_of(cpu: usize) -> Result<usize, String> {
    let folder = format!("/sys/devices/system/cpu/cpu{cpu}");
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("node")?.parse().ok()).next().ok_or(format!("{folder}: names no node"))
}

/// Free bytes of a NUMA node.
fn free(node: usize) -> Result<usize, String> {
    let path = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let kib = text.lines().find_map(|line| line.split_once("MemFree:")?.1.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    kib.map(|kib| kib << 10).ok_or(format!("{path}: no MemFree"))
}

fn pin(cpu: usize) -> Result<(), String> {
    // SAFETY: `set` is a plain bit mask of the size that is given, valid when zero; the number is checked.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if cpu < 8 * size_of_val(&set) {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    if result == 0 { Ok(()) } else { Err("there is no such CPU".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_changed_or_moved_is_found() {
        let mut words = vec![0; 4096];
        fill(&mut words, salt(3, 1));
        assert_eq!(wrong(&words, salt(3, 1)), 0);
        assert_eq!(wrong(&words, salt(3, 0)), 4096, "another region's words");
        words[77] ^= 1 << 63;
        words.swap(512, 1024);
        assert_eq!(wrong(&words, salt(3, 1)), 3);
    }
}
