//! The TCP transport over loopback: peers that die, lie or fall silent. What every transport promises is
//! tried in `contract`.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::{
    Body, Config, HEARTBEAT, Handler, LostReason, MAX_PAYLOAD, Malformed, PeerEvent, SendError, Streams, TcpTransport, Transport,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn quick() -> Config {
    Config {
        heartbeat: Duration::from_millis(100),
        silence: Duration::from_millis(900),
        queue_limit: 1 << 30,
    }
}

#[derive(Debug, PartialEq)]
enum News {
    Frame(usize, u8, Vec<u8>),
    Event(PeerEvent),
}

struct Recorder(Mutex<mpsc::Sender<News>>);

impl Recorder {
    fn put(&self, news: News) {
        // The test may have seen enough.
        let _ = self.0.lock().unwrap().send(news);
    }
}

impl Handler for Recorder {
    fn frame(&self, peer: usize, class: u8, payload: &[u8]) {
        self.put(News::Frame(peer, class, payload.to_vec()));
    }

    fn event(&self, event: PeerEvent) {
        self.put(News::Event(event));
    }
}

fn record(transport: &TcpTransport) -> mpsc::Receiver<News> {
    let (sender, receiver) = mpsc::channel();
    transport.start(Arc::new(Recorder(Mutex::new(sender)))).unwrap();
    receiver
}

/// Node 0 with a recording handler; the test plays node 1 on a bare stream.
fn against_bare_peer(config: Config) -> (TcpTransport, mpsc::Receiver<News>, TcpStream) {
    let (near, far) = pair();
    let transport = TcpTransport::new(vec![None, Some(near)], config).unwrap();
    let news = record(&transport);
    (transport, news, far)
}

/// Two nodes with two streams between them.
fn two_nodes(config: Config) -> [TcpTransport; 2] {
    let ((near, far), (near_blocks, far_blocks)) = (pair(), pair());
    [
        TcpTransport::new(vec![None, Some(Streams { messages: near, blocks: Some(near_blocks) })], config).unwrap(),
        TcpTransport::new(vec![Some(Streams { messages: far, blocks: Some(far_blocks) }), None], config).unwrap(),
    ]
}

fn lost(reason: LostReason) -> News {
    News::Event(PeerEvent::Lost { peer: 1, reason })
}

/// Reads some of each long frame, wherever that is.
struct Choosy(Recorder);

impl Handler for Choosy {
    fn frame(&self, peer: usize, class: u8, payload: &[u8]) {
        self.0.frame(peer, class, payload);
    }

    fn long_frame(&self, peer: usize, class: u8, len: usize, payload: &mut dyn Read) -> std::io::Result<()> {
        let mut some = vec![0; usize::from(class).min(len)];
        payload.read_exact(&mut some)?;
        self.frame(peer, class, &some);
        // There is no more than the frame, whatever comes behind it.
        if class == 9 {
            assert_eq!(payload.read_to_end(&mut some)?, len - 9);
        }
        Ok(())
    }

    fn event(&self, event: PeerEvent) {
        self.0.event(event);
    }
}

#[test]
fn a_long_frame_is_read_as_far_as_it_is_wanted_and_the_next_is_whole() {
    let ((near, mut far), (near_blocks, mut far_blocks)) = (pair(), pair());
    let transport = TcpTransport::new(vec![None, Some(Streams { messages: near, blocks: Some(near_blocks) })], quick()).unwrap();
    let (sender, news) = mpsc::channel();
    transport.start(Arc::new(Choosy(Recorder(Mutex::new(sender))))).unwrap();
    let mut bytes = Vec::new();
    for (class, len) in [(0, 100_000), (9, 300_000), (5, 3000), (7, 0), (3, MAX_PAYLOAD), (9, 1 << 19)] {
        bytes.extend([&(len as u32).to_le_bytes()[..], &[class]].concat());
        bytes.extend((0..len).map(|at| at as u8));
    }
    // The last one is torn, and a hundred bytes at a time show frames in all their parts.
    let torn = bytes.len() - (1 << 18);
    let (slow, quick) = bytes[..torn].split_at(10_000);
    slow.chunks(100).for_each(|some| far_blocks.write_all(some).unwrap());
    far_blocks.write_all(quick).unwrap();
    let counting = |len: u8| (0..len).collect::<Vec<u8>>();
    let seen: Vec<News> = (0..6).map(|_| news.recv_timeout(PATIENCE).unwrap()).collect();
    let expected: Vec<News> = [0, 9, 5, 7, 3, 9].map(|class| News::Frame(1, class, counting(if class == 7 { 0 } else { class }))).into();
    assert_eq!(seen, expected);
    far.write_all(&[0, 0, 0, 0, 1]).unwrap();
    assert_eq!(news.recv_timeout(PATIENCE), Ok(News::Frame(1, 1, Vec::new())));
    drop((far, far_blocks));
    assert_eq!(news.recv_timeout(PATIENCE), Ok(lost(LostReason::Closed)));
    transport.shutdown();
}

