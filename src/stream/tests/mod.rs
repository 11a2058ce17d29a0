//! Paths over connections, towards servers that do right and then wrong.

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

use pathmeter_lab::{DEADLINE, Page as Scrape, eventually};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoReport, Mismatch, StreamSpec, Verdict};
use pathmeter_proto::key::Keys;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::stream::{Admittance, GREETING_BYTES, Hello, PURPOSE, Seal, Welcome};
use pathmeter_proto::wire::websocket::MessageFormat;
use socket2::SockRef;
use tokio_tungstenite::tungstenite;

use super::{Dial, ExpectedResponse, HttpTarget, StreamEcho, StreamHandle, StreamProtocol};
use crate::clock::Clock;
use crate::loops::{LoopEvent, NewPath};
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::StreamSeries;
use crate::metrics::{Blocks, Exporter, ExpositionFormat as PageFormat, HttpCounts};
use crate::paths::PathId;

/// Deadlines that no delay of this machine reaches.
const PATIENT: Duration = Duration::from_secs(60);

/// A deadline that is waited for.
const BRIEF: Duration = Duration::from_millis(300);

/// Between two messages.
const INTERVAL: Duration = Duration::from_millis(10);

/// Bytes of a message.
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
    /// Serves each connection in a thread of its own; `serve` is told its number, from 0 on.
    fn start(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), serve)
    }

    fn on(listener: TcpListener, serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let (accepted, is_closed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, is_over, serve) = (Arc::clone(&accepted), Arc::clone(&is_closed), Arc::new(serve));
        let accepting = thread::spawn(move || {
            let mut guests = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                let (number, serve) = (counted.fetch_add(1, Ordering::SeqCst), Arc::clone(&serve));
                guests.push(thread::spawn(move || serve(number, stream)));
            }
            for guest in guests {
                guest.join().unwrap();
            }
        });
        Self { address, accepted, is_closed, accepting: Some(accepting) }
    }

    /// Connections so far.
    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // It is woken by one more connection.
        drop(TcpStream::connect(self.address));
        // After a failure it may wait for something that does not come any more.
        if let Some(accepting) = self.accepting.take().filter(|_| !thread::panicking()) {
            accepting.join().expect("a server does its part");
        }
    }
}

/// An address where nobody listens, as long as the socket lives.
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

/// Says that nothing more comes, and reads until the other side ends.
fn close(mut stream: TcpStream) -> Vec<u8> {
    let _ = stream.shutdown(Shutdown::Write);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    rest
}

/// Reads and says nothing, until the other side ends.
fn hold(mut stream: TcpStream) {
    let _ = io::copy(&mut stream, &mut io::sink());
}

/// What a server speaks, well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    Tcp,
    WebSocket,
    Http,
}

/// One well-spoken end of a connection.
enum Host {
    Tcp(TcpHost),
    WebSocket(Box<tungstenite::WebSocket<TcpStream>>),
    Http(TcpStream),
}

/// A server's end of our echo over TCP.
struct TcpHost {
    stream: TcpStream,
    seal: Seal,
    bytes: usize,
    frame: Vec<u8>,
}

impl TcpHost {
    /// Welcomes; `None`: nobody greeted.
    fn begin(mut stream: TcpStream, keys: Option<&Keys>) -> Option<Self> {
        stream.set_nodelay(true).unwrap();
        let mut greeting = [0; GREETING_BYTES];
        stream.read_exact(&mut greeting).ok()?;
        let (hello, _) = Hello::decode(&greeting, keys).unwrap();
        let welcome = Welcome { admittance: Admittance::Granted, nonce: [5; 16] };
        let key = keys.map(Keys::current);
        stream.write_all(&welcome.encode(&hello, key)).ok()?;
        let bytes = hello.message_bytes as usize;
        Some(Self { stream, seal: Seal::of(key, &hello, &welcome), bytes, frame: Vec::new() })
    }

    /// Reads a message and makes the reply of it; `None` at the end.
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

/// Reads the head of a request; `None` at the end.
fn request(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8(head).unwrap())
}

