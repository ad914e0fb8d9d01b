//! What a node of the machine can send another about its vCPUs: any bytes, and any messages in any order, while
//! this node's own threads do their part.

#![no_main]

use krg_vmm::node::wire::Wire;
use krg_vmm::ownership::{Input, Output, Ownership};
use libfuzzer_sys::fuzz_target;

const NODES: usize = 3;
const ME: usize = 1;

/// What was read, written and read again.
fn read(bytes: &[u8]) -> Option<Wire> {
    let wire = Wire::decode(bytes)?;
    assert_eq!(Wire::decode(&wire.encode()).as_ref(), Some(&wire));
    Some(wire)
}

fuzz_target!(|data: &[u8]| {
    let Some((owner, mut rest)) = data.split_first() else { return };
    let mut ownership = Ownership::new(ME, NODES, usize::from(*owner) % NODES);
    let (mut stopped, mut restore) = (false, false);
    // A byte says who does something, the next how long the message is.
    while let [what, len, more @ ..] = rest {
        let (bytes, after) = more.split_at(usize::from(*len).min(more.len()));
        rest = after;
        let mut out = Output::default();
        let input = match what % 8 {
            from @ (0 | 2) => match read(bytes) {
                Some(Wire::Vcpu { message, .. }) => Input::Message { from: usize::from(from), message },
                _ => continue,
            },
            3 => Input::Move { id: u64::from(*len), to: usize::from(what / 8) % NODES },
            // A thread says that it has done what it was asked for, and only then.
            4 if ownership.is_leaving() && !stopped => {
                stopped = true;
                Input::Stopped
            }
            5 if ownership.is_leaving() && stopped => Input::Saved { state: bytes.to_vec(), pending: vec![] },
            6 if std::mem::take(&mut restore) => Input::Restored,
            7 => Input::Lost(usize::from(what / 8) % NODES),
            _ => continue,
        };
        let _ = ownership.step(input, &mut out);
        restore |= out.restore.is_some();
        stopped &= ownership.is_leaving();
    }
});