/// However the end of a frame comes: nothing comes behind it that would wake who waits for more.
#[test]
fn the_end_of_a_long_frame_is_not_waited_for_once_it_is_there() {
    let ((near, far), (near_blocks, mut far_blocks)) = (pair(), pair());
    let patient = Config { silence: Duration::from_secs(36_000), ..Config::default() };
    let transport = TcpTransport::new(vec![None, Some(Streams { messages: near, blocks: Some(near_blocks) })], patient).unwrap();
    let news = record(&transport);
    for (len, cuts) in [(200_000, &[100_000][..]), (1 << 19, &[300_000, 500_000]), (1 << 19, &[1100, 263_000]), (9000, &[8999]), (1 << 19, &[])] {
        let payload: Vec<u8> = (0..len).map(|at: u32| (at >> 8) as u8).collect();
        far_blocks.write_all(&[&len.to_le_bytes()[..], &[1]].concat()).unwrap();
        let mut sent = 0;
        for cut in cuts.iter().copied().chain([payload.len()]) {
            far_blocks.write_all(&payload[sent..cut]).unwrap();
            sent = cut;
            // It may have been taken in, and what is left be waited for, before more comes.
            thread::sleep(Duration::from_millis(30));
        }
        assert_eq!(news.recv_timeout(PATIENCE), Ok(News::Frame(1, 1, payload)), "{len} bytes, cut at {cuts:?}");
    }
    transport.shutdown();
    drop(far);
}

#[test]
fn a_long_frame_that_stops_coming_is_silence() {
    let ((near, mut far), (near_blocks, mut far_blocks)) = (pair(), pair());
    let transport = TcpTransport::new(vec![None, Some(Streams { messages: near, blocks: Some(near_blocks) })], quick()).unwrap();
    let news = record(&transport);
    far_blocks.write_all(&[0, 0, 8, 0, 1]).unwrap();
    far_blocks.write_all(&[7; 5000]).unwrap();
    // The other stream goes on until it is ended.
    let beats = thread::spawn(move || while far.write_all(&[0, 0, 0, 0, HEARTBEAT]).is_ok() {
        thread::sleep(Duration::from_millis(50));
    });
    assert_eq!(news.recv_timeout(PATIENCE), Ok(lost(LostReason::Silent { millis: 900 })));
    transport.shutdown();
    beats.join().unwrap();
}

#[test]
fn sending_to_a_peer_that_does_not_read_returns() {
    let config = Config {
        queue_limit: 64 << 20,
        ..Config::default()
    };
    let (transport, news, far) = against_bare_peer(config);
    let frame = vec![1; MAX_PAYLOAD];
    let started = Instant::now();
    let mut sent = 0;
    let error = loop {
        match transport.send(1, 1, &[&frame]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1000);
    };
    // The frames that fit into the sockets depend on the host; those in the queue do not.
    assert!(sent >= 63, "{sent}");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(error, SendError::Gone { peer: 1 });
    let event = news.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(&event, News::Event(PeerEvent::Lost { peer: 1, reason: LostReason::Overrun { bytes } }) if *bytes > 64 << 20),
        "{event:?}"
    );
    assert_eq!(transport.send(1, 1, &[b"x"]), Err(SendError::Gone { peer: 1 }));
    drop(far);
    transport.shutdown();
    assert_eq!(news.try_iter().count(), 0, "reported twice");
}

