//! Watches a Linux guest from inside while something happens to it: clocks, timers, and a TCP connection.
//!
//! `guest-witness CPU CPU... [ADDRESS:PORT]` runs until SIGTERM. A thread on each CPU reads CLOCK_MONOTONIC and the
//! TSC and compares them with what any thread has read before (`clock.rs`), and sleeps in between: every sleep is a
//! timer that has to fire. With an address it keeps one TCP connection to a server that sends everything back, and
//! compares (`tcp.rs`). In the end it prints a line each and `witness: all well`, or says what was wrong.
//!
//! The exit status is 0 if all was well, 1 if something was wrong, 2 if something could not be done.

mod clock;
mod tcp;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by SIGTERM.
static OVER: AtomicBool = AtomicBool::new(false);

extern "C" fn over(_: libc::c_int) {
    OVER.store(true, Ordering::SeqCst);
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(wrong) if wrong.is_empty() => {
            println!("witness: all well");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            println!("witness: WRONG: {}", wrong.join("; "));
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("guest-witness: {error}");
            ExitCode::from(2)
        }
    }
}

/// Watches; what was wrong.
fn run(words: impl Iterator<Item = String>) -> Result<Vec<String>, String> {
    let (mut cpus, mut server) = (Vec::new(), None);
    for word in words {
        match word.parse() {
            Ok(cpu) => cpus.push(cpu),
            Err(_) => server = Some(word.parse().map_err(|_| format!("{word}: not a CPU's number nor an ADDRESS:PORT"))?),
        }
    }
    if cpus.is_empty() {
        return Err("usage: guest-witness CPU... [ADDRESS:PORT]".into());
    }
    // SAFETY: the handler does nothing but store to an atomic.
    if unsafe { libc::signal(libc::SIGTERM, over as *const () as libc::sighandler_t) } == libc::SIG_ERR {
        return Err(format!("signal: {}", std::io::Error::last_os_error()));
    }
    let watched = clock::Watched::default();
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        let clocks: Vec<_> = cpus.iter().map(|&cpu| (cpu, scope.spawn({
            let watched = &watched;
            move || clock::watch(cpu, watched, &OVER)
        }))).collect();
        let exchange = server.map(|server| scope.spawn(move || tcp::exchange(server, &OVER)));
        for (cpu, thread) in clocks {
            match thread.join().map_err(|_| "its thread panicked".to_owned()).and_then(|told| told) {
                Ok(told) => {
                    println!("clock: CPU {cpu}: {told}");
                    wrong.extend(told.wrong().map(|what| format!("CPU {cpu}: {what}")));
                }
                Err(error) => wrong.push(format!("CPU {cpu}: {error}")),
            }
        }
        match exchange.map(|thread| thread.join().map_err(|_| "its thread panicked".to_owned()).and_then(|told| told)) {
            Some(Ok(told)) => println!("tcp: {told}"),
            Some(Err(error)) => wrong.push(format!("TCP: {error}")),
            None => {}
        }
    });
    Ok(wrong)
}
