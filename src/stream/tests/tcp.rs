//! Echo over TCP, with faulty responders.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::SystemTime;

use super::*;
use pathmeter_proto::wire::NtpTime;

/// A dial with a key.
fn keyed(to: SocketAddr, bytes: u32, secret: &str) -> Dial {
    dial(to, StreamProtocol::Tcp { bytes, keys: Some(Arc::new(keys(secret))) })
}

/// The first error of a path whose server answers the greeting with these bytes, and the reason that is
/// counted.
fn connect_error_for_welcome(
    secret: Option<&str>,
    bytes: impl Fn(Hello) -> Vec<u8> + Send + Sync + 'static,
) -> (String, &'static str) {
    let server = Server::start(move |_, mut stream| {
        let mut greeting = [0; GREETING_BYTES];
        if stream.read_exact(&mut greeting).is_ok() {
            let (hello, _) = Hello::decode(&greeting, None).unwrap();
            stream.write_all(&bytes(hello)).unwrap();
            hold(stream);
        }
    });
    let dial = match secret {
        Some(secret) => keyed(server.address, BYTES, secret),
        None => TestProtocol::Tcp.dial(server.address),
    };
    let mut path = RunningPath::start(dial);
    let observed = path.until("an error", |observed| !observed.errors.is_empty());
    let error = observed.errors[0].replace(&server.address.to_string(), "b");
    path.handle.remove(ID);
    let observed = path.stop();
    assert_eq!((observed.connections, observed.lost()), (0, 0), "{observed:?}");
    let reason = ["denied", "protocol", "closed", "reset"].into_iter().find(|reason| path.ended(reason) > 0);
    (error, reason.unwrap())
}

#[test]
fn each_refused_welcome_has_its_error_text() {
    let welcome =
        |status| move |hello: Hello| Welcome { status, nonce: [5; 16] }.encode(&hello, None).to_vec();
    let key = "unknown key: configure the same key file on both hosts";
    let others = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(
        connect_error_for_welcome(None, |_| others.to_vec()),
        ("greeting b: is not a welcome".to_owned(), "protocol")
    );
    let newer = move |hello| {
        let mut bytes = welcome(WelcomeStatus::Granted)(hello);
        bytes[4] = 2;
        bytes
    };
    assert_eq!(
        connect_error_for_welcome(None, newer),
        ("greeting b: version 2 (this build supports 1)".to_owned(), "protocol")
    );
    for (status, text) in [
        (
            WelcomeStatus::Unlisted,
            "add this host's address to responder.allow there, or configure the same key file on both hosts",
        ),
        (WelcomeStatus::Unauthentic, key),
        (WelcomeStatus::Full, "its connection limit is reached"),
        (WelcomeStatus::Length, "it does not accept messages of this size"),
    ] {
        let expected = (format!("b rejects this host: {text}"), "denied");
        assert_eq!(connect_error_for_welcome(None, welcome(status)), expected);
        assert_eq!(connect_error_for_welcome(Some(SECRET), welcome(status)), expected);
    }
    let unproven = (format!("greeting b: {key}"), "denied");
    assert_eq!(connect_error_for_welcome(Some(SECRET), welcome(WelcomeStatus::Granted)), unproven);
    let other = |hello: Hello| {
        let welcome = Welcome { status: WelcomeStatus::Granted, nonce: [5; 16] };
        welcome.encode(&hello, Some(keys("another secret key").current())).to_vec()
    };
    assert_eq!(connect_error_for_welcome(Some(SECRET), other), unproven);
}

/// Measures a server that changes its fourth reply and answers correctly over later connections.
fn changed(secret: Option<&'static str>, change: fn(&mut Vec<u8>)) -> (RunningPath, Server) {
    let server = Server::start(move |number, stream| {
        let keys = secret.map(keys);
        let Some(mut host) = TcpHost::begin(stream, keys.as_ref()) else { return };
        let mut answered = 0;
        while let Some(frame) = host.read() {
            if number == 0 && answered == 3 {
                change(frame);
            }
            answered += 1;
            if host.write().is_none() {
                break;
            }
        }
    });
    let dial = match secret {
        Some(secret) => keyed(server.address, BYTES, secret),
        None => TestProtocol::Tcp.dial(server.address),
    };
    let mut path = RunningPath::start(dial);
    path.until("answers before and after", |observed| observed.answered() >= 20);
    (path, server)
}

#[test]
fn unreadable_reply_ends_the_connection() {
    for (change, text) in [
        ((|frame| frame.fill(b'x')) as fn(&mut Vec<u8>), "is not a reply"),
        (|frame| frame[4] = 9, "version 9 (this build supports 1)"),
        (|frame| frame[5] = 3, "is not a reply"),
        (|frame| frame.rotate_left(1), "is not a reply"),
    ] {
        let (mut path, server) = changed(None, change);
        let observed = path.stop();
        let error = format!("reading from {}: {text}", server.address);
        assert_eq!((observed.connections, &observed.errors), (2, &vec![error]));
        assert!(observed.lost() >= 1, "{observed:?}");
        assert_eq!((path.ended("protocol"), path.ended_otherwise(&["protocol"])), (1, 0));
    }
}

