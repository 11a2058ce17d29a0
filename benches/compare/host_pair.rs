//! A pair of hosts with a wire between them, for one tool alone.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use pathmeter_lab::exchange::{ExchangeProtocol, Exchanges};
use pathmeter_lab::{Namespace, Net, NetPlan, Program, Wire, WireDirection, eventually};
use pathmeter_proto::sim::{Jitter, Link, Loss};
use tempfile::TempDir;

/// The prober's host `a`, the responder's host `b`, and the wire between them. All pairs have the same seed.
pub(crate) struct HostPair {
    net: Net,
    files: TempDir,
    /// The commands that were run, as typed in a shell.
    pub(crate) commands: Vec<String>,
}

const SEED: u64 = 20;

/// One-way delay in nanoseconds.
const DELAY: u64 = 20_000_000;

/// Additional delay of some datagrams on a lossy link, which are then overtaken, in nanoseconds.
const HELD_BACK: u64 = 15_000_000;

/// Longer than any round trip.
const TRANSIT_TIME: Duration = Duration::from_millis(200);

impl HostPair {
    pub(crate) fn new() -> io::Result<Self> {
        let pair = Self { net: NetPlan::pair().build(SEED), files: TempDir::new()?, commands: Vec::new() };
        let perfect = Link::perfect(DELAY);
        pair.wire().set_links(&perfect, &perfect);
        // Permits ping sockets for root's group, which all tools run in. The kernel's default permits none.
        pair.prober_host().set_sysctl("ipv4/ping_group_range", "0 0");
        Ok(pair)
    }

    /// The namespace of the prober.
    pub(crate) fn prober_host(&self) -> &Namespace {
        self.net.node("a")
    }

    /// The namespace of the responder.
    pub(crate) fn responder_host(&self) -> &Namespace {
        self.net.node("b")
    }

    pub(crate) fn wire(&self) -> &Wire {
        self.net.wire("a", "b")
    }

    /// The responder's address.
    pub(crate) fn target(&self) -> IpAddr {
        self.net.v4("b")
    }

    /// Adds `count` addresses to the responder's host.
    pub(crate) fn targets(&self, count: u16) -> Vec<IpAddr> {
        let all: Vec<Ipv4Addr> = (0..count)
            .map(|number| {
                let [high, low] = (number + 1).to_be_bytes();
                Ipv4Addr::new(10, 78, high, low)
            })
            .collect();
        let lines: String = all.iter().map(|target| format!("addr add {target}/32 dev lo\n")).collect();
        self.responder_host().ip(&lines);
        self.prober_host().ip(&format!("route add 10.78.0.0/16 via {}\n", self.target()));
        all.into_iter().map(IpAddr::from).collect()
    }

    /// Path of a file for a tool.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let path = self.file(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts a program on the prober's host.
    pub(crate) fn start_prober(&mut self, program: &str, arguments: &[&str]) -> Program {
        self.start(true, program, arguments)
    }

    /// Starts a program on the responder's host.
    pub(crate) fn start_responder(&mut self, program: &str, arguments: &[&str]) -> Program {
        self.start(false, program, arguments)
    }

    fn start(&mut self, is_asking: bool, program: &str, arguments: &[&str]) -> Program {
        let mut command = if is_asking { self.prober_host() } else { self.responder_host() }.command(program);
        command.args(arguments).env("RUST_LOG", "off");
        let folder = format!("{}/", self.files.path().display());
        let name = program.rsplit('/').next().unwrap_or(program);
        let shown = shown(name, &arguments.join(" ").replace(&folder, ""));
        if !self.commands.contains(&shown) {
            self.commands.push(shown);
        }
        let output = self.file(&format!("output-{}-{}", self.commands.len(), u8::from(is_asking)));
        Program::start(&mut command, &output)
    }

    /// Waits until a UDP port is bound on the responder's host.
    pub(crate) fn wait_for_udp(&self, port: u16) {
        let sockets = || std::fs::read_to_string("/proc/thread-self/net/udp").unwrap_or_default();
        eventually("the responder listens", || {
            self.responder_host().within(sockets).contains(&format!(":{port:04X} ")).then_some(())
        });
    }

    /// The true outcomes, after all datagrams in flight have arrived.
    pub(crate) fn truth(&self, protocol: ExchangeProtocol) -> Exchanges {
        std::thread::sleep(TRANSIT_TIME);
        Exchanges::read(self.wire(), WireDirection::Forward, protocol)
    }

    /// Sets a link with only delay.
    pub(crate) fn use_perfect_link(&self) {
        let perfect = Link::perfect(DELAY);
        self.wire().set_links(&perfect, &perfect);
    }

    /// Sets a link with loss, duplicates and a little reordering.
    pub(crate) fn use_lossy_link(&self) {
        let link = |loss| {
            let mut link = Link::perfect(DELAY);
            (link.loss, link.duplicates, link.held) = (Loss::Random(loss), 0.005, (0.01, HELD_BACK));
            link
        };
        self.wire().set_links(&link(0.02), &link(0.01));
    }

    /// Sets a link with variable delay and no reordering.
    pub(crate) fn use_jittery_link(&self) {
        let mut link = Link::perfect(DELAY);
        (link.jitter, link.keeps_order) = (Jitter::Normal { deviation: 1_000_000 }, true);
        self.wire().set_links(&link, &link);
    }

    /// Makes the prober's kernel refuse to send.
    pub(crate) fn stop_prober_host(&self) {
        self.net.add_unreachable_route("a", "b");
    }
}

/// A command as typed in a shell, with long lists of addresses shortened.
fn shown(name: &str, arguments: &str) -> String {
    let is_address = |word: &&str| word.parse::<IpAddr>().is_ok();
    let addresses: Vec<&str> = arguments.split([' ', ',']).filter(is_address).collect();
    match addresses[..] {
        [first, _, .., last] => {
            let (before, rest) = arguments.split_once(first).expect("it is there");
            let (_, behind) = rest.rsplit_once(last).expect("it is there");
            format!("{name} {before}{first} … {last}{behind}")
        }
        _ => format!("{name} {arguments}"),
    }
}

/// The clock of the wires, in nanoseconds since 1970.
pub(crate) fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).expect("before the year 2554")
}
