//! virtio-net between a driver and a wire made of datagram sockets.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use crate::driver::*;
use krg_virtio::net::{Frames, HEADER_LEN, Net, Offloads};
use vm_memory::{Bytes, GuestAddress};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const MERGEABLE: u64 = 1 << 15;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const BUFFERS: u64 = 0x10_0000;

struct Wire {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Offloads>>,
}

impl Frames for Wire {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(buffer)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(|_| ())
    }

    fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn offloads(&mut self, offloads: Offloads) -> krg_virtio::Result<()> {
        *self.offloads.lock().unwrap() = offloads;
        Ok(())
    }
}

struct Fixture {
    machine: Machine,
    driver: Driver,
    receive: Queue,
    transmit: Queue,
    peer: UnixDatagram,
    offloads: Arc<Mutex<Offloads>>,
}

fn fixture(features: u64) -> Fixture {
    let (socket, peer) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let offloads = Arc::new(Mutex::new(Offloads::default()));
    let wire = |socket| Wire {
        socket,
        offloads: offloads.clone(),
    };
    let net = Net::new("net0", MAC, wire(socket.try_clone().unwrap()), wire(socket)).unwrap();
    let machine = machine(net);
    let driver = Driver::probe(&machine);
    driver.negotiate(VERSION_1 | features);
    let receive = driver.queue(0, 16, 0x1_0000);
    let transmit = driver.queue(1, 16, 0x2_0000);
    driver.start();
    Fixture {
        machine,
        driver,
        receive,
        transmit,
        peer,
        offloads,
    }
}

impl Fixture {
    /// Offers receive buffer `number` of `len` bytes.
    fn buffer(&mut self, number: u16, len: u32) {
        let at = BUFFERS + 0x1_0000 * u64::from(number);
        self.driver.describe(self.receive.table, number, at, len, WRITE, 0);
        self.driver.offer(&mut self.receive, number);
    }

    fn received(&self, number: u32, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let at = BUFFERS + 0x1_0000 * u64::from(number);
        self.machine.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// A frame with an empty header before it.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend((0..len).map(|i| i as u8));
    frame
}

#[test]
fn frames_go_both_ways() {
    let mut f = fixture(EVENT_IDX);
    assert_eq!(f.driver.device_config(0), MAC);
    f.buffer(0, 2000);
    f.buffer(1, 2000);
    f.driver.kick(&f.receive);
    f.peer.send(&frame(100)).unwrap();
    assert_eq!(f.driver.wait_used(&mut f.receive), (0, 112));
    let bytes = f.received(0, 112);
    assert_eq!(bytes[10..12], [1, 0], "one buffer");
    assert_eq!(bytes[12..], frame(100)[12..]);
    assert_eq!(f.machine.interrupts.recv_timeout(PATIENCE), Ok((0xFEE0_0000, 0x41)));

    let sent = frame(60);
    f.machine.memory.write_slice(&sent, GuestAddress(0x8_0000)).unwrap();
    f.driver.describe(f.transmit.table, 0, 0x8_0000, 12, NEXT, 1);
    f.driver.describe(f.transmit.table, 1, 0x8_000c, 60, 0, 0);
    f.driver.offer(&mut f.transmit, 0);
    f.driver.kick(&f.transmit);
    let mut bytes = [0; 200];
    let len = f.peer.recv(&mut bytes).unwrap();
    assert_eq!(bytes[..len], sent);
    assert_eq!(f.driver.wait_used(&mut f.transmit), (0, 0));
}

#[test]
fn a_frame_waits_for_its_buffers() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut f = fixture(features);
        let long = frame(2500);
        f.peer.send(&long).unwrap();
        for number in 0..3 {
            assert_eq!(f.driver.used(&mut f.receive), None);
            f.buffer(number, 1000);
            f.driver.kick(&f.receive);
            // Time to misplace it, which the next check would see.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let mut bytes = Vec::new();
        for (number, len) in [(0, 1000), (1, 1000), (2, 512)] {
            assert_eq!(f.driver.wait_used(&mut f.receive), (number, len));
            bytes.extend(f.received(number, len));
        }
        assert_eq!(bytes[10..12], [3, 0], "three buffers");
        assert_eq!(bytes[12..], long[12..]);
    }
}

#[test]
fn what_fits_no_buffer_is_dropped() {
    let mut f = fixture(0);
    f.buffer(0, 100);
    f.driver.kick(&f.receive);
    f.peer.send(&frame(200)).unwrap();
    f.peer.send(&[0; 5]).unwrap();
    f.peer.send(&frame(50)).unwrap();
    assert_eq!(f.driver.wait_used(&mut f.receive), (0, 62));
    assert_eq!(f.received(0, 62)[12..], frame(50)[12..]);
}

#[test]
fn offloads_follow_the_driver() {
    let f = fixture(GUEST_CSUM | GUEST_TSO4);
    // A pause is answered after the activation.
    f.machine.root.pause().unwrap();
    let seen = *f.offloads.lock().unwrap();
    assert!(seen.checksum && seen.tso4 && !seen.tso6 && !seen.ecn);
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_device() {
    let mut f = fixture(MERGEABLE);
    f.buffer(0, 11);
    f.driver.kick(&f.receive);
    f.peer.send(&frame(20)).unwrap();
    f.driver.wait_status(NEEDS_RESET);
}

#[test]
fn a_stopped_device_sends_nothing() {
    let mut f = fixture(0);
    f.machine.root.stop();
    f.driver.describe(f.transmit.table, 0, 0x8_0000, 72, 0, 0);
    f.driver.offer(&mut f.transmit, 0);
    f.driver.kick(&f.transmit);
    f.peer.set_nonblocking(true).unwrap();
    assert!(f.peer.recv(&mut [0; 100]).is_err());
}

#[test]
fn both_queues_are_saved_and_restored() {
    let mut f = fixture(EVENT_IDX);
    f.buffer(0, 2000);
    f.driver.kick(&f.receive);
    f.peer.send(&frame(100)).unwrap();
    f.driver.wait_used(&mut f.receive);
    f.machine.root.pause().unwrap();
    let state = f.machine.root.save().unwrap();
    let other = fixture(0);
    assert!(other.machine.root.restore(&state).is_ok());
    assert_eq!(other.machine.root.save().unwrap(), state);
    let json = serde_json::to_value(&state).unwrap();
    let rings = &json["slots"][1]["function"]["Virtio"]["rings"];
    assert_eq!(rings[0]["next_used"], 1);
    assert_eq!(rings[1]["next_used"], 0);
}
