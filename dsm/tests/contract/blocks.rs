//! Scenarios of frames that are sent from where they are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::{Body, Handler, LostReason, MAX_PAYLOAD, PeerEvent, SendError};

use super::nodes::{News, PATIENCE, Side};
use super::scenarios::{ANSWER, FAR_CLOSED, NEAR_CLOSED, page};

/// Class of those frames, and of others.
const BLOCK: u8 = 3;
const MESSAGE: u8 = 4;

fn body() -> Body {
    Arc::new((0..MAX_PAYLOAD).map(|at| (at * 13 % 241) as u8).collect::<Vec<u8>>())
}

/// Waits until everything has left, which the sending thread may note after the peer has it.
fn await_sent(side: &Side, body: &Body) {
    let begun = Instant::now();
    while side.transport.count(side.peer).queued > 0 || Arc::strong_count(body) > 1 {
        assert!(begun.elapsed() < PATIENCE, "what is sent is kept");
        thread::sleep(Duration::from_millis(1));
    }
}

pub mod order {
    use super::*;

    const COUNT: usize = 300;

    fn part(number: usize) -> std::ops::Range<usize> {
        match number % 3 {
            0 => 0..number,
            1 => number..100_000 + number,
            _ => 0..MAX_PAYLOAD - 2,
        }
    }

    pub fn near(side: &Side) {
        let (news, body) = (side.record(), body());
        for number in 0..COUNT {
            let head = [number as u8, 1];
            side.transport.send_from(1, BLOCK, &head, &body, part(number)).unwrap();
            side.send(MESSAGE, &[number as u8]);
        }
        // What there is not of a body is not sent.
        side.transport
            .send_from(1, BLOCK, &[7], &body, MAX_PAYLOAD - 1..2 * MAX_PAYLOAD)
            .unwrap();
        side.transport
            .send_from(1, BLOCK, &[8], &body, 2 * MAX_PAYLOAD..3 * MAX_PAYLOAD)
            .unwrap();
        let len = MAX_PAYLOAD + 1;
        assert_eq!(
            side.transport.send_from(1, BLOCK, &[0], &body, 0..MAX_PAYLOAD),
            Err(SendError::TooLong { peer: 1, len })
        );
        news.frame(9);
        assert_eq!(side.transport.count(1).class(BLOCK).frames_out, COUNT as u64 + 2);
        await_sent(side, &body);
    }