#[test]
fn queued_frames_follow_when_the_peer_reads_again() {
    let (transport, _news, mut far) = against_bare_peer(Config::default());
    const COUNT: usize = 64;
    for number in 0..COUNT {
        transport
            .send(1, number as u8, &[&[number as u8; MAX_PAYLOAD]])
            .unwrap();
    }
    assert!(transport.count(1).queued > 0);
    let mut frame = vec![0; 5 + MAX_PAYLOAD];
    for number in 0..COUNT {
        far.read_exact(&mut frame[..5]).unwrap();
        if frame[4] == HEARTBEAT {
            far.read_exact(&mut frame[..5]).unwrap();
        }
        assert_eq!(frame[..5], [0, 0, 16, 0, number as u8]);
        far.read_exact(&mut frame[5..]).unwrap();
        assert!(frame[5..].iter().all(|byte| *byte == number as u8));
    }
    assert_eq!(transport.count(1).queued, 0);
}

#[test]
fn a_peer_that_ends_is_lost_after_its_last_frame() {
    let (transport, news, mut far) = against_bare_peer(Config::default());
    far.write_all(&[3, 0, 0, 0, 7, b'a', b'b', b'c', 9, 0]).unwrap();
    drop(far);
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), News::Frame(1, 7, b"abc".to_vec()));
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), lost(LostReason::Closed));
    assert_eq!(transport.send(1, 7, &[]), Err(SendError::Gone { peer: 1 }));
    transport.shutdown();
    assert_eq!(news.try_iter().count(), 0);
}

#[test]
fn a_reset_connection_is_lost() {
    let (_transport, news, far) = against_bare_peer(Config::default());
    socket2::SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
    drop(far);
    let event = news.recv_timeout(PATIENCE).unwrap();
    let News::Event(PeerEvent::Lost { peer: 1, reason }) = &event else {
        panic!("{event:?}")
    };
    assert!(reason.to_string().contains("ECONNRESET"), "{reason}");
}

#[test]
fn what_is_no_frame_breaks_the_peer() {
    let (transport, news, mut far) = against_bare_peer(Config::default());
    far.write_all(b"\x01\0\0\0\x05xGET / HTTP/1.1\r\n").unwrap();
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), News::Frame(1, 5, b"x".to_vec()));
    let len = u32::from_le_bytes(*b"GET ");
    let malformed = PeerEvent::Malformed {
        peer: 1,
        reason: Malformed::Length { class: b'/', len },
    };
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), News::Event(malformed));
    // Our end is closed: the peer sees it.
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    let _ = far.read_to_end(&mut rest);
    assert_eq!(transport.send(1, 7, &[]), Err(SendError::Gone { peer: 1 }));
    transport.shutdown();
    assert_eq!(news.try_iter().count(), 0);
}

#[test]
fn a_silent_peer_is_lost_and_a_quiet_one_is_not() {
    let started = Instant::now();
    let (silent, silent_news, _far) = against_bare_peer(quick());
    let (_dribbling, dribbling_news, mut drops) = against_bare_peer(quick());
    drops.write_all(&[100, 0, 0, 0, 1]).unwrap();
    let quiet = two_nodes(quick());
    let quiet_news = [record(&quiet[0]), record(&quiet[1])];
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(200));
        // Not even a whole heartbeat, but the peer is there.
        drops.write_all(&[0]).unwrap();
        if started.elapsed() > Duration::from_millis(700) {
            break;
        }
    }
    assert_eq!(silent_news.try_iter().count(), 0);
    assert_eq!(
        silent_news.recv_timeout(PATIENCE).unwrap(),
        lost(LostReason::Silent { millis: 900 })
    );
    assert!(started.elapsed() >= Duration::from_millis(850));
    drops.write_all(&[0]).unwrap();
    thread::sleep(Duration::from_millis(700));
    assert_eq!(dribbling_news.try_iter().count(), 0);
    for node in 0..2 {
        assert_eq!(quiet_news[node].try_iter().count(), 0);
        assert!(quiet[node].count(1 - node).class(HEARTBEAT).frames_in >= 5);
    }
    assert_eq!(silent.send(1, 0, &[]), Err(SendError::Gone { peer: 1 }));
}

/// Passes bytes on, except while `stalled`.
fn relay(mut from: TcpStream, mut to: TcpStream, stalled: Arc<Mutex<()>>) {
    thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            drop(stalled.lock().unwrap());
            if to.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
}

