//! A pair of hosts with a wire between them, for one program alone.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use pathmeter_lab::exchange::{Exchanges, Protocol};
use pathmeter_lab::{Namespace, Net, Plan, Program, Way, Wire, eventually};
use pathmeter_proto::sim::{Jitter, Link, Loss};
use tempfile::TempDir;

/// Who asks on `a`, who answers on `b`, and what lies between. All lanes have the same seed.
pub(crate) struct Lane {
    net: Net,
    files: TempDir,
    /// The commands that were run, as a person would type them.
    pub(crate) commands: Vec<String>,
}

const SEED: u64 = 20;

/// What it takes one way, always.
const DELAY: u64 = 20_000_000;

/// How much longer some of them take on a lossy link: they are overtaken by the next one.
const HELD: u64 = 15_000_000;

/// Longer than anything is on its way there and back.
const UNDER_WAY: Duration = Duration::from_millis(200);

impl Lane {
    pub(crate) fn new() -> io::Result<Self> {
        let lane = Self { net: Plan::pair().build(SEED), files: TempDir::new()?, commands: Vec::new() };
        let calm = Link::perfect(DELAY);
        lane.wire().become_like(&calm, &calm);
        // Without this a kernel gives nobody the sockets with which one may ask without privilege. All programs are root's.
        lane.here().set("ipv4/ping_group_range", "0 0");
        Ok(lane)
    }

    /// Where the programs that ask run.
    pub(crate) fn here(&self) -> &Namespace {
        self.net.node("a")
    }

    /// Where is answered.
    pub(crate) fn there(&self) -> &Namespace {
        self.net.node("b")
    }

    pub(crate) fn wire(&self) -> &Wire {
        self.net.wire("a", "b")
    }

    /// The address that is asked.
    pub(crate) fn target(&self) -> IpAddr {
        self.net.v4("b")
    }

    /// So many more addresses of the same host.
    pub(crate) fn targets(&self, count: u16) -> Vec<IpAddr> {
        let all: Vec<Ipv4Addr> = (0..count)
            .map(|number| {
                let [high, low] = (number + 1).to_be_bytes();
                Ipv4Addr::new(10, 78, high, low)
            })
            .collect();
        let lines: String = all.iter().map(|target| format!("addr add {target}/32 dev lo\n")).collect();
        self.there().ip(&lines);
        self.here().ip(&format!("route add 10.78.0.0/16 via {}\n", self.target()));
        all.into_iter().map(IpAddr::from).collect()
    }

    /// A file that a program reads or writes.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let path = self.file(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts a program that asks.
    pub(crate) fn ask(&mut self, program: &str, arguments: &[&str]) -> Program {
        self.start(true, program, arguments)
    }

    /// Starts a program that answers.
    pub(crate) fn answer(&mut self, program: &str, arguments: &[&str]) -> Program {
        self.start(false, program, arguments)
    }

    fn start(&mut self, is_asking: bool, program: &str, arguments: &[&str]) -> Program {
        let mut command = if is_asking { self.here() } else { self.there() }.command(program);
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

    /// Waits until somebody answers on a port of UDP.
    pub(crate) fn wait_for_udp(&self, port: u16) {
        let sockets = || std::fs::read_to_string("/proc/thread-self/net/udp").unwrap_or_default();
        eventually("somebody answers", || {
            self.there().within(sockets).contains(&format!(":{port:04X} ")).then_some(())
        });
    }

    /// What truly happened, once nothing is under way any more.
    pub(crate) fn truth(&self, protocol: Protocol) -> Exchanges {
        std::thread::sleep(UNDER_WAY);
        Exchanges::read(self.wire(), Way::Forward, protocol)
    }

    /// From here on only the delay.
    pub(crate) fn become_calm(&self) {
        let calm = Link::perfect(DELAY);
        self.wire().become_like(&calm, &calm);
    }

    /// From here on loss, duplicates and a little reordering.
    pub(crate) fn become_lossy(&self) {
        let link = |loss| {
            let mut link = Link::perfect(DELAY);
            (link.loss, link.duplicates, link.held) = (Loss::Random(loss), 0.005, (0.01, HELD));
            link
        };
        self.wire().become_like(&link(0.02), &link(0.01));
    }

    /// From here on a delay that varies, and never reorders.
    pub(crate) fn become_jittery(&self) {
        let mut link = Link::perfect(DELAY);
        (link.jitter, link.keeps_order) = (Jitter::Normal { deviation: 1_000_000 }, true);
        self.wire().become_like(&link, &link);
    }

    /// From here on nothing more leaves the host that asks.
    pub(crate) fn sever(&self) {
        self.net.sever("a", "b");
    }
}

/// A command as a person would type it, without the middle of a long list of addresses.
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
pub(crate) fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).expect("before the year 2554")
}
