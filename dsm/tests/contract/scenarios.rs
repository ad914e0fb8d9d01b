//! The scenarios.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::{
    Config, HEARTBEAT, Handler, LostReason, MAX_PAYLOAD, PeerEvent, SendError, Transport, TransportError,
};

use super::blocks;
use super::nodes::{News, PATIENCE, Side};

/// Two programs.
pub struct Scenario {
    pub name: &'static str,
    pub config: Config,
    pub near: fn(&Side),
    pub far: fn(&Side),
}

const USUAL: Config = Config {
    heartbeat: Duration::from_millis(500),
    silence: Duration::from_millis(4200),
    queue_limit: 1 << 30,
};
const QUICK: Config = Config {
    heartbeat: Duration::from_millis(100),
    silence: Duration::from_millis(900),
    queue_limit: 1 << 30,
};

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "frames_arrive_whole_and_in_order",
        config: USUAL,
        near: order::near,
        far: order::far,
    },
    Scenario {
        name: "a_frame_may_have_many_parts",
        config: USUAL,
        near: parts::near,
        far: parts::far,
    },
    Scenario {
        name: "frames_sent_together_arrive_apart",
        config: USUAL,
        near: together::near,
        far: together::far,
    },
    Scenario {
        name: "frames_sent_from_where_they_are_keep_their_order",
        config: USUAL,
        near: blocks::order::near,
        far: blocks::order::far,
    },
    Scenario {
        name: "messages_do_not_wait_behind_blocks",
        config: USUAL,
        near: blocks::overtaken::near,
        far: blocks::overtaken::far,
    },
    Scenario {
        name: "a_peer_that_takes_no_blocks_is_lost_once",
        config: Config {
            queue_limit: 8 << 20,
            ..USUAL
        },
        near: blocks::untaken::near,
        far: deaf::far,
    },
    Scenario {
        name: "a_peer_that_ends_among_blocks_is_lost_once",
        config: USUAL,
        near: blocks::farewell::near,
        far: blocks::farewell::far,
    },
    Scenario {
        name: "floods_both_ways_do_not_deadlock",
        config: USUAL,
        near: flood::side,
        far: flood::side,
    },
    Scenario {
        name: "sending_to_a_peer_that_does_not_listen_returns",
        config: Config {
            queue_limit: 8 << 20,
            ..USUAL
        },
        near: deaf::near,
        far: deaf::far,
    },
    Scenario {
        name: "queued_frames_follow_when_the_peer_listens",
        config: USUAL,
        near: late::near,
        far: late::far,
    },
    Scenario {
        name: "a_peer_that_ends_is_lost_after_its_last_frame",
        config: USUAL,
        near: last::near,
        far: last::far,
    },
    Scenario {
        name: "a_silent_peer_is_lost",
        config: QUICK,
        near: silent::near,
        far: silent::far,
    },
    Scenario {
        name: "a_quiet_peer_is_not_lost",
        config: QUICK,
        near: quiet::side,
        far: quiet::side,
    },
    Scenario {
        name: "shutdown_sends_what_is_queued",
        config: USUAL,
        near: end::near,
        far: end::far,
    },
    Scenario {
        name: "the_handler_may_shut_down",
        config: USUAL,
        near: inside::near,
        far: inside::far,
    },
    Scenario {
        name: "wrong_uses_are_refused",
        config: USUAL,
        near: wrong::near,
        far: wrong::far,
    },
    Scenario {
        name: "round_trip_of_a_page",
        config: USUAL,
        near: page::near,
        far: page::far,
    },
    Scenario {
        name: "round_trip_of_a_page_beside_blocks",
        config: USUAL,
        near: blocks::beside::near,
        far: page::far,
    },
    Scenario {
        name: "stream_of_pages",
        config: USUAL,
        near: stream::near,
        far: stream::far,
    },
    Scenario {
        name: "stream_of_blocks",
        config: USUAL,
        near: blocks::stream::near,
        far: blocks::stream::far,
    },
];

