//! The network alone: a round trip of as many bytes as a vCPU's state has.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context;
use krg_dsm::transport;

/// A connection like the nodes', to a thread that answers each block of bytes with one byte.
pub struct Wire {
    stream: TcpStream,
    block: Vec<u8>,
}

impl Wire {
    pub fn new(bytes: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        for end in [&stream, &far] {
            transport::prepare(end, Duration::from_secs(3600)).map_err(|(option, errno)| anyhow::anyhow!("{option}: {errno}"))?;
        }
        std::thread::spawn(move || {
            let mut block = vec![0; bytes];
            while far.read_exact(&mut block).is_ok() && far.write_all(&[1]).is_ok() {}
        });
        Ok(Wire { stream, block: vec![7; bytes] })
    }

    pub fn round_trip(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        self.stream.write_all(&self.block)?;
        self.stream.read_exact(&mut [0]).context("the bare connection")?;
        Ok(begun.elapsed())
    }
}
