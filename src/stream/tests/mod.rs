//! Tests of paths over connections, with correct and faulty servers.

mod connect_probe;
mod endings;
mod http;
mod path;
mod responder;
mod tcp;
#[cfg(feature = "tls")]
mod tls;
mod websocket;

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pathmeter_lab::{DEADLINE, MetricsPage, eventually};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoReport, Mismatch, StreamSpec, Verdict};
use pathmeter_proto::key::Keys;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::stream::{GREETING_BYTES, Hello, PURPOSE, Seal, Welcome, WelcomeStatus};
use pathmeter_proto::wire::websocket::MessageFormat;
use socket2::SockRef;
use tokio_tungstenite::tungstenite;

use super::{
    Dial, ExpectedResponse, HttpTarget, Observer, StreamEcho, StreamHandle, StreamProtocol, StreamTask,
};
use crate::clock::Clock;
use crate::loops::{LoopEvent, NewPath};
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::StreamSeries;
use crate::metrics::{Blocks, Exporter, ExpositionFormat as PageFormat, HttpCounts};
use crate::paths::PathId;

/// A timeout that never expires in a test.
const PATIENT: Duration = Duration::from_secs(60);

/// A timeout that the test waits for.
const BRIEF: Duration = Duration::from_millis(300);

/// Interval of messages.
const INTERVAL: Duration = Duration::from_millis(10);

/// Message size in bytes.
const BYTES: u32 = 96;

const SECRET: &str = "the key of this year";

fn keys(secret: &str) -> Keys {
    Keys::parse(secret).unwrap().derive(PURPOSE)
}

/// A server on loopback.
struct Server {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    is_closed: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves each connection in its own thread; `serve` receives the number of the connection, from 0.
    fn start(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), serve)
    }

    fn on(listener: TcpListener, serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let (accepted, is_closed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, is_over, serve) = (Arc::clone(&accepted), Arc::clone(&is_closed), Arc::new(serve));
        let accepting = thread::spawn(move || {
            let mut connections = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                let (number, serve) = (counted.fetch_add(1, Ordering::SeqCst), Arc::clone(&serve));
                connections.push(thread::spawn(move || serve(number, stream)));
            }
            for connection in connections {
                connection.join().unwrap();
            }
        });
        Self { address, accepted, is_closed, accepting: Some(accepting) }
    }

    /// Number of accepted connections.
    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // One more connection wakes the accepting thread.
        drop(TcpStream::connect(self.address));
        // After a failed test the thread may wait forever.
        if let Some(accepting) = self.accepting.take().filter(|_| !thread::panicking()) {
            accepting.join().expect("the server thread does not panic");
        }
    }
}

/// An address without a listener, as long as the socket exists.
fn closed_port() -> (socket2::Socket, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// Ends a connection with a reset.
fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Shuts down writing, and reads until the other side closes.
fn close(mut stream: TcpStream) -> Vec<u8> {
    let _ = stream.shutdown(Shutdown::Write);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    rest
}

/// Reads without replying, until the other side closes.
fn hold(mut stream: TcpStream) {
    let _ = io::copy(&mut stream, &mut io::sink());
}

/// The protocol of a test server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TestProtocol {
    Tcp,
    WebSocket,
    Http,
}

/// The server side of a connection.
enum Host {
    Tcp(TcpHost),
    WebSocket(Box<tungstenite::WebSocket<TcpStream>>),
    Http(TcpStream),
}

/// The server side of echo over TCP.
struct TcpHost {
    stream: TcpStream,
    seal: Seal,
    bytes: usize,
    frame: Vec<u8>,
}

impl TcpHost {
    /// Answers the greeting; `None` if there was none.
    fn begin(mut stream: TcpStream, keys: Option<&Keys>) -> Option<Self> {
        stream.set_nodelay(true).unwrap();
        let mut greeting = [0; GREETING_BYTES];
        stream.read_exact(&mut greeting).ok()?;
        let (hello, _) = Hello::decode(&greeting, keys).unwrap();
        let welcome = Welcome { status: WelcomeStatus::Granted, nonce: [5; 16] };
        let key = keys.map(Keys::current);
        stream.write_all(&welcome.encode(&hello, key)).ok()?;
        let bytes = hello.message_bytes as usize;
        Some(Self { stream, seal: Seal::of(key, &hello, &welcome), bytes, frame: Vec::new() })
    }