#[test]
fn mismatched_reply_is_counted_and_its_message_stays_unanswered() {
    let sequence: fn(&mut Vec<u8>) = |frame| frame[12] ^= 1;
    let timestamp: fn(&mut Vec<u8>) = |frame| frame[20] ^= 1;
    let padding: fn(&mut Vec<u8>) = |frame| frame[90] ^= 1;
    for (secret, change, why) in [
        (None, sequence, Mismatch::Unsolicited),
        (None, timestamp, Mismatch::Unsolicited),
        (Some(SECRET), sequence, Mismatch::Unauthentic),
        (Some(SECRET), timestamp, Mismatch::Unauthentic),
        (Some(SECRET), padding, Mismatch::Unauthentic),
    ] {
        let (mut path, _server) = changed(secret, change);
        path.handle.remove(ID);
        let observed = path.stop();
        assert_eq!((observed.unanswered(), observed.mismatched(why)), (vec![3], 1), "{why:?}: {observed:?}");
        assert_eq!((observed.connections, observed.errors.len()), (1, 0), "{observed:?}");
    }
}

#[test]
fn duplicate_reply_is_not_a_second_answer() {
    let (mut path, _server) = changed(Some(SECRET), |frame| frame.extend_from_within(..));
    let observed = path.stop();
    assert_eq!(
        (observed.answered(), observed.count(|report| *report == EchoReport::Duplicate)),
        (observed.sent(), 1)
    );
    assert_eq!((observed.connections, observed.errors.len()), (1, 0), "{observed:?}");
}

#[test]
fn end_within_a_reply_is_a_closed_connection() {
    let server = Server::start(|number, stream| {
        let Some(mut host) = TcpHost::begin(stream, None) else { return };
        if number == 0 {
            let Some(frame) = host.read() else { return };
            let half = frame[..40].to_vec();
            host.stream.write_all(&half).unwrap();
            drop(close(host.stream));
        } else {
            Host::Tcp(host).answer_all();
        }
    });
    let mut path = RunningPath::start(TestProtocol::Tcp.dial(server.address));
    path.until("answers", |observed| observed.answered() >= 5);
    let observed = path.stop();
    assert_eq!(observed.errors, [format!("{} closed the connection", server.address)]);
    assert!(observed.lost() >= 1, "{observed:?}");
    assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (1, 0));
}

#[test]
fn replies_are_reassembled_and_split() {
    let server = Server::start(|_, stream| {
        let Some(mut host) = TcpHost::begin(stream, None) else { return };
        for _ in 0..2 {
            let Some(frame) = host.read().cloned() else { return };
            for byte in frame {
                host.stream.write_all(&[byte]).unwrap();
            }
        }
        let mut all = Vec::new();
        for _ in 0..5 {
            let Some(frame) = host.read() else { return };
            all.extend_from_slice(frame);
        }
        host.stream.write_all(&all).unwrap();
        Host::Tcp(host).answer_all();
    });
    let mut path = RunningPath::start(TestProtocol::Tcp.dial(server.address));
    path.until("answers", |observed| observed.answered() >= 10);
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
    assert!(observed.errors.is_empty());
}

/// The wall clock in the format of messages.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    NtpTime::from(WallTime::from_nanos(u64::try_from(since.as_nanos()).unwrap())).0
}

/// The difference of two NTP timestamps, in nanoseconds.
fn nanos(from: u64, to: u64) -> u64 {
    u64::try_from((u128::from(to.saturating_sub(from)) * 1_000_000_000) >> 32).unwrap()
}

#[test]
fn messages_delayed_by_a_full_stream_count_from_their_due_time() {
    const BIG: u32 = 65_536;
    let release = Arc::new(AtomicBool::new(false));
    let timestamps = Arc::new(Mutex::new(BTreeMap::new()));
    let (released, written) = (Arc::clone(&release), Arc::clone(&timestamps));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    SockRef::from(&listener).set_recv_buffer_size(BIG as usize).unwrap();
    let server = Server::on(listener, move |_, stream| {
        let Some(mut host) = TcpHost::begin(stream, None) else { return };
        while !released.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        while let Some(frame) = host.read() {
            let [sequence, timestamp] =
                [8, 16].map(|at| u64::from_be_bytes(frame[at..at + 8].try_into().unwrap()));
            written.lock().unwrap().insert(sequence, timestamp);
            if host.write().is_none() {
                break;
            }
        }
    });
    let mut path = RunningPath::start(dial(server.address, StreamProtocol::Tcp { bytes: BIG, keys: None }));
    path.until("a message is sent", |observed| observed.sent() >= 1);
    // No further message is sent while the thread runs: due messages wait for the buffer.
    let (mut sent, mut heartbeats) = (0, 0);
    let progress = |path: &RunningPath| path.handle.series().progress.get();
    eventually("the stream is full", || {
        if path.collect().sent() > sent {
            (sent, heartbeats) = (path.observed.sent(), progress(&path));
        }
        (progress(&path) >= heartbeats + 4).then_some(())
    });
    assert_eq!((path.observed.answered(), path.observed.lost()), (0, 0), "{:?}", path.observed);
    let released_at = now();
    release.store(true, Ordering::SeqCst);
    let first = sent as u64;
    path.until("replies to delayed messages", |observed| observed.answered() as u64 > first + 30);
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
    assert!(observed.errors.is_empty(), "{observed:?}");
    let timestamps = timestamps.lock().unwrap();
    let mut waited = 0;
    for (sequence, _, rtt) in observed.decisions() {
        let at_least = nanos(timestamps[&sequence], released_at);
        // The timestamps are of the wall clock, which may be slewed.
        let rtt = u64::try_from(rtt.unwrap().as_nanos()).unwrap() + 1_000_000;
        assert!(rtt >= at_least, "{sequence}: an RTT of {rtt} ns, less than the delay of {at_least} ns");
        waited += u64::from(sequence >= first && at_least > 0);
    }
    assert!(waited >= 10, "{waited} waited for room");
}
