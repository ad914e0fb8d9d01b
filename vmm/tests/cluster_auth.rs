//! Strangers at a node's port, and nodes a front end must not trust.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::Streams;
use krg_vmm::cluster::daemon::{Daemon, DaemonHandle};
use krg_vmm::cluster::handshake::{
    self, DialError, HANDSHAKE_LIMIT, HELLO_SIZE, HandshakeError, Hello, MAGIC, PROTOCOL_VERSION, PeerStream, Role,
};
use krg_vmm::cluster::link::{Incoming, Link};
use krg_vmm::cluster::message::{FromNode, ToNode};
use krg_vmm::cluster::secret::Secret;
use krg_vmm::node::{NodeEnd, NodeInput, NodeOutput, NodeSpec};

fn no_machine(_: NodeSpec, _: Vec<Option<Streams>>, _: Receiver<NodeInput>, _: Arc<dyn NodeOutput>) -> NodeEnd {
    NodeEnd::PowerOff
}

fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

struct Node {
    address: SocketAddr,
    handle: DaemonHandle,
    thread: Option<thread::JoinHandle<()>>,
}

impl Node {
    fn start() -> Self {
        let daemon = Daemon::bind("127.0.0.1:0".parse().unwrap(), secret(1), Arc::new(no_machine)).unwrap();
        let (address, handle) = (daemon.address(), daemon.handle());
        Self {
            address,
            handle,
            thread: Some(thread::spawn(move || daemon.serve().unwrap())),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(HANDSHAKE_LIMIT * 2)).unwrap();
        stream
    }

    /// A friend gets in and hears an offer.
    fn works(&self) {
        let link = Link::<ToNode, FromNode>::new(self.dial(&secret(1)).unwrap()).unwrap();
        link.send(ToNode::Hello {
            software: "1".into(),
            machine: "m".into(),
        })
        .unwrap();
        let offer = link.receive(Duration::from_secs(10));
        assert!(
            matches!(offer, Some(Incoming::Message(FromNode::Offer(_)))),
            "{offer:?}"
        );
    }

    fn dial(&self, secret: &Secret) -> Result<TcpStream, DialError> {
        handshake::dial(self.address, Role::Control, secret)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.handle.stop("the test is over");
        self.thread.take().unwrap().join().unwrap();
    }
}

fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let _ = stream.read_to_end(&mut heard);
    heard
}

#[test]
fn the_right_secret_gets_in_and_a_wrong_one_does_not() {
    let node = Node::start();
    node.works();
    let error = node.dial(&secret(2)).unwrap_err();
    assert!(matches!(error, DialError::Handshake(HandshakeError::Secret)), "{error}");
    assert!(error.to_string().contains("--secret-file"));
}

#[test]
fn a_peer_needs_a_session() {
    let node = Node::start();
    for stream in [PeerStream::Messages, PeerStream::Blocks] {
        let role = Role::Peer { from: 1, to: 0, session: [0; 32], stream };
        // Not even with the cluster's secret.
        assert!(handshake::dial(node.address, role, &secret(1)).is_err());
        assert!(handshake::dial(node.address, role, &secret(1).peer_key(&[0; 32])).is_err());
    }
}

#[test]
fn garbage_hears_nothing_and_breaks_nothing() {
    let node = Node::start();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0xff; 200], b"KRGVMM\r\r"] {
        let mut stream = node.connect();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_eq!(rest(stream), b"");
    }
    node.works();
}

#[test]
fn version_skew_is_told_to_both_sides_and_nothing_else_is() {
    let node = Node::start();
    let mut stream = node.connect();
    let mut hello = Hello {
        role: Role::Control,
        nonce: [9; 32],
    }
    .encode();
    hello[8] = 99;
    stream.write_all(&hello).unwrap();
    let heard = rest(stream);
    assert_eq!(heard.len(), HELLO_SIZE);
    assert_eq!(heard[..8], MAGIC);
    assert_eq!(heard[8..10], PROTOCOL_VERSION.to_le_bytes());

    let later = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = later.local_addr().unwrap();
    let serving = thread::spawn(move || {
        let (mut stream, _) = later.accept().unwrap();
        let mut theirs = [0; HELLO_SIZE];
        stream.read_exact(&mut theirs).unwrap();
        stream.write_all(&hello).unwrap();
        rest(stream)
    });
    let error = handshake::dial(address, Role::Control, &secret(1)).unwrap_err();
    assert!(
        matches!(error, DialError::Handshake(HandshakeError::Version { theirs: 99 })),
        "{error}"
    );
    assert_eq!(serving.join().unwrap(), b"", "no proof for another version");
}