    /// Reads a message and prepares its reply; `None` at the end of the stream.
    fn read(&mut self) -> Option<&mut Vec<u8>> {
        self.frame.resize(self.bytes, 0);
        self.stream.read_exact(&mut self.frame).ok()?;
        self.seal.check_request(&self.frame).unwrap();
        let now = WallTime::from_nanos(1);
        self.seal.reply(&mut self.frame, now, now);
        Some(&mut self.frame)
    }

    fn write(&mut self) -> Option<()> {
        self.stream.write_all(&self.frame).ok()
    }
}

/// Reads the head of a request; `None` at the end of the stream.
fn request(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8(head).unwrap())
}

/// An HTTP response with a body.
fn answer(head: &str, body: &str) -> String {
    format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

impl Host {
    fn begin(test_protocol: TestProtocol, stream: TcpStream) -> Option<Self> {
        match test_protocol {
            TestProtocol::Tcp => TcpHost::begin(stream, None).map(Self::Tcp),
            TestProtocol::WebSocket => {
                tungstenite::accept(stream).ok().map(|socket| Self::WebSocket(Box::new(socket)))
            }
            TestProtocol::Http => Some(Self::Http(stream)),
        }
    }

    /// Reads a message, and replies if `is_answered`; `None` at the end of the stream.
    fn take(&mut self, is_answered: bool) -> Option<()> {
        match self {
            Self::Tcp(host) => {
                host.read()?;
                if is_answered { host.write() } else { Some(()) }
            }
            Self::WebSocket(socket) => {
                let message = socket.read().ok()?;
                if is_answered { socket.send(message).ok() } else { Some(()) }
            }
            Self::Http(stream) => {
                request(stream)?;
                if is_answered { stream.write_all(answer("200 OK", "ok").as_bytes()).ok() } else { Some(()) }
            }
        }
    }

    /// Answers `count` messages.
    fn answer(&mut self, count: usize) -> Option<()> {
        (0..count).try_for_each(|_| self.take(true))
    }

    /// Answers until the other side closes.
    fn answer_all(mut self) {
        while self.take(true).is_some() {}
    }

    /// Shuts down writing, and counts the messages that still arrive.
    fn close(mut self) -> usize {
        let stream = match &self {
            Self::Tcp(host) => &host.stream,
            Self::WebSocket(socket) => socket.get_ref(),
            Self::Http(stream) => stream,
        };
        // The connection may have ended already.
        let _ = stream.shutdown(Shutdown::Write);
        std::iter::from_fn(|| self.take(false)).count()
    }

    fn into_stream(self) -> TcpStream {
        match self {
            Self::Tcp(host) => host.stream,
            Self::WebSocket(socket) => socket.get_ref().try_clone().unwrap(),
            Self::Http(stream) => stream,
        }
    }
}

impl TestProtocol {
    const ALL: [Self; 3] = [Self::Tcp, Self::WebSocket, Self::Http];

    /// Connects to a server with this protocol.
    fn dial(self, to: SocketAddr) -> Dial {
        match self {
            Self::Tcp => dial(to, StreamProtocol::Tcp { bytes: BYTES, keys: None }),
            Self::WebSocket => dial(
                to,
                StreamProtocol::WebSocket {
                    target: target(to),
                    format: MessageFormat::Text,
                    bytes: BYTES as usize,
                },
            ),
            Self::Http => dial(to, StreamProtocol::Http { target: target(to), expected: any_success() }),
        }
    }
}

fn dial(to: SocketAddr, protocol: StreamProtocol) -> Dial {
    Dial { to, host: None, source: None, dscp: Dscp::DEFAULT, protocol }
}

fn target(to: SocketAddr) -> HttpTarget {
    HttpTarget { authority: to.to_string(), path: "/".to_owned(), signer: None, secure: None }
}

/// Accepts any response with a success status.
fn any_success() -> ExpectedResponse {
    ExpectedResponse { status: Vec::new(), body: None, is_agent: false }
}

/// Scrapes the metrics.
fn scrape(exporter: &Arc<Exporter>) -> MetricsPage {
    let nothing = HttpCounts { connections: 0, accept_errors: 0, responses: [("2xx", 0); 5], tls: None };
    let (mut page, mut text) = (exporter.page(&nothing, PageFormat::Classic), Vec::new());
    while page.next(&mut text) {}
    MetricsPage::parse(std::str::from_utf8(&text).unwrap())
}

/// A path under test, and everything that it reports.
struct RunningPath {
    handle: StreamHandle,
    events: tokio::sync::mpsc::Receiver<LoopEvent>,
    reports: Receiver<EchoReport>,
    exporter: Arc<Exporter>,
    series: Arc<EchoSeries>,
    observed: Observed,
}

/// What a path has reported so far.
#[derive(Default)]
struct Observed {
    reports: Vec<EchoReport>,
    /// The reasons of all connection failures.
    errors: Vec<String>,
    connections: usize,
    is_finished: bool,
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [self.sent(), self.answered(), self.lost(), self.withdrawn()];
        write!(f, "{counts:?} sent, answered, lost, withdrawn over {} connections", self.connections)?;
        write!(f, "; errors: {:#?}", self.errors)
    }
}