pub const FAR_CLOSED: PeerEvent = PeerEvent::Lost {
    peer: 1,
    reason: LostReason::Closed,
};
pub const NEAR_CLOSED: PeerEvent = PeerEvent::Lost {
    peer: 0,
    reason: LostReason::Closed,
};

mod order {
    use super::*;

    const COUNT: usize = 500;

    fn body() -> Vec<u8> {
        (0..MAX_PAYLOAD).map(|at| (at * 7 % 251) as u8).collect()
    }

    fn len(number: usize) -> usize {
        match number % 250 {
            0 => MAX_PAYLOAD - 4,
            kind => kind * 37,
        }
    }

    pub fn near(side: &Side) {
        let news = side.record();
        let body = body();
        let mut bytes = 0;
        for number in 0..COUNT {
            let (head, rest) = body[..len(number)].split_at(len(number) / 3);
            let parts: [&[u8]; 3] = [&(number as u32).to_le_bytes(), head, rest];
            side.transport.send(1, (number % 5) as u8, &parts).unwrap();
            bytes += 5 + 4 + len(number) as u64;
        }
        news.frame(9);
        let out = side.transport.count(1);
        assert!((0..5).all(|class| out.class(class).frames_out == COUNT as u64 / 5));
        assert_eq!(
            ((0..5).map(|class| out.class(class).bytes_out).sum::<u64>(), out.queued),
            (bytes, 0)
        );
    }

