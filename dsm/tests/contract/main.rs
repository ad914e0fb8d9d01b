//! What every transport promises, tried on each: TCP over loopback, and RDMA where there is some.
//!
//!     contract                     all there is here, both nodes in this process
//!     contract serve ADDRESS       be the far node, for whoever connects, until standard input ends
//!     contract with ADDRESS [NAME] be the near node against the far one at ADDRESS, over TCP and RDMA; of
//!                                  the scenarios those whose names contain NAME
//!
//! Each scenario is two programs, one for each node, with a connection between them beside the transport
//! under test.

mod blocks;
mod nodes;
mod scenarios;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Instant;

use krg_dsm::transport::rdma::{self, RdmaPort};

use nodes::{Kind, Listener};
use scenarios::SCENARIOS;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let address = |text: &str| text.parse::<SocketAddr>().expect("ADDRESS is like 10.7.0.1:7600");
    match words[..] {
        ["serve", at] => {
            let listener = Listener::bind(address(at));
            println!("serving at {}", listener.address());
            std::thread::spawn(move || listener.serve());
            // Whoever started this closes it at the end.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            ExitCode::SUCCESS
        }
        ["with", at, ref name @ ..] => {
            let name = name.first().copied().unwrap_or_default();
            outcome(run(Kind::Tcp, address(at), name) & run(Kind::Rdma, address(at), name))
        }
        // `cargo test` passes filters and options: everything runs all the same.
        _ => {
            let here = |ip| {
                let listener = Listener::bind(SocketAddr::new(ip, 0));
                let address = listener.address();
                std::thread::spawn(move || listener.serve());
                address
            };
            let tcp = run(Kind::Tcp, here("127.0.0.1".parse().unwrap()), "");
            let ports = RdmaPort::of_this_host();
            let rdma = match (ports.iter().find(|port| port.address.is_ipv4()), rdma::available()) {
                (None, _) => skip("this host has no RDMA device"),
                (_, Err(reason)) => skip(&reason.to_string()),
                (Some(port), Ok(())) => run(Kind::Rdma, here(port.address), ""),
            };
            outcome(tcp & rdma)
        }
    }
}

fn skip(reason: &str) -> bool {
    println!("skipped: RDMA: {reason}");
    true
}

fn outcome(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs scenarios as the near node; whether all were fine.
fn run(kind: Kind, far: SocketAddr, name: &str) -> bool {
    let (mut good, mut tried) = (true, 0);
    for scenario in SCENARIOS.iter().filter(|scenario| scenario.name.contains(name)) {
        tried += 1;
        let begun = Instant::now();
        let result = nodes::near(kind, far, scenario);
        let took = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("test {kind}::{} ... ok ({took:.1} s)", scenario.name),
            Err(reason) => {
                println!("test {kind}::{} ... FAILED: {reason} ({took:.1} s)", scenario.name);
                good = false;
            }
        }
    }
    println!("{kind}: all {tried} tried");
    good
}
