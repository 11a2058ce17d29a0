//! The responder, with correct and faulty clients.

use std::net::{IpAddr, Ipv4Addr};

use pathmeter_proto::admission::Policy;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::NtpTime;
use pathmeter_proto::wire::stream::{GreetingProof, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN};
use tokio::sync::watch;

use super::*;
use crate::metrics::Responders;
use crate::stream::responder::{ResponderLimits, StreamAccess, StreamResponder};

const REFUSED: &str = "pathmeter_responder_connections_refused_total";
const OPEN: &str = "pathmeter_responder_connections";
const MESSAGES: &str = "pathmeter_responder_messages_total";

fn policy(rate: u64) -> Policy {
    Policy {
        prefixes: vec!["127.0.0.0/16".parse().unwrap()],
        rate,
        rate_per_source: rate,
        ..Policy::default()
    }
}

fn access(secret: Option<&str>) -> StreamAccess {
    StreamAccess::new(policy(1_000_000), secret.map(|secret| Keys::parse(secret).unwrap()).as_ref())
}

/// A responder in its own thread.
struct TestResponder {
    responder: Arc<StreamResponder>,
    address: SocketAddr,
    exporter: Arc<Exporter>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl TestResponder {
    fn on(access: StreamAccess, limits: ResponderLimits) -> Self {
        let responders = Responders::default();
        let responder = Arc::new(StreamResponder::new(access, limits, Arc::clone(&responders.stream)));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, is_stopped) = watch::channel(false);
        let serving = Arc::clone(&responder);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                serving.serve(vec![listener], is_stopped).await;
            });
        });
        let exporter = Arc::new(Exporter::new(Vec::new(), responders));
        Self { responder, address, exporter, stop, thread: Some(thread) }
    }

    fn start(secret: Option<&str>) -> Self {
        Self::on(access(secret), ResponderLimits::default())
    }

    fn scrape(&self) -> MetricsPage {
        scrape(&self.exporter)
    }

    /// Waits until `count` connections were refused for this reason and none is open.
    fn refused(&self, reason: &str, count: u64) {
        let label = format!("reason=\"{reason}\"");
        eventually(&format!("{count} refused as {reason}"), || {
            let page = self.scrape();
            (page.count(REFUSED, &[&label]) == count && page.count(OPEN, &[]) == 0).then_some(())
        });
        assert_eq!(self.scrape().count(REFUSED, &[]), count, "{}", self.scrape());
    }

    fn stop(&mut self) {
        // The receiver may be gone.
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for TestResponder {
    fn drop(&mut self) {
        self.stop();
    }
}

const HELLO: Hello = Hello { message_bytes: BYTES, nonce: [3; 16] };

/// The client side of a connection.
struct Client {
    stream: TcpStream,
    seal: Seal,
    welcome: Option<Welcome>,
}

impl Client {
    fn connect(to: SocketAddr, from: IpAddr) -> TcpStream {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
        socket.connect(&to.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// Sends a greeting and reads the answer; `welcome` is `None` if the connection ended.
    fn greet(to: SocketAddr, from: IpAddr, hello: Hello, keys: Option<&Keys>) -> Self {
        let mut stream = Self::connect(to, from);
        stream.write_all(&hello.encode(keys)).unwrap();
        let mut bytes = [0; GREETING_BYTES];
        let key = keys.map(Keys::current);
        let read = stream.read_exact(&mut bytes).ok();
        let welcome = read.map(|()| Welcome::decode(&bytes, &hello, key).unwrap());
        let none = Welcome { status: WelcomeStatus::Full, nonce: [0; 16] };
        Self { stream, seal: Seal::of(key, &hello, &welcome.unwrap_or(none)), welcome }
    }

    fn listed(to: SocketAddr, keys: Option<&Keys>) -> Self {
        Self::greet(to, LISTED, HELLO, keys)
    }

    fn status(&self) -> Option<WelcomeStatus> {
        self.welcome.map(|welcome| welcome.status)
    }

    fn request(&self, sequence: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        self.seal.request(Message { sequence, timestamp: NtpTime(sequence) }, BYTES, &mut frame);
        frame
    }

    /// Reads a reply; `None` at the end of the stream.
    fn reply(&mut self) -> Option<u64> {
        let mut frame = vec![0; BYTES as usize];
        self.stream.read_exact(&mut frame).ok()?;
        let echoed = self.seal.read_reply(&frame).unwrap();
        assert!(echoed.turnaround >= 0, "{echoed:?}");
        Some(echoed.message.sequence)
    }

    fn echo(&mut self, sequence: u64) {
        self.stream.write_all(&self.request(sequence)).unwrap();
        assert_eq!(self.reply(), Some(sequence));
    }
}

const LISTED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1));
const UNLISTED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 7, 0, 1));