    pub fn far(side: &Side) {
        let (news, body) = (side.record(), body());
        let bytes = (*body).as_ref();
        let (mut blocks, mut messages) = (0, 0);
        while blocks < COUNT + 2 || messages < COUNT {
            match news.next() {
                News::Frame(BLOCK, payload) if blocks < COUNT => {
                    assert_eq!(payload[..2], [blocks as u8, 1]);
                    assert!(payload[2..] == bytes[part(blocks)], "block {blocks}");
                    blocks += 1;
                }
                News::Frame(BLOCK, payload) => {
                    let last = [&[7, bytes[MAX_PAYLOAD - 1]][..], &[8]];
                    assert_eq!(Some(&&payload[..]), last.get(blocks - COUNT));
                    blocks += 1;
                }
                News::Frame(MESSAGE, payload) => {
                    assert_eq!(payload, [messages as u8]);
                    messages += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        side.send(9, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}

/// The far node takes no block in before a message that was sent after all of them: it comes all the same.
pub mod overtaken {
    use super::*;

    const COUNT: usize = 16;

    struct Waiting {
        has_message: Mutex<bool>,
        changed: Condvar,
        news: Mutex<mpsc::Sender<News>>,
    }

    impl Handler for Waiting {
        fn frame(&self, _: usize, class: u8, payload: &[u8]) {
            let mut has_message = self.has_message.lock().unwrap();
            if class == BLOCK {
                let waited = self
                    .changed
                    .wait_timeout_while(has_message, PATIENCE / 4, |has_message| !*has_message);
                has_message = waited.unwrap().0;
            }
            // Under the lock: the order of what is told is that of coming.
            let _ = self.news.lock().unwrap().send(News::Frame(class, payload.to_vec()));
            *has_message |= class == MESSAGE;
            self.changed.notify_all();
        }

        fn event(&self, event: PeerEvent) {
            let _ = self.news.lock().unwrap().send(News::Event(event));
        }
    }

    pub fn near(side: &Side) {
        let (news, body) = (side.record(), body());
        for number in 0..COUNT {
            let head = [number as u8];
            side.transport
                .send_from(1, BLOCK, &head, &body, 0..MAX_PAYLOAD - 1)
                .unwrap();
        }
        side.send(MESSAGE, b"urgent");
        news.frame(9);
        await_sent(side, &body);
    }

    pub fn far(side: &Side) {
        let (sender, news) = mpsc::channel();
        let handler = Waiting {
            has_message: Mutex::new(false),
            changed: Condvar::new(),
            news: Mutex::new(sender),
        };
        side.transport.start(Arc::new(handler)).unwrap();
        let next = || match news.recv_timeout(PATIENCE).expect("nothing came") {
            News::Frame(class, payload) => (class, payload),
            News::Event(event) => panic!("{event}"),
        };
        let (class, payload) = next();
        assert!(class == MESSAGE && payload == b"urgent", "class {class} came first");
        for number in 0..COUNT {
            let (class, payload) = next();
            assert_eq!((class, payload.len(), payload[0]), (BLOCK, MAX_PAYLOAD, number as u8));
        }
        side.send(9, &[]);
        assert_eq!(news.recv_timeout(PATIENCE), Ok(News::Event(NEAR_CLOSED)));
    }
}

/// The way of the blocks alone fails: that is the end of the peer.
pub mod untaken {
    use super::*;

    pub fn near(side: &Side) {
        let (news, body) = (side.record(), body());
        let mut sent = 0;
        let error = loop {
            match side.transport.send_from(1, BLOCK, &[], &body, 0..MAX_PAYLOAD) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 1000);
        };
        assert!(sent >= 7, "{sent}");
        assert_eq!(error, SendError::Gone { peer: 1 });
        let event = news.event();
        let overrun =
            matches!(event, PeerEvent::Lost { peer: 1, reason: LostReason::Overrun { bytes } } if bytes > 8 << 20);
        assert!(overrun, "{event:?}");
        assert_eq!(
            side.transport.send(1, MESSAGE, &[b"x"]),
            Err(SendError::Gone { peer: 1 })
        );
        side.tell();
        side.transport.shutdown();
        assert_eq!(news.rest(), [], "reported twice");
        await_sent(side, &body);
    }
}

/// The last words are a message, and blocks may still be on their way.
pub mod farewell {
    use super::*;

    const COUNT: u8 = 4;

    pub fn near(side: &Side) {
        let news = side.record();
        let (mut blocks, mut words) = (0, Vec::new());
        let event = loop {
            match news.next() {
                News::Frame(BLOCK, payload) => {
                    assert_eq!((payload.len(), payload[0]), (MAX_PAYLOAD, blocks));
                    blocks += 1;
                }
                News::Frame(_, payload) => words.push(payload),
                News::Event(event) => break event,
            }
        };
        assert_eq!((event, words), (FAR_CLOSED, vec![b"farewell".to_vec()]));
        assert_eq!(
            side.transport.send_from(1, BLOCK, &[], &body(), 0..1),
            Err(SendError::Gone { peer: 1 })
        );
        side.transport.shutdown();
        assert_eq!(news.rest(), [], "something after the end");
    }

    pub fn far(side: &Side) {
        let (news, body) = (side.record(), body());
        for number in 0..COUNT {
            side.transport
                .send_from(0, BLOCK, &[number], &body, 0..MAX_PAYLOAD - 1)
                .unwrap();
        }
        side.send(MESSAGE, b"farewell");
        side.transport.shutdown();
        assert_eq!(news.rest(), []);
    }
}

/// Pieces of blocks as they are sent by the node.
const PIECE: usize = 128 << 10;

/// The pattern of a read miss while a node streams. The time is told, not judged: it depends on the host.
pub mod beside {
    use super::*;

    /// Two blocks.
    const UNDER_WAY: usize = 4 << 20;

    pub fn near(side: &Side) {
        let (done, body) = (AtomicBool::new(false), body());
        thread::scope(|scope| {
            scope.spawn(|| {
                let begun = Instant::now();
                while !done.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE {
                    if side.transport.count(1).queued + PIECE > UNDER_WAY {
                        thread::sleep(Duration::from_micros(500));
                    } else if side.transport.send_from(1, BLOCK, &[], &body, 0..PIECE).is_err() {
                        break;
                    }
                }
            });
            page::measure(side, "round trip with a page beside blocks", 100);
            done.store(true, Ordering::Relaxed);
        });
        side.transport.shutdown();
    }
}

/// Blocks one after the other, as fast as they go. The time is told, not judged.
pub mod stream {
    use super::*;

    const COUNT: usize = 256;

    pub fn near(side: &Side) {
        let (news, body) = (side.record(), body());
        let started = Instant::now();
        for number in 0..COUNT {
            let offset = number * PIECE % MAX_PAYLOAD;
            side.transport
                .send_from(1, BLOCK, &[0; 8], &body, offset..offset + PIECE)
                .unwrap();
        }
        news.frame(ANSWER);
        let rate = (COUNT * PIECE) as f64 / started.elapsed().as_secs_f64() / 1e6;
        println!("{}: stream of blocks: {rate:.1} MB/s", side.kind);
        side.transport.shutdown();
    }

    pub fn far(side: &Side) {
        let news = side.record();
        for _ in 0..COUNT {
            assert_eq!(news.frame(BLOCK).len(), 8 + PIECE);
        }
        side.send(ANSWER, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}