/// Sequence number, verdict, and RTT if there is one.
type Decision = (u64, Verdict, Option<Duration>);

impl Observed {
    fn sent(&self) -> usize {
        self.count(|report| matches!(report, EchoReport::Sent { .. }))
    }

    fn count(&self, matches: impl Fn(&EchoReport) -> bool) -> usize {
        self.reports.iter().filter(|report| matches(report)).count()
    }

    fn decisions(&self) -> impl Iterator<Item = Decision> + '_ {
        self.reports.iter().filter_map(|report| match report {
            EchoReport::Decided { sequence, verdict, sample, .. } => {
                Some((*sequence, *verdict, sample.map(|sample| sample.rtt)))
            }
            EchoReport::Sent { .. }
            | EchoReport::Unsent(_)
            | EchoReport::SendError(_)
            | EchoReport::Ipdv(_)
            | EchoReport::Duplicate
            | EchoReport::Reordered
            | EchoReport::VeryLate
            | EchoReport::Mismatched(_)
            | EchoReport::BurstBegan
            | EchoReport::BurstEnded(_)
            | EchoReport::TransmitLag(_)
            | EchoReport::TurnaroundInvalid
            | EchoReport::Icmp(_)
            | EchoReport::LossyFlows(_) => None,
        })
    }

    fn decided(&self, condition: impl Fn(Verdict) -> bool) -> usize {
        self.decisions().filter(|(_, verdict, _)| condition(*verdict)).count()
    }

    fn lost(&self) -> usize {
        self.decided(|verdict| matches!(verdict, Verdict::Lost(_)))
    }

    fn withdrawn(&self) -> usize {
        self.decided(|verdict| verdict == Verdict::Withdrawn)
    }

    fn answered(&self) -> usize {
        self.decided(|verdict| matches!(verdict, Verdict::Ok | Verdict::Late))
    }

    /// Unanswered messages that were sent before the last answered one.
    fn unanswered(&self) -> Vec<u64> {
        let is_answer = |verdict| matches!(verdict, Verdict::Ok | Verdict::Late);
        let answered: BTreeSet<u64> = self
            .decisions()
            .filter(|(_, verdict, _)| is_answer(*verdict))
            .map(|(sequence, ..)| sequence)
            .collect();
        let last = answered.last().copied().unwrap_or(0);
        (0..last).filter(|sequence| !answered.contains(sequence)).collect()
    }

    fn mismatched(&self, why: Mismatch) -> usize {
        self.count(|report| *report == EchoReport::Mismatched(why))
    }

    /// Whether an error contains this text.
    fn mentions(&self, text: &str) -> bool {
        self.errors.iter().any(|error| error.contains(text))
    }
}

impl RunningPath {
    /// Starts a path with timeouts that never expire.
    fn start(dial: Dial) -> Self {
        Self::with(dial, |_| {})
    }

    /// Starts a path with short timeouts.
    fn brief(dial: Dial) -> Self {
        Self::with(dial, |spec| (spec.late_after, spec.lost_after) = (BRIEF, BRIEF))
    }

    fn with(dial: Dial, change: impl FnOnce(&mut StreamSpec)) -> Self {
        Self::timing(dial, None, change)
    }