#[test]
fn a_network_that_fails_for_a_while_only_stalls() {
    let ((near, middle), (far, other_middle)) = (pair(), pair());
    let network = Arc::new(Mutex::new(()));
    relay(
        middle.try_clone().unwrap(),
        other_middle.try_clone().unwrap(),
        Arc::clone(&network),
    );
    relay(other_middle, middle, Arc::clone(&network));
    let one = TcpTransport::new(vec![None, Some(near)], quick()).unwrap();
    let two = TcpTransport::new(vec![Some(far), None], quick()).unwrap();
    let (ours, theirs) = (record(&one), record(&two));
    let down = network.lock().unwrap();
    one.send(1, 1, &[b"late"]).unwrap();
    thread::sleep(Duration::from_millis(450));
    assert_eq!(theirs.try_iter().count(), 0);
    drop(down);
    assert_eq!(
        theirs.recv_timeout(PATIENCE).unwrap(),
        News::Frame(0, 1, b"late".to_vec())
    );
    thread::sleep(Duration::from_millis(1200));
    assert_eq!((ours.try_iter().count(), theirs.try_iter().count()), (0, 0));
}

#[test]
fn shutdown_sends_what_is_queued_and_is_prompt() {
    let [one, two] = two_nodes(Config::default());
    let (ours, theirs) = (record(&one), record(&two));
    two.send(0, 3, &[&[0; 5000]]).unwrap();
    for number in 0..16u8 {
        one.send(1, number, &[&[number; MAX_PAYLOAD]]).unwrap();
    }
    let started = Instant::now();
    one.shutdown();
    assert!(started.elapsed() < Duration::from_secs(5));
    for number in 0..16 {
        let News::Frame(0, class, payload) = theirs.recv_timeout(PATIENCE).unwrap() else {
            panic!("an event")
        };
        assert_eq!((class, payload.len()), (number, MAX_PAYLOAD));
    }
    let closed = PeerEvent::Lost {
        peer: 0,
        reason: LostReason::Closed,
    };
    assert_eq!(theirs.recv_timeout(PATIENCE).unwrap(), News::Event(closed));
    assert!(!ours.try_iter().any(|news| matches!(news, News::Event(_))));
    assert_eq!(one.send(1, 0, &[]), Err(SendError::Gone { peer: 1 }));
    one.shutdown();
}

#[test]
fn every_peer_has_its_own_stream() {
    let mut streams: HashMap<(usize, usize), TcpStream> = HashMap::new();
    for (low, high) in [(0, 1), (0, 2), (1, 2)] {
        let (near, far) = pair();
        streams.insert((low, high), near);
        streams.insert((high, low), far);
    }
    let nodes: Vec<_> = (0..3)
        .map(|node| {
            let peers = (0..3).map(|peer| streams.remove(&(node, peer))).collect();
            let transport = TcpTransport::new(peers, Config::default()).unwrap();
            let news = record(&transport);
            (transport, news)
        })
        .collect();
    for (node, (transport, _)) in nodes.iter().enumerate() {
        for peer in (0..3).filter(|peer| *peer != node) {
            transport.send(peer, 1, &[&[node as u8, peer as u8]]).unwrap();
        }
    }
    for (node, (_, news)) in nodes.iter().enumerate() {
        let mut senders: Vec<usize> = (0..2)
            .map(|_| match news.recv_timeout(PATIENCE).unwrap() {
                News::Frame(peer, 1, payload) if payload == [peer as u8, node as u8] => peer,
                other => panic!("{other:?}"),
            })
            .collect();
        senders.sort_unstable();
        assert_eq!(senders, (0..3).filter(|peer| *peer != node).collect::<Vec<_>>());
    }
}

/// A handler that takes no frame of class 2 until it is told to.
struct Slow(Recorder, Mutex<mpsc::Receiver<()>>);

impl Handler for Slow {
    fn frame(&self, peer: usize, class: u8, payload: &[u8]) {
        if class == 2 {
            let _ = self.1.lock().unwrap().recv_timeout(PATIENCE);
        }
        self.0.frame(peer, class, payload);
    }

    fn event(&self, event: PeerEvent) {
        self.0.event(event);
    }
}