/// An answer with a body.
fn answer(head: &str, body: &str) -> String {
    format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

impl Host {
    fn begin(speech: Speech, stream: TcpStream) -> Option<Self> {
        match speech {
            Speech::Tcp => TcpHost::begin(stream, None).map(Self::Tcp),
            Speech::WebSocket => {
                tungstenite::accept(stream).ok().map(|socket| Self::WebSocket(Box::new(socket)))
            }
            Speech::Http => Some(Self::Http(stream)),
        }
    }

    /// Reads a message, and answers it if that is wished; `None` at the end.
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

    /// Answers some messages.
    fn answer(&mut self, count: usize) -> Option<()> {
        (0..count).try_for_each(|_| self.take(true))
    }

    /// Answers until the other side ends.
    fn answer_all(mut self) {
        while self.take(true).is_some() {}
    }

    /// Says that nothing more comes, and counts what still does.
    fn close(mut self) -> usize {
        let stream = match &self {
            Self::Tcp(host) => &host.stream,
            Self::WebSocket(socket) => socket.get_ref(),
            Self::Http(stream) => stream,
        };
        // It may have ended already.
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

impl Speech {
    const ALL: [Self; 3] = [Self::Tcp, Self::WebSocket, Self::Http];

    /// Speaks it to a server.
    fn dial(self, to: SocketAddr) -> Dial {
        match self {
            Self::Tcp => dial(to, StreamProtocol::Tcp { bytes: BYTES, keys: None }),
            Self::WebSocket => dial(
                to,
                StreamProtocol::WebSocket {
                    place: place(to),
                    format: MessageFormat::Text,
                    bytes: BYTES as usize,
                },
            ),
            Self::Http => dial(to, StreamProtocol::Http { place: place(to), expected: whatever() }),
        }
    }
}

fn dial(to: SocketAddr, over: StreamProtocol) -> Dial {
    Dial { to, host: None, source: None, dscp: Dscp::DEFAULT, over }
}

fn place(to: SocketAddr) -> HttpTarget {
    HttpTarget { authority: to.to_string(), path: "/".to_owned(), signer: None, secure: None }
}

/// Any answer with a status of success.
fn whatever() -> ExpectedResponse {
    ExpectedResponse { status: Vec::new(), body: None, is_agent: false }
}

/// What a scrape says.
fn scrape(exporter: &Arc<Exporter>) -> Scrape {
    let nothing = HttpCounts { connections: 0, accept_errors: 0, responses: [("2xx", 0); 5], tls: None };
    let (mut page, mut text) = (exporter.page(&nothing, PageFormat::Classic), Vec::new());
    while page.next(&mut text) {}
    Scrape::parse(std::str::from_utf8(&text).unwrap())
}

/// A path that is measured, and all that is said of it.
struct StreamPath {
    handle: StreamHandle,
    events: tokio::sync::mpsc::Receiver<LoopEvent>,
    tap: Receiver<EchoReport>,
    exporter: Arc<Exporter>,
    series: Arc<EchoSeries>,
    told: Told,
}

/// What was said of a path so far.
#[derive(Default)]
struct Told {
    reports: Vec<EchoReport>,
    /// Why there was no connection, each time.
    troubles: Vec<String>,
    connections: usize,
    is_finished: bool,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [self.sent(), self.answered(), self.lost(), self.withdrawn()];
        write!(f, "{counts:?} sent, answered, lost, withdrawn over {} connections", self.connections)?;
        write!(f, "; troubles: {:#?}", self.troubles)
    }
}

/// A message's verdict, and its round trip if it has one.
type Decision = (u64, Verdict, Option<Duration>);

impl Told {
    fn sent(&self) -> usize {
        self.count(|report| matches!(report, EchoReport::Sent { .. }))
    }

    fn count(&self, is_meant: impl Fn(&EchoReport) -> bool) -> usize {
        self.reports.iter().filter(|report| is_meant(report)).count()
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

    fn decided(&self, is_so: impl Fn(Verdict) -> bool) -> usize {
        self.decisions().filter(|(_, verdict, _)| is_so(*verdict)).count()
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

    /// Messages without an answer that were sent before the last one that has one.
    fn passed_over(&self) -> Vec<u64> {
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

    /// Whether a trouble has these words in it.
    fn mentions(&self, words: &str) -> bool {
        self.troubles.iter().any(|trouble| trouble.contains(words))
    }
}

impl StreamPath {
    /// Measures with deadlines that nothing reaches.
    fn start(dial: Dial) -> Self {
        Self::with(dial, |_| {})
    }

    /// Measures with a deadline that is reached soon.
    fn brief(dial: Dial) -> Self {
        Self::with(dial, |spec| (spec.late_after, spec.lost_after) = (BRIEF, BRIEF))
    }

    fn with(dial: Dial, change: impl FnOnce(&mut StreamSpec)) -> Self {
        Self::timing(dial, None, change)
    }

    /// The same, and fresh connections are timed.
    fn timing(dial: Dial, fresh: Option<Duration>, change: impl FnOnce(&mut StreamSpec)) -> Self {
        let mut spec = StreamSpec {
            interval: INTERVAL,
            late_after: PATIENT,
            lost_after: PATIENT,
            unanswered_max: dial.over.at_once(),
            on_demand: dial.over.is_on_demand(),
            count: None,
            seed: 7,
        };
        change(&mut spec);
        let series = Arc::new(EchoSeries::new("p", "b", "ipv4", 1));
        let stream = Arc::new(StreamSeries::new("p", "b", "ipv4"));
        let (reports, tap) = channel();
        let (sender, events) = tokio::sync::mpsc::channel(100_000);
        let handle = super::spawn(sender).unwrap();
        let exporter = Arc::new(Exporter::new(vec![Arc::clone(handle.series())], Default::default()));
        let mut blocks = Blocks::default();
        blocks.add(Arc::clone(&series));
        blocks.add(Arc::clone(&stream));
        exporter.publish(blocks);
        let echo = StreamEcho { spec, dial, fresh, series: Arc::clone(&series), stream, tap: Some(reports) };
        handle.start(NewPath { id: ID, task: echo, peer_left_at: None });
        Self { handle, events, tap, exporter, series, told: Told::default() }
    }

    fn listen(&mut self) -> &Told {
        self.told.reports.extend(self.tap.try_iter());
        while let Ok(event) = self.events.try_recv() {
            match event {
                LoopEvent::Started { .. } => self.told.connections += 1,
                LoopEvent::Disconnected { reason, .. } => self.told.troubles.push(reason),
                LoopEvent::Finished(_) => self.told.is_finished = true,
                LoopEvent::NotStarted { .. }
                | LoopEvent::OfPath { .. }
                | LoopEvent::PeerLeaving(_)
                | LoopEvent::ClockStepped(_)
                | LoopEvent::Suspended(_) => panic!("a path has no business with {event:?}"),
            }
        }
        &self.told
    }

    /// Waits until something was said.
    fn until(&mut self, what: &str, is_so: impl Fn(&Told) -> bool) -> &Told {
        let mut so_far = String::new();
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, || {
                let told = self.listen();
                so_far = format!("{told:?}");
                is_so(told).then_some(())
            });
        }));
        assert!(seen.is_ok(), "waited in vain: {what}; {so_far}");
        &self.told
    }

    fn scrape(&self) -> Scrape {
        scrape(&self.exporter)
    }

    /// Connections, or attempts at one, that ended for that reason.
    fn ended(&self, reason: &str) -> u64 {
        self.scrape().count("pathmeter_echo_reconnects_total", &[&format!("reason=\"{reason}\"")])
    }

    /// Those that ended for another one.
    fn ended_otherwise(&self, reasons: &[&str]) -> u64 {
        let all = self.scrape().count("pathmeter_echo_reconnects_total", &[]);
        all - reasons.iter().map(|reason| self.ended(reason)).sum::<u64>()
    }

    /// Stops when everything is decided, and checks that each message has its one verdict.
    fn stop(&mut self) -> &Told {
        self.handle.stop(DEADLINE);
        self.end()
    }

    /// Waits for the end of the thread, and checks that each message has its one verdict.
    fn end(&mut self) -> &Told {
        eventually("the thread ends", || self.handle.is_finished().then_some(()));
        self.listen();
        let page = self.scrape();
        assert_eq!(self.told.decisions().count(), self.told.sent(), "{page}");
        assert_eq!(self.series.decided(), self.series.sent.get(), "{page}");
        assert_eq!(self.series.decided(), self.told.sent() as u64, "{page}");
        assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
        assert_eq!(page.count("pathmeter_echo_connected", &[]), 0, "{page}");
        let mut sequences: Vec<u64> = self.told.decisions().map(|(sequence, ..)| sequence).collect();
        sequences.sort_unstable();
        sequences.dedup();
        assert_eq!(sequences.len(), self.told.sent(), "one verdict each");
        &self.told
    }
}

const ID: PathId = PathId(1);