    pub fn far(side: &Side) {
        let news = side.record();
        let body = body();
        for number in 0..COUNT {
            let payload = news.frame((number % 5) as u8);
            assert_eq!(payload[..4], (number as u32).to_le_bytes());
            assert!(payload[4..] == body[..len(number)], "frame {number}");
        }
        let into = side.transport.count(0);
        assert!((0..5).all(|class| into.class(class).frames_in == COUNT as u64 / 5));
        side.send(9, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}

mod parts {
    use super::*;

    const COUNTS: [usize; 6] = [0, 1, 7, 8, 9, 100];

    fn words() -> Vec<[u8; 8]> {
        (0..100u64).map(u64::to_le_bytes).collect()
    }

    pub fn near(side: &Side) {
        let words = words();
        let parts: Vec<&[u8]> = words.iter().map(|word| &word[..]).collect();
        let news = side.record();
        for count in COUNTS {
            side.transport.send(1, 1, &parts[..count]).unwrap();
        }
        news.frame(9);
    }

    pub fn far(side: &Side) {
        let news = side.record();
        for count in COUNTS {
            assert_eq!(news.frame(1), words()[..count].concat(), "{count} parts");
        }
        side.send(9, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}

mod together {
    use super::*;

    fn frames() -> Vec<Vec<u8>> {
        (0..50usize).map(|n| vec![n as u8; n * n]).collect()
    }

    pub fn near(side: &Side) {
        let news = side.record();
        for _ in 0..20 {
            side.transport.send_together(1, 3, &frames()).unwrap();
        }
        assert_eq!(side.transport.count(1).class(3).frames_out, 1000);
        // One that can't be sent keeps the others back, too.
        let broken = [vec![1], vec![0; MAX_PAYLOAD + 1]];
        let len = MAX_PAYLOAD + 1;
        assert_eq!(
            side.transport.send_together(1, 3, &broken),
            Err(SendError::TooLong { peer: 1, len })
        );
        side.send(4, b"next");
        news.frame(9);
    }

    pub fn far(side: &Side) {
        let news = side.record();
        for _ in 0..20 {
            for frame in frames() {
                assert_eq!(news.frame(3), frame);
            }
        }
        assert_eq!(news.frame(4), b"next");
        side.send(9, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}

mod flood {
    use super::*;

    const REQUESTS: u64 = 30;
    const REQUEST: u8 = 1;
    const ANSWER: u8 = 2;

    /// Answers every request with two frames from inside the handler, under a lock that the senders hold,
    /// too.
    struct Answering {
        transport: Arc<dyn Transport>,
        protocol: Mutex<()>,
        frames: AtomicU64,
        events: AtomicU64,
    }

    impl Handler for Answering {
        fn frame(&self, peer: usize, class: u8, payload: &[u8]) {
            let _protocol = self.protocol.lock().unwrap();
            self.frames.fetch_add(1, Ordering::Relaxed);
            if class == REQUEST {
                self.transport.send(peer, ANSWER, &[payload]).unwrap();
                self.transport.send(peer, ANSWER, &[payload, b"again"]).unwrap();
            }
        }

        fn event(&self, _: PeerEvent) {
            self.events.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn side(side: &Side) {
        let handler = Arc::new(Answering {
            transport: Arc::clone(&side.transport),
            protocol: Mutex::new(()),
            frames: AtomicU64::new(0),
            events: AtomicU64::new(0),
        });
        side.transport.start(Arc::clone(&handler) as Arc<dyn Handler>).unwrap();
        for _ in 0..REQUESTS {
            let _protocol = handler.protocol.lock().unwrap();
            side.transport.send(side.peer, REQUEST, &[&[7; 100_000]]).unwrap();
        }
        let started = Instant::now();
        while handler.frames.load(Ordering::Relaxed) < 3 * REQUESTS {
            assert!(started.elapsed() < PATIENCE, "deadlock");
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(side.transport.count(side.peer).class(ANSWER).frames_in, 2 * REQUESTS);
        assert_eq!(handler.events.load(Ordering::Relaxed), 0);
        side.tell();
        side.hear();
        side.transport.shutdown();
    }
}

/// Waits in its first frame until it is let go.
struct Stuck(Mutex<mpsc::Receiver<()>>, Mutex<mpsc::Sender<News>>);

impl Handler for Stuck {
    fn frame(&self, _: usize, class: u8, payload: &[u8]) {
        // Disconnected from the second frame on.
        let _ = self.0.lock().unwrap().recv();
        let _ = self.1.lock().unwrap().send(News::Frame(class, payload.to_vec()));
    }

    fn event(&self, event: PeerEvent) {
        let _ = self.1.lock().unwrap().send(News::Event(event));
    }
}

fn stuck(side: &Side) -> (mpsc::Sender<()>, mpsc::Receiver<News>) {
    let (let_go, wait) = mpsc::channel();
    let (sender, news) = mpsc::channel();
    side.transport
        .start(Arc::new(Stuck(Mutex::new(wait), Mutex::new(sender))))
        .unwrap();
    (let_go, news)
}

mod deaf {
    use super::*;

    pub fn near(side: &Side) {
        let news = side.record();
        let frame = vec![1; MAX_PAYLOAD];
        let (mut sent, started) = (0, Instant::now());
        let error = loop {
            match side.transport.send(1, 1, &[&frame]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 1000);
        };
        // What fits on the way depends on the transport; what fits into the queue does not.
        assert!(sent >= 7, "{sent}");
        assert!(started.elapsed() < Duration::from_secs(20));
        assert_eq!(error, SendError::Gone { peer: 1 });
        let event = news.event();
        let overrun =
            matches!(event, PeerEvent::Lost { peer: 1, reason: LostReason::Overrun { bytes } } if bytes > 8 << 20);
        assert!(overrun, "{event:?}");
        assert_eq!(side.transport.send(1, 1, &[b"x"]), Err(SendError::Gone { peer: 1 }));
        side.tell();
        side.transport.shutdown();
        assert_eq!(news.rest(), [], "reported twice");
    }

    pub fn far(side: &Side) {
        let (let_go, news) = stuck(side);
        side.hear();
        drop(let_go);
        let event = loop {
            if let News::Event(event) = news.recv_timeout(PATIENCE).unwrap() {
                break event;
            }
        };
        assert!(matches!(event, PeerEvent::Lost { peer: 0, .. }), "{event:?}");
        assert!(
            news.recv_timeout(Duration::from_millis(100)).is_err(),
            "something after the end"
        );
    }
}

mod late {
    use super::*;

    const COUNT: usize = 24;

    pub fn near(side: &Side) {
        let news = side.record();
        for number in 0..COUNT {
            side.send(number as u8, &[number as u8; MAX_PAYLOAD]);
        }
        assert!(side.transport.count(1).queued > 0);
        side.tell();
        news.frame(9);
        assert_eq!(side.transport.count(1).queued, 0);
    }

    pub fn far(side: &Side) {
        let (let_go, news) = stuck(side);
        side.hear();
        drop(let_go);
        for number in 0..COUNT {
            let News::Frame(class, payload) = news.recv_timeout(PATIENCE).unwrap() else {
                panic!("an event")
            };
            assert_eq!((usize::from(class), payload.len()), (number, MAX_PAYLOAD));
            assert!(payload.iter().all(|byte| *byte == class));
        }
        side.send(9, &[]);
        assert_eq!(news.recv_timeout(PATIENCE), Ok(News::Event(NEAR_CLOSED)));
    }
}

mod last {
    use super::*;

    pub fn near(side: &Side) {
        let news = side.record();
        assert_eq!(news.frame(7), b"abc");
        assert_eq!(news.next(), News::Event(FAR_CLOSED));
        assert_eq!(side.transport.send(1, 7, &[]), Err(SendError::Gone { peer: 1 }));
        side.transport.shutdown();
        assert_eq!(news.rest(), []);
    }

    pub fn far(side: &Side) {
        let news = side.record();
        side.send(7, b"abc");
        side.transport.shutdown();
        assert_eq!(news.rest(), []);
        assert_eq!(side.transport.send(0, 7, &[]), Err(SendError::Gone { peer: 0 }));
    }
}

mod silent {
    use super::*;

    pub fn near(side: &Side) {
        let started = Instant::now();
        let news = side.record();
        assert_eq!(
            news.event(),
            PeerEvent::Lost {
                peer: 1,
                reason: LostReason::Silent { millis: 900 }
            }
        );
        assert!(started.elapsed() >= Duration::from_millis(850));
        assert_eq!(side.transport.send(1, 0, &[]), Err(SendError::Gone { peer: 1 }));
        side.tell();
    }

    pub fn far(side: &Side) {
        // Not started: it sends no heartbeats.
        side.hear();
    }
}

mod quiet {
    use super::*;

    pub fn side(side: &Side) {
        let news = side.record();
        thread::sleep(Duration::from_millis(2000));
        assert_eq!(news.rest(), []);
        assert!(side.transport.count(side.peer).class(HEARTBEAT).frames_in >= 5);
        side.tell();
        side.hear();
        side.transport.shutdown();
    }
}

mod end {
    use super::*;

    const LEN: usize = 3000;

    pub fn near(side: &Side) {
        let news = side.record();
        side.hear();
        for number in 0..16u8 {
            side.send(number, &[number; LEN]);
        }
        let started = Instant::now();
        side.transport.shutdown();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(!news.rest().iter().any(|news| matches!(news, News::Event(_))));
        assert_eq!(side.transport.send(1, 0, &[]), Err(SendError::Gone { peer: 1 }));
        side.transport.shutdown();
    }

    pub fn far(side: &Side) {
        let news = side.record();
        side.send(3, &[0; 5000]);
        side.tell();
        for number in 0..16 {
            assert_eq!(news.frame(number).len(), LEN);
        }
        assert_eq!(news.next(), News::Event(NEAR_CLOSED));
    }
}

mod inside {
    use super::*;

    struct Stopping(OnceLock<Arc<dyn Transport>>, Mutex<mpsc::Sender<()>>);

    impl Handler for Stopping {
        fn frame(&self, _: usize, _: u8, _: &[u8]) {
            self.0.get().unwrap().shutdown();
            self.1.lock().unwrap().send(()).unwrap();
        }

        fn event(&self, event: PeerEvent) {
            panic!("{event}");
        }
    }

    pub fn near(side: &Side) {
        let (sender, done) = mpsc::channel();
        let handler = Arc::new(Stopping(OnceLock::new(), Mutex::new(sender)));
        assert!(handler.0.set(Arc::clone(&side.transport)).is_ok());
        side.transport.start(handler).unwrap();
        side.tell();
        done.recv_timeout(PATIENCE).unwrap();
    }

    pub fn far(side: &Side) {
        let news = side.record();
        side.hear();
        side.send(1, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}

mod wrong {
    use super::*;

    struct Deaf;

    impl Handler for Deaf {
        fn frame(&self, _: usize, _: u8, _: &[u8]) {}
        fn event(&self, _: PeerEvent) {}
    }

    pub fn near(side: &Side) {
        let transport = &side.transport;
        let _news = side.record();
        assert_eq!(transport.send(0, 1, &[]), Err(SendError::NoPeer { peer: 0 }));
        assert_eq!(transport.send(2, 1, &[]), Err(SendError::NoPeer { peer: 2 }));
        assert_eq!(transport.send(1, HEARTBEAT, &[]), Err(SendError::Reserved { peer: 1 }));
        let len = MAX_PAYLOAD + 1;
        assert_eq!(
            transport.send(1, 1, &[&vec![0; len]]),
            Err(SendError::TooLong { peer: 1, len })
        );
        assert_eq!(transport.start(Arc::new(Deaf)), Err(TransportError::Started));
        assert_eq!(transport.count(9).total().frames_out, 0);
        side.tell();
    }

    pub fn far(side: &Side) {
        side.hear();
    }
}

pub const REQUEST: u8 = 1;
pub const ANSWER: u8 = 2;

/// A request of 16 bytes answered by a page, the pattern of a read miss. The time is told, not judged: it
/// depends on the host.
pub mod page {
    use super::*;

    struct Echo(Arc<dyn Transport>, Mutex<mpsc::Sender<()>>);

    impl Handler for Echo {
        fn frame(&self, peer: usize, class: u8, _: &[u8]) {
            if class == REQUEST {
                // A peer that is done is gone.
                let _ = self.0.send(peer, ANSWER, &[&[0; 16], &[0; 4096]]);
            }
        }

        fn event(&self, _: PeerEvent) {
            let _ = self.1.lock().unwrap().send(());
        }
    }

    pub fn near(side: &Side) {
        measure(side, "round trip with a page", 500);
        side.transport.shutdown();
    }

    pub fn measure(side: &Side, what: &str, count: usize) {
        let news = side.record();
        let mut times: Vec<Duration> = (0..count)
            .map(|_| {
                let started = Instant::now();
                side.send(REQUEST, &[0; 16]);
                assert_eq!(news.frame(ANSWER).len(), 4112);
                started.elapsed()
            })
            .collect();
        let mean = times.iter().sum::<Duration>() / count as u32;
        times.sort_unstable();
        let (p50, p99) = (times[count / 2], times[count * 99 / 100]);
        println!(
            "{}: {what}: mean {mean:?}, p50 {p50:?}, p99 {p99:?}",
            side.kind
        );
    }

    pub fn far(side: &Side) {
        let (sender, ended) = mpsc::channel();
        side.transport
            .start(Arc::new(Echo(Arc::clone(&side.transport), Mutex::new(sender))))
            .unwrap();
        ended.recv_timeout(PATIENCE).unwrap();
        side.transport.shutdown();
    }
}

/// Pages one after the other, as fast as they go. The time is told, not judged.
mod stream {
    use super::*;

    const COUNT: usize = 2048;

    pub fn near(side: &Side) {
        let news = side.record();
        let started = Instant::now();
        for _ in 0..COUNT {
            side.transport.send(1, REQUEST, &[&[0; 16], &[1; 4096]]).unwrap();
        }
        news.frame(ANSWER);
        let rate = (COUNT * 4096) as f64 / started.elapsed().as_secs_f64() / 1e6;
        println!("{}: stream of pages: {rate:.1} MB/s", side.kind);
        side.transport.shutdown();
    }

    pub fn far(side: &Side) {
        let news = side.record();
        for _ in 0..COUNT {
            assert_eq!(news.frame(REQUEST).len(), 4112);
        }
        side.send(ANSWER, &[]);
        assert_eq!(news.event(), NEAR_CLOSED);
    }
}