    /// Starts a path with connection probes.
    fn timing(dial: Dial, connect_interval: Option<Duration>, change: impl FnOnce(&mut StreamSpec)) -> Self {
        let mut spec = StreamSpec {
            interval: INTERVAL,
            late_after: PATIENT,
            lost_after: PATIENT,
            unanswered_max: dial.protocol.at_once(),
            on_demand: dial.protocol.is_on_demand(),
            count: None,
            seed: 7,
        };
        change(&mut spec);
        let series = Arc::new(EchoSeries::new("p", "b", "ipv4", 1));
        let stream = Arc::new(StreamSeries::new("p", "b", "ipv4"));
        let (report_sender, reports) = channel();
        let (sender, events) = tokio::sync::mpsc::channel(100_000);
        let handle = super::spawn(sender).unwrap();
        let exporter = Arc::new(Exporter::new(vec![Arc::clone(handle.series())], Default::default()));
        let mut blocks = Blocks::default();
        blocks.add(Arc::clone(&series));
        blocks.add(Arc::clone(&stream));
        exporter.publish(blocks);
        let echo = StreamEcho {
            spec,
            dial,
            connect_interval,
            series: Arc::clone(&series),
            stream,
            // The receiver may be gone.
            observer: Observer(Box::new(move |report| {
                let _ = report_sender.send(*report);
            })),
            shared: Arc::default(),
        };
        handle.start(NewPath { id: ID, task: StreamTask::Echo(Box::new(echo)), peer_left_at: None });
        Self { handle, events, reports, exporter, series, observed: Observed::default() }
    }

    fn collect(&mut self) -> &Observed {
        self.observed.reports.extend(self.reports.try_iter());
        while let Ok(event) = self.events.try_recv() {
            match event {
                LoopEvent::Started { .. } => self.observed.connections += 1,
                LoopEvent::Disconnected { reason, .. } => self.observed.errors.push(reason),
                LoopEvent::Finished(_) => self.observed.is_finished = true,
                LoopEvent::NotStarted { .. }
                | LoopEvent::OfPath { .. }
                | LoopEvent::PeerLeaving(_)
                | LoopEvent::ClockStepped(_)
                | LoopEvent::Suspended(_) => panic!("unexpected event {event:?}"),
            }
        }
        &self.observed
    }

    /// Waits for a condition on the reports.
    fn until(&mut self, what: &str, condition: impl Fn(&Observed) -> bool) -> &Observed {
        let mut so_far = String::new();
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, || {
                let observed = self.collect();
                so_far = format!("{observed:?}");
                condition(observed).then_some(())
            });
        }));
        assert!(seen.is_ok(), "timed out waiting for: {what}; {so_far}");
        &self.observed
    }

    fn scrape(&self) -> MetricsPage {
        scrape(&self.exporter)
    }

    /// Number of connections and attempts that ended for this reason.
    fn ended(&self, reason: &str) -> u64 {
        self.scrape().count("pathmeter_echo_reconnects_total", &[&format!("reason=\"{reason}\"")])
    }

    /// Number of those that ended for other reasons.
    fn ended_otherwise(&self, reasons: &[&str]) -> u64 {
        let all = self.scrape().count("pathmeter_echo_reconnects_total", &[]);
        all - reasons.iter().map(|reason| self.ended(reason)).sum::<u64>()
    }

    /// Stops the path, and checks that each message has exactly one verdict.
    fn stop(&mut self) -> &Observed {
        self.handle.stop(DEADLINE);
        self.end()
    }

    /// Waits for the end of the thread, and checks that each message has exactly one verdict.
    fn end(&mut self) -> &Observed {
        eventually("the thread ends", || self.handle.is_finished().then_some(()));
        self.collect();
        let page = self.scrape();
        assert_eq!(self.observed.decisions().count(), self.observed.sent(), "{page}");
        assert_eq!(self.series.decided(), self.series.sent.get(), "{page}");
        assert_eq!(self.series.decided(), self.observed.sent() as u64, "{page}");
        assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
        assert_eq!(page.count("pathmeter_echo_connected", &[]), 0, "{page}");
        let mut sequences: Vec<u64> = self.observed.decisions().map(|(sequence, ..)| sequence).collect();
        sequences.sort_unstable();
        sequences.dedup();
        assert_eq!(sequences.len(), self.observed.sent(), "one verdict each");
        &self.observed
    }
}

const ID: PathId = PathId(1);
