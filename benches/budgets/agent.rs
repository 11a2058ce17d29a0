//! The agent under test: the real binary with a configuration file and HTTP API.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pathmeter_lab::Namespace;

use super::page::MetricsText;
use super::process::{self, Memory};

/// A running agent. Killed when dropped.
#[derive(Debug)]
pub(crate) struct BenchAgent {
    child: Child,
    namespace: AgentNamespace,
    http: SocketAddr,
    /// Port of STAMP, on every address of 127.0.0.0/8.
    pub(crate) stamp_port: u16,
    _directory: tempfile::TempDir,
}

/// The network namespace of the agents; `None` is the benchmark's own.
pub(crate) type AgentNamespace = Option<Arc<Namespace>>;

/// Runs `work` in the namespace.
pub(crate) fn within<T: Send>(namespace: &AgentNamespace, work: impl FnOnce() -> T + Send) -> T {
    match namespace {
        Some(namespace) => namespace.within(work),
        None => work(),
    }
}

/// Ports of an agent, free when chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AgentPorts {
    pub(crate) http: u16,
    pub(crate) stamp: u16,
    pub(crate) agent: u16,
}

impl AgentPorts {
    pub(crate) fn free(namespace: &AgentNamespace) -> io::Result<Self> {
        within(namespace, || Ok(Self { http: free_port()?, stamp: free_port()?, agent: free_port()? }))
    }
}

/// The paths that an agent measures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PathLoad {
    pub(crate) count: u32,
    pub(crate) interval: &'static str,
    pub(crate) flows: u8,
    /// Port of the responder.
    pub(crate) port: u16,
}

/// An agent that measures nothing.
pub(crate) const NO_PATHS: PathLoad = PathLoad { count: 0, interval: "1s", flows: 1, port: 1 };

/// Keys of `responder` with limits that are never reached.
const UNLIMITED: &str = "rate: 100Mpps, rate_per_source: 100Mpps";

/// Most targets in a configuration. More paths take further probes to the same targets.
const HOSTS_MAX: u32 = 20_000;

/// Longest time until the first page, with the maximum of paths.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The binary: `$PATHMETER`, or the one built for this benchmark.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("PATHMETER").map_or_else(|| env!("CARGO_BIN_EXE_pathmeter").into(), PathBuf::from)
}

/// Address of the `n`-th target in 127.0.0.0/8; a responder on 0.0.0.0 answers on all of them.
pub(crate) fn target(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x7f01_0001 + n)
}

impl BenchAgent {
    /// Starts an agent and waits for its first metrics page.
    pub(crate) fn start(paths: PathLoad) -> io::Result<Self> {
        Self::start_with(UNLIMITED, paths)
    }

    /// [`Self::start`] with other keys of `responder`.
    pub(crate) fn start_with(responder: &str, paths: PathLoad) -> io::Result<Self> {
        let ports = AgentPorts::free(&None)?;
        let agent = Self::launch(&None, ports, &configuration(&ports, responder, paths))?;
        agent.wait_for(|| agent.scrape())?;
        Ok(agent)
    }

    /// Starts an agent with a complete configuration. Does not wait.
    pub(crate) fn launch(namespace: &AgentNamespace, ports: AgentPorts, text: &str) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("config.yaml");
        fs::write(&config, text)?;
        let child = command(namespace, &binary(), &config).spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("starting {}: {error}", binary().display()))
        })?;
        let http = SocketAddr::from((Ipv4Addr::LOCALHOST, ports.http));
        Ok(Self { child, namespace: namespace.clone(), http, stamp_port: ports.stamp, _directory: directory })
    }

    /// Repeats `attempt` until it succeeds.
    pub(crate) fn wait_for<T>(&self, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(100)),
                Err(error) => {
                    let text = format!("the agent did not answer in time: {error}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
            }
        }
    }

    /// Connects to the HTTP port.
    pub(crate) fn connect(&self) -> io::Result<TcpStream> {
        within(&self.namespace, || TcpStream::connect(self.http))
    }

    /// Requests a metrics page; the response has not been read yet.
    pub(crate) fn request_page(&self) -> io::Result<TcpStream> {
        let mut stream = self.connect()?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        Ok(stream)
    }

    pub(crate) fn scrape(&self) -> io::Result<MetricsText> {
        let mut answer = Vec::new();
        self.request_page()?.read_to_end(&mut answer)?;
        let answer = String::from_utf8(answer).map_err(io::Error::other)?;
        match answer.starts_with("HTTP/1.1 200 ") {
            true => Ok(MetricsText(answer)),
            false => Err(io::Error::other("the agent refused a scrape")),
        }
    }

    /// The HTTP address.
    pub(crate) fn http(&self) -> SocketAddr {
        self.http
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time of the whole process.
    pub(crate) fn cpu(&self) -> io::Result<Duration> {
        process::cpu_of(self.child.id())
    }

    pub(crate) fn memory(&self) -> io::Result<Memory> {
        Memory::of(self.child.id())
    }

    pub(crate) fn reset_memory_max(&self) -> io::Result<()> {
        Memory::reset_max(self.child.id())
    }

    /// Number of replies sent so far.
    pub(crate) fn replies(&self) -> io::Result<f64> {
        Ok(self.scrape()?.sum("pathmeter_responder_replies_total"))
    }
}

impl Drop for BenchAgent {
    fn drop(&mut self) {
        // It may have exited already; the measurement has then failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(namespace: &AgentNamespace, binary: &Path, config: &Path) -> Command {
    let mut command = match namespace {
        Some(namespace) => namespace.command(&binary.display().to_string()),
        None => Command::new(binary),
    };
    command.args(["run", "--config"]).arg(config).stdout(Stdio::null());
    command
}

fn configuration(ports: &AgentPorts, responder: &str, paths: PathLoad) -> String {
    let AgentPorts { http, stamp, agent } = ports;
    let mut text = format!(
        "agent: {{name: bench}}\n\
         listen: {{http: \"127.0.0.1:{http}\", stamp: \"0.0.0.0:{stamp}\", agent: \"127.0.0.1:{agent}\"}}\n\
         responder: {{allow: [127.0.0.0/8], {responder}}}\n\
         metrics: {{series_max: 10000000}}\n\
         log: {{level: \"off\"}}\n"
    );
    let PathLoad { count, interval, flows, port } = paths;
    let probes = count.div_ceil(HOSTS_MAX);
    if probes > 0 {
        assert_eq!(count % probes, 0, "every probe measures every target");
        text.push_str("probes:\n");
        for n in 0..probes {
            let _ = writeln!(
                text,
                "  - {{name: echo-{n}, targets: all, peers: [], interval: {interval}, flows: {flows}}}"
            );
        }
        text.push_str("targets:\n");
    }
    for n in 0..count.checked_div(probes).unwrap_or(0) {
        let _ = writeln!(text, "  - {{name: host-{n}, address: {}, port: {port}}}", target(n));
    }
    text
}

/// A port that is free for TCP and UDP on every address.
pub(crate) fn free_port() -> io::Result<u16> {
    loop {
        let port = UdpSocket::bind("0.0.0.0:0")?.local_addr()?.port();
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
}
