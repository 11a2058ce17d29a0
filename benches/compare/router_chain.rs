//! A chain of kernel routers between two hosts, for programs that trace a route.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pathmeter_lab::{Namespace, Net, NetPlan, Program, WireDirection};
use pathmeter_proto::sim::Link;
use tempfile::TempDir;

/// Host `a`, routers `r1` to `rN`, host `b`. The wires at both ends delay.
pub(crate) struct RouterChain {
    net: Net,
    routers: u8,
    files: TempDir,
}

/// A run of a program.
pub(crate) struct ToolRun {
    /// From its start to its end; `None`: it took longer than the limit and was killed.
    pub(crate) time: Option<Duration>,
    /// UDP datagrams and ICMP echoes that left its host.
    pub(crate) probes: usize,
    /// What it printed.
    pub(crate) output: String,
}

/// One-way delay of each of the two wires, in nanoseconds.
const DELAY: u64 = 10_000_000;

/// RTT to host `b` without the time in routers.
pub(crate) const RTT: Duration = Duration::from_nanos(4 * DELAY);

/// An address that is routed to host `b`, which does not have it and drops packets to it silently.
const DEAD_TARGET: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// Time until no packet of a run is under way.
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// Pause between two looks at whether a program has ended.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

const SEED: u64 = 30;

impl RouterChain {
    pub(crate) fn new(routers: u8) -> io::Result<Self> {
        let net = NetPlan::chain(routers.into()).build(SEED);
        let link = Link::perfect(DELAY);
        let chain = Self { net, routers, files: TempDir::new()? };
        chain.first_wire().set_links(&link, &link);
        chain.net.wire(&format!("r{routers}"), "b").set_links(&link, &link);
        let nodes = ["a", "b"].map(str::to_owned).into_iter().chain((1..=routers).map(|n| format!("r{n}")));
        for node in nodes {
            let node = chain.net.node(&node);
            node.set_sysctl("ipv4/icmp_ratelimit", "0");
            node.set_sysctl("ipv4/icmp_ratemask", "0");
            node.set_sysctl("ipv4/icmp_msgs_per_sec", "100000");
        }
        // Permits ping sockets for root's group, which all tools run in. The kernel's default permits none.
        chain.prober_host().set_sysctl("ipv4/ping_group_range", "0 0");
        chain.route_dead_target();
        Ok(chain)
    }

    /// Each node sends packets for the dead target to its neighbour in the direction of `b`.
    fn route_dead_target(&self) {
        for hop in 0..=self.routers {
            let node = if hop == 0 { "a".to_owned() } else { format!("r{hop}") };
            let next = Ipv4Addr::new(10, 77, hop, 2);
            self.net.node(&node).ip(&format!("route add {DEAD_TARGET}/32 via {next}\n"));
        }
    }

    /// Stops a router from sending ICMP errors. It still forwards.
    pub(crate) fn silence(&self, router: u8) {
        self.net.node(&format!("r{router}")).ip("rule add pref 1 iif lo ipproto icmp blackhole\n");
    }

    pub(crate) fn prober_host(&self) -> &Namespace {
        self.net.node("a")
    }

    pub(crate) fn responder_host(&self) -> &Namespace {
        self.net.node("b")
    }

    pub(crate) fn target(&self) -> IpAddr {
        self.net.v4("b")
    }

    pub(crate) fn dead_target(&self) -> IpAddr {
        DEAD_TARGET.into()
    }

    /// The addresses with which the routers answer the prober, in their order.
    pub(crate) fn routers(&self) -> Vec<IpAddr> {
        (0..self.routers).map(|cable| Ipv4Addr::new(10, 77, cable, 2).into()).collect()
    }

    fn first_wire(&self) -> &pathmeter_lab::Wire {
        self.net.wire("a", "r1")
    }

    /// UDP datagrams and ICMP echoes that left the prober's host so far.
    pub(crate) fn probes_sent(&self) -> usize {
        self.first_wire().entered(WireDirection::Forward)
    }

    /// Waits until nothing is under way.
    pub(crate) fn drain(&self) {
        std::thread::sleep(RTT + DRAIN_TIME);
    }

    /// Path of a file.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Runs a program on the prober's host until its end, at most for `limit`.
    pub(crate) fn run(&self, command: &[&str], limit: Duration) -> ToolRun {
        let [program, arguments @ ..] = command else { unreachable!("a command names its program") };
        let before = self.probes_sent();
        let mut command = self.prober_host().command(program);
        command.args(arguments).env("RUST_LOG", "off");
        let begin = Instant::now();
        let mut program = Program::start(&mut command, &self.file("output"));
        let time = loop {
            if program.try_wait().is_some() {
                break Some(begin.elapsed());
            }
            if begin.elapsed() > limit {
                break None;
            }
            std::thread::sleep(POLL_INTERVAL);
        };
        let output = program.output();
        drop(program);
        self.drain();
        ToolRun { time, probes: self.probes_sent() - before, output }
    }
}
