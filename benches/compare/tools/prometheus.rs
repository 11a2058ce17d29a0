//! Drives `blackbox_exporter` as Prometheus does: scrapes one target after the other on persistent
//! connections.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::host_pair::HostPair;

/// A response takes longer only if the program has failed.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Threads that scrape.
pub(crate) struct ScrapeDriver {
    is_stopped: Arc<AtomicBool>,
    succeeded: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl ScrapeDriver {
    /// Scrapes each target once per `every`, evenly, on `connections` connections to the exporter at
    /// `address`. `path` returns the request path for a target.
    pub(crate) fn start(
        pair: &HostPair,
        address: SocketAddr,
        targets: &[IpAddr],
        every: Duration,
        connections: usize,
        path: fn(IpAddr) -> String,
    ) -> Self {
        let (is_stopped, succeeded) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let slot = every / u32::try_from(targets.len()).expect("few");
        let begin = Instant::now();
        let threads = (0..connections).map(|first| {
            let turns = (0..).zip(targets).skip(first).step_by(connections);
            let turns: Vec<(Duration, String)> = turns.map(|(n, target)| (slot * n, path(*target))).collect();
            let (is_stopped, succeeded) = (Arc::clone(&is_stopped), Arc::clone(&succeeded));
            pair.prober_host()
                .spawn(move || scrape_in_turn(address, &turns, every, begin, &is_stopped, &succeeded))
        });
        Self { threads: threads.collect(), is_stopped, succeeded }
    }

    /// Number of successful probes so far.
    pub(crate) fn succeeded(&self) -> u64 {
        self.succeeded.load(Relaxed)
    }

    /// # Errors
    /// Errors on any connection, including a probe without success.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.is_stopped.store(true, Relaxed);
        self.threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    }
}

fn scrape_in_turn(
    address: SocketAddr,
    turns: &[(Duration, String)],
    every: Duration,
    begin: Instant,
    is_stopped: &AtomicBool,
    succeeded: &AtomicU64,
) -> io::Result<()> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    let mut stream = BufReader::new(stream);
    for round in 0.. {
        for (phase, path) in turns {
            std::thread::sleep((begin + every * round + *phase).saturating_duration_since(Instant::now()));
            if is_stopped.load(Relaxed) {
                return Ok(());
            }
            write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
            let body = answer(&mut stream)?;
            if !body.contains("\nprobe_success 1\n") {
                return Err(io::Error::other(format!("no success for {path}:\n{body}")));
            }
            succeeded.fetch_add(1, Relaxed);
        }
    }
    Ok(())
}

/// Reads one HTTP/1.1 response and returns its body.
fn answer(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let (mut length, mut is_chunked) = (0, false);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let line = line.trim_end().to_ascii_lowercase();
        match line.split_once(": ") {
            Some(("content-length", bytes)) => length = super::parse_number(bytes)?,
            Some(("transfer-encoding", "chunked")) => is_chunked = true,
            _ if line.is_empty() => break,
            _ => {}
        }
    }
    let mut body = Vec::new();
    while is_chunked {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let chunk = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
        read(stream, chunk, &mut body)?;
        // The line break after the chunk.
        read(stream, 2, &mut Vec::new())?;
        is_chunked = chunk > 0;
    }
    read(stream, length, &mut body)?;
    String::from_utf8(body).map_err(io::Error::other)
}

/// Reads `length` bytes and appends them.
fn read(stream: &mut BufReader<TcpStream>, length: usize, to: &mut Vec<u8>) -> io::Result<()> {
    let begin = to.len();
    to.resize(begin + length, 0);
    stream.read_exact(&mut to[begin..])
}