#[test]
fn nothing_waits_behind_blocks() {
    let [one, two] = two_nodes(Config::default());
    let _ours = record(&one);
    let ((sender, news), (go, told)) = (mpsc::channel(), mpsc::channel());
    two.start(Arc::new(Slow(Recorder(Mutex::new(sender)), Mutex::new(told)))).unwrap();
    // More than sockets hold, and the other node takes in none of it.
    let body: Body = Arc::new(vec![7u8; MAX_PAYLOAD - 1]);
    const BLOCKS: u8 = 48;
    for number in 0..BLOCKS {
        one.send_from(1, 2, &[number], &body, 0..MAX_PAYLOAD).unwrap();
    }
    assert!(one.count(1).queued > 0);
    for number in 0..10 {
        one.send(1, 1, &[&[number]]).unwrap();
        assert_eq!(news.recv_timeout(PATIENCE).unwrap(), News::Frame(0, 1, vec![number]));
    }
    // Then they come, in their order, and are counted with the others.
    for number in 0..BLOCKS {
        go.send(()).unwrap();
        let News::Frame(0, 2, payload) = news.recv_timeout(PATIENCE).unwrap() else { panic!("something else") };
        assert_eq!((payload[0], payload.len()), (number, MAX_PAYLOAD));
    }
    let (out, into) = (one.count(1), two.count(0));
    assert_eq!((out.class(1).frames_out, out.class(2).frames_out), (10, u64::from(BLOCKS)));
    assert_eq!((into.class(1).frames_in, into.class(2).frames_in), (10, u64::from(BLOCKS)));
}

#[test]
fn blocks_without_a_stream_of_their_own_keep_their_place() {
    let (near, far) = pair();
    let one = TcpTransport::new(vec![None, Some(near)], Config::default()).unwrap();
    let two = TcpTransport::new(vec![Some(far), None], Config::default()).unwrap();
    let (_ours, theirs) = (record(&one), record(&two));
    let body: Body = Arc::new(vec![7u8; MAX_PAYLOAD - 1]);
    for number in 0..24 {
        one.send_from(1, 2, &[number], &body, 0..MAX_PAYLOAD).unwrap();
        one.send(1, 1, &[&[number]]).unwrap();
    }
    for number in 0..24 {
        let News::Frame(0, 2, payload) = theirs.recv_timeout(PATIENCE).unwrap() else { panic!("something else") };
        assert_eq!((payload[0], payload.len()), (number, MAX_PAYLOAD));
        assert_eq!(theirs.recv_timeout(PATIENCE).unwrap(), News::Frame(0, 1, vec![number]));
    }
}

#[test]
fn last_words_come_although_the_other_stream_has_ended() {
    let ((near, far), (near_blocks, far_blocks)) = (pair(), pair());
    let streams = Streams { messages: near, blocks: Some(near_blocks) };
    let transport = TcpTransport::new(vec![None, Some(streams)], Config::default()).unwrap();
    let news = record(&transport);
    drop(far_blocks);
    thread::sleep(Duration::from_millis(50));
    (&far).write_all(&[1, 0, 0, 0, 9, 42]).unwrap();
    drop(far);
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), News::Frame(1, 9, vec![42]));
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), lost(LostReason::Closed));
    transport.shutdown();
    assert_eq!(news.try_iter().count(), 0, "reported twice");
}

#[test]
fn a_peer_whose_blocks_can_not_come_any_more_is_lost() {
    let ((near, mut far), (near_blocks, far_blocks)) = (pair(), pair());
    let streams = Streams { messages: near, blocks: Some(near_blocks) };
    let transport = TcpTransport::new(vec![None, Some(streams)], quick()).unwrap();
    let news = record(&transport);
    drop(far_blocks);
    let beats = thread::spawn(move || while far.write_all(&[0, 0, 0, 0, HEARTBEAT]).is_ok() {
        thread::sleep(Duration::from_millis(100));
    });
    assert_eq!(news.recv_timeout(PATIENCE).unwrap(), lost(LostReason::Closed));
    assert!(matches!(transport.send(1, 1, &[b"x"]), Err(SendError::Gone { peer: 1 })));
    transport.shutdown();
    beats.join().unwrap();
    assert_eq!(news.try_iter().count(), 0, "reported twice");
}