#[test]
fn only_listed_or_authenticated_clients_are_answered() {
    let other = "the key of last year";
    let rotating = format!("{SECRET}\n{other}");
    let (current, old, wrong) = (keys(SECRET), keys(other), keys("an unknown secret key"));
    for (secret, from, signer, expected, reason) in [
        (None, LISTED, None, WelcomeStatus::Granted, None),
        (None, UNLISTED, None, WelcomeStatus::Unlisted, Some("unlisted")),
        (None, LISTED, Some(&current), WelcomeStatus::Unauthentic, Some("auth")),
        (Some(SECRET), LISTED, None, WelcomeStatus::Granted, None),
        (Some(SECRET), UNLISTED, None, WelcomeStatus::Unlisted, Some("unlisted")),
        (Some(SECRET), UNLISTED, Some(&current), WelcomeStatus::Granted, None),
        (Some(SECRET), LISTED, Some(&wrong), WelcomeStatus::Unauthentic, Some("auth")),
        (Some(&rotating), UNLISTED, Some(&current), WelcomeStatus::Granted, None),
        (Some(&rotating), UNLISTED, Some(&old), WelcomeStatus::Granted, None),
        (Some(&rotating), UNLISTED, Some(&wrong), WelcomeStatus::Unauthentic, Some("auth")),
    ] {
        let responder = TestResponder::start(secret);
        let mut client = Client::greet(responder.address, from, HELLO, signer);
        let proof = Hello::decode(&HELLO.encode(signer), signer).unwrap().1;
        assert_eq!(client.status(), Some(expected), "{secret:?} {from} {proof:?}");
        match reason {
            None => {
                assert!(proof == GreetingProof::None || signer.is_some());
                (0..3).for_each(|sequence| client.echo(sequence));
                drop(client);
                responder.refused("unlisted", 0);
                assert_eq!(responder.scrape().count(MESSAGES, &[]), 3);
            }
            Some(reason) => {
                assert_eq!(client.reply(), None, "the connection ends after the refusal");
                responder.refused(reason, 1);
                assert_eq!(responder.scrape().count(MESSAGES, &[]), 0);
            }
        }
    }
}

#[test]
fn only_valid_message_lengths_are_accepted() {
    let responder = TestResponder::start(None);
    for (message_bytes, expected) in [
        (MESSAGE_BYTES_MIN, WelcomeStatus::Granted),
        (MESSAGE_BYTES_MAX, WelcomeStatus::Granted),
        (0, WelcomeStatus::Length),
        (MESSAGE_BYTES_MIN - 1, WelcomeStatus::Length),
        (MESSAGE_BYTES_MAX + 1, WelcomeStatus::Length),
        (u32::MAX, WelcomeStatus::Length),
    ] {
        let hello = Hello { message_bytes, ..HELLO };
        let mut client = Client::greet(responder.address, LISTED, hello, None);
        assert_eq!(client.status(), Some(expected), "{message_bytes}");
        if expected == WelcomeStatus::Granted {
            let mut frame = Vec::new();
            client.seal.request(Message { sequence: 1, timestamp: NtpTime(1) }, message_bytes, &mut frame);
            client.stream.write_all(&frame).unwrap();
            client.stream.read_exact(&mut frame).unwrap();
            assert_eq!(client.seal.read_reply(&frame).unwrap().message.sequence, 1);
        }
    }
    responder.refused("malformed", 4);
}