#[test]
fn a_proof_can_not_be_replayed_or_reflected() {
    let node = Node::start();
    // What an impostor heard from a real connector is worth nothing on another connection.
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = impostor.local_addr().unwrap();
    let listening = thread::spawn(move || {
        let (mut stream, _) = impostor.accept().unwrap();
        let mut hello = [0; HELLO_SIZE];
        stream.read_exact(&mut hello).unwrap();
        stream
            .write_all(
                &Hello {
                    role: Role::Control,
                    nonce: [3; 32],
                }
                .encode(),
            )
            .unwrap();
        let mut proof = [0; 32];
        stream.read_exact(&mut proof).unwrap();
        (hello, proof)
    });
    assert!(handshake::dial(address, Role::Control, &secret(1)).is_err());
    let (hello, proof) = listening.join().unwrap();
    let mut stream = node.connect();
    stream.write_all(&hello).unwrap();
    stream.write_all(&proof).unwrap();
    let heard = rest(stream);
    assert_eq!(heard[HELLO_SIZE..], [0; 33], "refused");
    node.works();
}

#[test]
fn half_open_and_slow_connections_end_in_time_and_keep_nobody_out() {
    let node = Node::start();
    let start = Instant::now();
    let silent: Vec<_> = (0..100).map(|_| node.connect()).collect();
    node.works();
    let mut slow = node.connect();
    let hello = Hello {
        role: Role::Control,
        nonce: [1; 32],
    }
    .encode();
    let dripping = thread::spawn(move || {
        for byte in hello {
            if slow.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        rest(slow)
    });
    for stream in silent {
        assert_eq!(rest(stream), b"");
    }
    assert!(start.elapsed() < HANDSHAKE_LIMIT + Duration::from_secs(2));
    assert_eq!(dripping.join().unwrap(), b"");
    node.works();
}

#[test]
fn nonsense_after_the_handshake_ends_only_that_session() {
    let node = Node::start();
    for nonsense in [&[0xff; 64][..], b"\x02\0\0\0{}", b"\x0b\0\0\0\"Heartbeat\""] {
        let mut stream = node.dial(&secret(1)).unwrap();
        stream.write_all(nonsense).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        rest(stream);
    }
    let link = Link::<ToNode, FromNode>::new(node.dial(&secret(1)).unwrap()).unwrap();
    link.send(ToNode::Hello {
        software: "1".into(),
        machine: "m".into(),
    })
    .unwrap();
    assert!(matches!(
        link.receive(HANDSHAKE_LIMIT),
        Some(Incoming::Message(FromNode::Offer(_)))
    ));
    link.send(ToNode::Start).unwrap();
    let refused = link.receive(HANDSHAKE_LIMIT);
    assert!(
        matches!(&refused, Some(Incoming::Message(FromNode::Refused(line))) if line.contains("Start out of turn")),
        "{refused:?}"
    );
    drop(link);
    node.works();
}

#[test]
fn a_second_front_end_is_told_who_has_the_node() {
    let node = Node::start();
    let first = Link::<ToNode, FromNode>::new(node.dial(&secret(1)).unwrap()).unwrap();
    first
        .send(ToNode::Hello {
            software: "1".into(),
            machine: "alpha".into(),
        })
        .unwrap();
    assert!(matches!(
        first.receive(HANDSHAKE_LIMIT),
        Some(Incoming::Message(FromNode::Offer(_)))
    ));
    let second = Link::<ToNode, FromNode>::new(node.dial(&secret(1)).unwrap()).unwrap();
    second
        .send(ToNode::Hello {
            software: "1".into(),
            machine: "beta".into(),
        })
        .unwrap();
    let refused = second.receive(HANDSHAKE_LIMIT);
    assert!(
        matches!(&refused, Some(Incoming::Message(FromNode::Refused(line))) if line.contains("\"alpha\"")),
        "{refused:?}"
    );
    drop(first);
    // The node notices at once; its thread needs a moment.
    thread::sleep(Duration::from_millis(300));
    node.works();
}
