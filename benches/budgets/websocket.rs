//! Cost of clients of `/ws`, idle and active.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use super::agent::{BenchAgent, NO_PATHS};
use super::bare::per_echo;
use super::report::Row;

/// Idle clients.
const IDLE: u16 = 10_000;
/// Clients per source address: the default limit.
const PER_SOURCE: u16 = 1000;

/// Clients that send a message of the default maximum length.
const LONG: u16 = 1000;
const LONGEST: usize = 64 << 10;

/// Clients that send messages, and their message.
const ACTIVE: u16 = 1000;
const INTERVAL: Duration = Duration::from_millis(100);
const MESSAGE: &[u8] = br#"{"seq": 123, "ts": 1678886400100}"#;

/// Time before the first window, and length of a window.
const SETTLE: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_secs(10);

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let mut rows = idle()?;
    rows.extend(long()?);
    rows.extend(active()?);
    Ok(rows)
}

fn idle() -> io::Result<Vec<Row>> {
    let agent = BenchAgent::start(NO_PATHS)?;
    // Code and buffers loaded for the first client do not count.
    let mut first = Client::open(&agent, 0)?;
    first.send()?;
    first.receive()?;
    drop(first);
    let before = agent.memory()?.resident;
    let mut clients = (0..IDLE).map(|n| Client::open(&agent, n)).collect::<io::Result<Vec<_>>>()?;
    let connected = agent.memory()?.resident;
    // Each client sends one message and then waits.
    for client in &mut clients {
        client.send()?;
        client.receive()?;
    }
    let after = agent.memory()?.resident;
    let each = |resident: f64| (resident - before) / f64::from(IDLE);
    let counted = agent.scrape()?.sum("pathmeter_websocket_clients");
    Ok(vec![
        Row::new(format!("WebSocket, {IDLE} clients, memory of an idle client"), each(connected), "KiB")
            .budget(20.0),
        Row::new("… of a client after one echo", each(after), "KiB").budget(20.0),
        Row::new("… missing clients", f64::from(IDLE) - counted, "").budget(0.0),
    ])
}

fn long() -> io::Result<Vec<Row>> {
    let agent = BenchAgent::start(NO_PATHS)?;
    let mut clients = (0..LONG).map(|n| Client::open(&agent, n)).collect::<io::Result<Vec<_>>>()?;
    let before = agent.memory()?.resident;
    let message = frame(&vec![b'x'; LONGEST]);
    let mut back = vec![0; LONGEST + 10];
    for Client { stream } in &mut clients {
        stream.write_all(&message)?;
        stream.read_exact(&mut back)?;
    }
    let each = (agent.memory()?.resident - before) / f64::from(LONG);
    let what = "… additional memory of a client after an echo of 64 KiB";
    Ok(vec![Row::new(what, each, "KiB")])
}

/// A text frame, masked with zeros.
fn frame(text: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x81];
    match u16::try_from(text.len()) {
        Ok(length @ ..126) => frame.push(0x80 | u8::try_from(length).expect("below 126")),
        Ok(length) => {
            frame.push(0xfe);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(0xff);
            frame.extend((text.len() as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(text);
    frame
}

fn active() -> io::Result<Vec<Row>> {
    let agent = BenchAgent::start(NO_PATHS)?;
    let mut clients = (0..ACTIVE).map(|n| Client::open(&agent, n)).collect::<io::Result<Vec<_>>>()?;
    for client in &mut clients {
        client.send()?;
    }
    exchange(&mut clients, SETTLE)?;
    let echoes = || agent.scrape().map(|page| page.sum("pathmeter_websocket_messages_total"));
    let (echoes_before, cpu, begun) = (echoes()?, agent.cpu()?, Instant::now());
    exchange(&mut clients, WINDOW)?;
    let (used, span, echoed) = (agent.cpu()? - cpu, begun.elapsed(), echoes()? - echoes_before);
    let share = 100.0 * used.as_secs_f64() / span.as_secs_f64();
    let name = format!("{ACTIVE} clients at 10/s");
    Ok(vec![
        Row::new(format!("WebSocket, {name}, share of one core"), share, "%").budget(100.0),
        Row::new(format!("… CPU per echo, {name}"), per_echo(used, echoed), "µs"),
        Row::new("… echoes a second", echoed / span.as_secs_f64(), ""),
    ])
}

/// Lets each client in turn receive its last message and send the next one, spread over the interval.
fn exchange(clients: &mut [Client], span: Duration) -> io::Result<()> {
    let begin = Instant::now();
    let slot = INTERVAL / u32::from(ACTIVE);
    let mut due = begin;
    while begin.elapsed() < span {
        for client in &mut *clients {
            due += slot;
            // If late, do not sleep: the average rate stays the same.
            if let Some(early) = due.checked_duration_since(Instant::now()) {
                std::thread::sleep(early);
            }
            client.receive()?;
            client.send()?;
        }
    }
    Ok(())
}

/// A client that waits for its echoes.
struct Client {
    stream: TcpStream,
}

impl Client {
    fn open(agent: &BenchAgent, number: u16) -> io::Result<Self> {
        let source = Ipv4Addr::from_bits(0x7f00_0001 + u32::from(number / PER_SOURCE));
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(IpAddr::V4(source), 0).into())?;
        socket.connect(&agent.http().into())?;
        socket.set_tcp_nodelay(true)?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(
            b"GET /ws HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
              Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        match head.starts_with(b"HTTP/1.1 101 ") {
            true => Ok(Self { stream }),
            false => Err(io::Error::other(String::from_utf8_lossy(&head).into_owned())),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&frame(MESSAGE))
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut frame = [0; 2 + MESSAGE.len()];
        self.stream.read_exact(&mut frame)?;
        match &frame[2..] == MESSAGE {
            true => Ok(()),
            false => Err(io::Error::other("something else came back")),
        }
    }
}
