//! What a stranger, a peer or a front end can send: handshakes from both sides, control frames,
//! and the hosts file's text.

#![no_main]

use std::io::{self, Read, Write};

use krg_vmm::cluster::frame::{self, Envelope};
use krg_vmm::cluster::handshake::{self, HELLO_SIZE, Hello, Role};
use krg_vmm::cluster::hosts::HostsFile;
use krg_vmm::cluster::message::{FromNode, ToNode};
use krg_vmm::cluster::secret::Secret;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A connection whose other side says what the fuzzer wants, in pieces of at most `piece` bytes.
struct Other<'a> {
    says: &'a [u8],
    piece: usize,
}

impl Read for Other<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.piece);
        self.says.read(&mut buffer[..count])
    }
}

impl Write for Other<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What was read, written and read again.
fn again<M: Serialize + DeserializeOwned>(message: &Envelope<M>) -> Envelope<M> {
    let wire = frame::encode(message).expect("what was read can be written");
    frame::read::<M>(&mut wire.as_slice()).expect("and read again")
}

fuzz_target!(|data: &[u8]| {
    let [choice, piece, rest @ ..] = data else { return };
    let mut other = Other {
        says: rest,
        piece: usize::from(*piece).max(1),
    };
    let secret = Secret::from_bytes([7; 32]);
    match choice % 6 {
        // Nobody gets in: the right proof would take a guess of 256 bits.
        0 => assert!(handshake::accept(&mut other, |_| Some(secret.clone())).is_err()),
        1 => assert!(handshake::connect(&mut other, Role::Control, &secret).is_err()),
        2 => {
            if let Ok(message) = frame::read::<ToNode>(&mut other) {
                if let Envelope::Message(ToNode::Prepare(prepare)) = &message {
                    if prepare.check().is_ok() {
                        assert!(prepare.spec.node < prepare.addresses.len());
                    }
                }
                assert!(again(&message) == message);
            }
        }
        3 => {
            if let Ok(message) = frame::read::<FromNode>(&mut other) {
                // Not compared: an event's JSON may hold a number that is rounded in between.
                again(&message);
            }
        }
        4 => {
            if let Some(frame) = rest.first_chunk::<HELLO_SIZE>() {
                if let Ok(hello) = Hello::decode(frame) {
                    assert_eq!(hello.encode(), *frame);
                }
            }
        }
        _ => {
            if let Ok(file) = HostsFile::parse(&String::from_utf8_lossy(rest), |_| None) {
                assert!(!file.hosts.is_empty());
            }
        }
    }
});