#[test]
fn missing_or_partial_greeting_times_out() {
    let limits = ResponderLimits { greeting: Duration::from_millis(50), ..ResponderLimits::default() };
    let responder = TestResponder::on(access(None), limits);
    for bytes in [&b""[..], &HELLO.encode(None)[..20]] {
        let mut stream = Client::connect(responder.address, LISTED);
        stream.write_all(bytes).unwrap();
        let mut received = Vec::new();
        // The connection may be reset because of unread data.
        let _ = stream.read_to_end(&mut received);
        assert_eq!(received, b"");
    }
    responder.refused("silent", 2);
}

#[test]
fn malformed_greeting_or_message_ends_the_connection() {
    let responder = TestResponder::start(Some(SECRET));
    let mut newer = HELLO.encode(None);
    newer[4] = 2;
    let others = [b'x'; GREETING_BYTES];
    for bytes in [&newer[..], &others, &HELLO.encode(None)[..20]] {
        let mut stream = Client::connect(responder.address, LISTED);
        stream.write_all(bytes).unwrap();
        assert_eq!(close(stream), b"");
    }
    responder.refused("malformed", 3);
    let keys = keys(SECRET);
    let mut refused = 3;
    let change = |at: usize| move |frame: &mut Vec<u8>| frame[at] ^= 1;
    for (signer, change, messages) in [
        (None, Box::new(change(0)) as Box<dyn Fn(&mut Vec<u8>)>, 1),
        (None, Box::new(|frame| frame.truncate(40)), 1),
        (Some(&keys), Box::new(change(12)), 1),
        (Some(&keys), Box::new(change(90)), 1),
        (Some(&keys), Box::new(|frame| frame.fill(0)), 1),
    ] {
        let mut client = Client::listed(responder.address, signer);
        client.echo(0);
        let mut frame = client.request(1);
        change(&mut frame);
        client.stream.write_all(&frame).unwrap();
        assert_eq!(close(client.stream), b"", "{messages} was answered before");
        refused += 1;
        responder.refused("malformed", refused);
    }
    assert_eq!(responder.scrape().count(MESSAGES, &[]), 5);
}

#[test]
fn client_that_does_not_read_is_disconnected() {
    let limits = ResponderLimits { stall: Duration::from_millis(200), ..ResponderLimits::default() };
    let responder = TestResponder::on(access(None), limits);
    let hello = Hello { message_bytes: MESSAGE_BYTES_MAX, ..HELLO };
    let client = Client::greet(responder.address, LISTED, hello, None);
    let mut frame = Vec::new();
    client.seal.request(Message { sequence: 1, timestamp: NtpTime(1) }, MESSAGE_BYTES_MAX, &mut frame);
    let mut stream = client.stream;
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    let ended = std::iter::repeat_with(|| stream.write_all(&frame)).find_map(Result::err).unwrap();
    assert_ne!(ended.kind(), io::ErrorKind::WouldBlock, "the connection was closed");
    eventually("the end is counted", || {
        let page = responder.scrape();
        let count = |reason| page.count(REFUSED, &[reason]);
        // The kernel's own timeout expires at the same time.
        let is_counted = count(r#"reason="stalled""#) + count(r#"reason="broken""#) == 1;
        (is_counted && page.count(OPEN, &[]) == 0).then_some(())
    });
}

#[test]
fn connections_are_limited_in_total_and_per_source() {
    let limits = ResponderLimits { connections: 3, connections_per_source: 2, ..ResponderLimits::default() };
    let responder = TestResponder::on(access(None), limits);
    let other = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
    let third = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));
    let connect = |from| Client::greet(responder.address, from, HELLO, None);
    let mut open = vec![connect(LISTED), connect(LISTED)];
    assert_eq!(connect(LISTED).status(), Some(WelcomeStatus::Full), "a third connection of one source");
    eventually("the refused connection is closed", || {
        (responder.scrape().count(OPEN, &[]) == 2).then_some(())
    });
    open.push(connect(other));
    assert_eq!(connect(third).status(), Some(WelcomeStatus::Full), "a fourth connection in total");
    eventually("the refused connection is closed", || {
        (responder.scrape().count(OPEN, &[]) == 3).then_some(())
    });
    for client in &mut open {
        assert_eq!(client.status(), Some(WelcomeStatus::Granted));
        client.echo(7);
    }
    drop(open.remove(0));
    eventually("there is room", || (responder.scrape().count(OPEN, &[]) == 2).then_some(()));
    let mut reconnected = connect(LISTED);
    assert_eq!(reconnected.status(), Some(WelcomeStatus::Granted));
    reconnected.echo(8);
    drop((open, reconnected));
    responder.refused("full", 2);
}

