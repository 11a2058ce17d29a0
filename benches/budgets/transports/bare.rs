//! Loops that make the system calls of an echo over a transport, without its logic.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};

use super::super::agent::{AgentNamespace, within};
use super::super::bare::{BareResponder, FieldOffsets, per_echo, probe, probe_with};
use super::super::batch::{Timestamps, prepared};
use super::super::process::cpu_of_this_thread;
use super::{CaseTransport, EchoCost, TransportCase};

/// Length of a pathmeter ICMP echo.
const ICMP_BYTES: usize = 32;
const ECHO_REQUEST: u8 = 8;

/// Length of a message over TCP: the shortest of pathmeter's.
const MESSAGE_BYTES: usize = 56;

/// Most events per call of epoll_wait.
const EVENTS_MAX: usize = 64;

/// Longest wait of a loop.
const PATIENCE_MS: u16 = 50;

/// For all kinds of streams the bare loop is TCP.
pub(super) fn cost(load: &TransportCase, namespace: &AgentNamespace, span: Duration) -> io::Result<EchoCost> {
    let rate = f64::from(load.paths) / load.interval.as_secs_f64();
    within(namespace, || match load.transport {
        CaseTransport::Udp => datagrams(rate, span),
        CaseTransport::Icmp(_) => pings(rate, span),
        CaseTransport::Tcp | CaseTransport::WebSocket { .. } | CaseTransport::Http { .. } => {
            streams(load, span)
        }
    })
}

/// The bare prober probes each address once a second: as many addresses as echoes per second, evenly spread.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "about a thousand")]
fn addresses(rate: f64) -> u32 {
    rate.round() as u32
}

fn datagrams(rate: f64, span: Duration) -> io::Result<EchoCost> {
    let echo = BareResponder::start_at(Ipv4Addr::UNSPECIFIED)?;
    let prober = probe(addresses(rate), echo.address.port(), span)?;
    Ok(EchoCost { prober, responder: Some(echo.finish()) })
}

/// Sends from a ping socket; the kernel answers.
fn pings(rate: f64, span: Duration) -> io::Result<EchoCost> {
    let mut request = vec![0; ICMP_BYTES];
    request[0] = ECHO_REQUEST;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))?;
    let socket = prepared(UdpSocket::from(OwnedFd::from(socket)), Timestamps::Both)?;
    let requests = vec![request; addresses(rate) as usize];
    // The kernel writes the identifier to the upper half of the sequence number.
    let places = FieldOffsets { sequence: 4, number: 8, number_back: 8 };
    Ok(EchoCost { prober: probe_with(&socket, requests, places, 0, span)?, responder: None })
}

fn streams(load: &TransportCase, span: Duration) -> io::Result<EchoCost> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr()?.port());
    let count = load.paths;
    let responder: JoinHandle<io::Result<f64>> = std::thread::spawn(move || echo_back(&listener, count));
    let prober = send_requests(to, load, span)?;
    let responder = responder.join().expect("the loop does not panic")?;
    Ok(EchoCost { prober, responder: Some(responder) })
}

/// Connections registered with epoll.
struct EpollStreams {
    epoll: Epoll,
    streams: Vec<TcpStream>,
}

impl EpollStreams {
    fn new(streams: Vec<TcpStream>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (stream, n) in streams.iter().zip(0..) {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll.add(stream, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, n))?;
        }
        Ok(Self { epoll, streams })
    }

    /// Reads one message from each readable stream and passes both to `take`. Returns false if a stream has
    /// ended.
    fn read(
        &mut self,
        patience: u16,
        mut take: impl FnMut(&mut TcpStream, &[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let ready = self.epoll.wait(&mut events, EpollTimeout::from(patience))?;
        for event in &events[..ready] {
            let place = usize::try_from(event.data()).map_err(io::Error::other)?;
            let stream = &mut self.streams[place];
            let mut message = [0; MESSAGE_BYTES];
            match stream.read(&mut message) {
                Ok(0) => return Ok(false),
                Ok(count) if count == MESSAGE_BYTES => take(stream, &message)?,
                Ok(count) => return Err(io::Error::other(format!("a message of {count} bytes"))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// Echoes messages on `count` connections until one of them ends.
fn echo_back(listener: &TcpListener, count: u32) -> io::Result<f64> {
    let accepted = (0..count).map(|_| listener.accept().map(|(stream, _)| stream));
    let mut streams = EpollStreams::new(accepted.collect::<io::Result<Vec<_>>>()?)?;
    let (before, mut echoes) = (cpu_of_this_thread(), 0_u32);
    while streams.read(PATIENCE_MS, |stream, message| {
        echoes += 1;
        stream.write_all(message)
    })? {}
    Ok(per_echo(cpu_of_this_thread() - before, f64::from(echoes)))
}

/// Sends messages on the connections in turn, evenly spread.
fn send_requests(to: SocketAddrV4, load: &TransportCase, span: Duration) -> io::Result<f64> {
    let connected = (0..load.paths).map(|_| TcpStream::connect(to)).collect::<io::Result<Vec<_>>>()?;
    let mut streams = EpollStreams::new(connected)?;
    let pause = load.interval / load.paths;
    let (before, begin) = (cpu_of_this_thread(), Instant::now());
    let (mut due, mut sent, mut answered) = (begin, 0_usize, 0_u32);
    while begin.elapsed() < span {
        while due <= Instant::now() {
            let place = sent % streams.streams.len();
            streams.streams[place].write_all(&[0; MESSAGE_BYTES])?;
            (sent, due) = (sent + 1, due + pause);
        }
        let left = due.saturating_duration_since(Instant::now()).as_micros().div_ceil(1_000);
        streams.read(u16::try_from(left).unwrap_or(PATIENCE_MS), |_, _| {
            answered += 1;
            Ok(())
        })?;
    }
    Ok(per_echo(cpu_of_this_thread() - before, f64::from(answered)))
}