#[test]
fn unverified_connections_of_one_address_do_not_block_others() {
    let keys = Keys::parse(SECRET).unwrap();
    let empty_policy = Policy { prefixes: Vec::new(), ..policy(1_000_000) };
    let limits = ResponderLimits { unverified: 4, unverified_per_source: 2, ..ResponderLimits::default() };
    let responder = TestResponder::on(StreamAccess::new(empty_policy, Some(&keys)), limits);
    let silent = [(); 2].map(|()| Client::connect(responder.address, UNLISTED));
    eventually("both connections are open", || (responder.scrape().count(OPEN, &[]) == 2).then_some(()));
    assert_eq!(close(Client::connect(responder.address, UNLISTED)), b"", "a third connection of one address");
    let keys = super::keys(SECRET);
    let mut proven = [(); 3].map(|()| {
        let mut client = Client::listed(responder.address, Some(&keys));
        client.echo(1);
        client
    });
    proven.iter_mut().for_each(|client| client.echo(2));
    drop(silent);
}

#[test]
fn source_over_its_rate_is_delayed_and_not_dropped() {
    let responder = TestResponder::on(StreamAccess::new(policy(200), None), ResponderLimits::default());
    let mut client = Client::listed(responder.address, None);
    let all: Vec<u8> = (0..60).flat_map(|sequence| client.request(sequence)).collect();
    client.stream.write_all(&all).unwrap();
    assert_eq!((0..60).map_while(|_| client.reply()).collect::<Vec<u64>>(), (0..60).collect::<Vec<u64>>());
    drop(client);
    responder.refused("broken", 0);
}

#[test]
fn connection_refused_by_a_reload_ends_with_its_next_message() {
    let responder = TestResponder::start(None);
    let mut before = Client::listed(responder.address, None);
    before.echo(0);
    let empty_policy = || Policy { prefixes: Vec::new(), ..policy(1_000_000) };
    let keyed = || StreamAccess::new(empty_policy(), Some(&Keys::parse(SECRET).unwrap()));
    responder.responder.change(keyed());
    before.stream.write_all(&before.request(1)).unwrap();
    assert_eq!(before.reply(), None);
    assert_eq!(Client::listed(responder.address, None).status(), Some(WelcomeStatus::Unlisted));
    let mut after = Client::listed(responder.address, Some(&keys(SECRET)));
    after.echo(2);
    responder.responder.change(keyed());
    after.echo(3);
    responder
        .responder
        .change(StreamAccess::new(empty_policy(), Some(&Keys::parse("an unknown secret key").unwrap())));
    after.stream.write_all(&after.request(4)).unwrap();
    assert_eq!(after.reply(), None);
}

#[test]
fn stop_ends_all_connections() {
    let mut responder = TestResponder::start(None);
    let mut clients = [(); 3].map(|()| Client::listed(responder.address, None));
    clients.iter_mut().for_each(|client| client.echo(1));
    let silent = Client::connect(responder.address, LISTED);
    responder.stop();
    for client in &mut clients {
        assert_eq!(client.reply(), None);
    }
    assert_eq!(close(silent), b"");
    assert_eq!(responder.scrape().count(OPEN, &[]), 0);
    assert!(TcpStream::connect(responder.address).is_err(), "the port is closed");
}
