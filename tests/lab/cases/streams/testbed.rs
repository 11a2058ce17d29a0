//! Two agents, one of which measures the other over connections.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use pathmeter_lab::connection::{Connection, MessageProtocol};
use pathmeter_lab::{DEADLINE, MetricsPage, Net, NetPlan, Wire, WireDirection};
use pathmeter_proto::sim::Link;
use pathmeter_proto::wire::websocket::MessageFormat;
use serde_json::{Value, json};

use super::outcome::{StreamOutcome, UNSENT_ONE_OF};
use crate::agent::NodeAgent;
use crate::testbed::{Inconclusive, seed};

/// A probe of the configuration.
#[derive(Debug, Clone)]
pub(super) struct StreamProbe {
    pub(super) name: &'static str,
    pub(super) protocol: ProbeProtocol,
    pub(super) interval: Duration,
    pub(super) lost_after: Duration,
    /// Identifies the connections of this probe on the wire.
    pub(super) dscp: u8,
}

/// The protocol of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProbeProtocol {
    /// Messages whose round trips the wire knows.
    Messages(MessageProtocol),
    /// HTTP requests, which carry no times.
    Http,
}

pub(super) const TCP: ProbeProtocol = ProbeProtocol::Messages(MessageProtocol::Tcp { bytes: 56 });
pub(super) const TEXT: ProbeProtocol =
    ProbeProtocol::Messages(MessageProtocol::WebSocket { format: MessageFormat::Text, bytes: 96 });
pub(super) const BINARY: ProbeProtocol =
    ProbeProtocol::Messages(MessageProtocol::WebSocket { format: MessageFormat::Binary, bytes: 200 });

/// Longer round trips are late.
pub(super) const LATE_AFTER: Duration = Duration::from_secs(1);

impl ProbeProtocol {
    /// The keys of the probe in the configuration.
    pub(super) fn keys(self) -> Value {
        match self {
            Self::Messages(MessageProtocol::Tcp { bytes }) => {
                json!({"protocol": "tcp", "size": format!("{bytes}B")})
            }
            Self::Messages(MessageProtocol::WebSocket { format, bytes }) => {
                let format = match format {
                    MessageFormat::Text => "text",
                    MessageFormat::Binary => "binary",
                };
                json!({"protocol": "websocket", "format": format, "size": format!("{bytes}B")})
            }
            Self::Http => json!({"protocol": "http"}),
        }
    }

    pub(super) fn port(self) -> u16 {
        match self {
            Self::Messages(MessageProtocol::Tcp { .. }) => 9_863,
            Self::Messages(MessageProtocol::WebSocket { .. }) | Self::Http => 9_862,
        }
    }
}

impl StreamProbe {
    pub(super) fn new(name: &'static str, dscp: u8, protocol: ProbeProtocol) -> Self {
        Self {
            name,
            protocol,
            interval: Duration::from_millis(20),
            lost_after: Duration::from_secs(15),
            dscp,
        }
    }

    pub(super) fn config(&self) -> Value {
        let mut keys = self.protocol.keys();
        keys["name"] = self.name.into();
        keys["kind"] = "echo".into();
        keys["interval"] = format!("{}ms", self.interval.as_millis()).into();
        keys["late_after"] = format!("{}ms", LATE_AFTER.as_millis()).into();
        keys["lost_after"] = format!("{}ms", self.lost_after.as_millis()).into();
        keys["dscp"] = self.dscp.into();
        // Connect probes would appear in the wire's log.
        keys["connect_interval"] = "off".into();
        keys
    }
}

/// Names of the other host in the configuration, one for each of its addresses.
pub(super) const PEERS: [&str; 2] = ["b", "b-ipv6"];

/// Two hosts with a wire between them and an agent on each. One agent measures the other over IPv4 and IPv6.
pub(super) struct StreamTestbed<'a> {
    pub(super) net: &'a Net,
    pub(super) prober: NodeAgent<'a>,
    pub(super) responder: NodeAgent<'a>,
    pub(super) probes: &'a [StreamProbe],
}

/// A path: a probe over one address family.
#[derive(Debug, Clone)]
pub(super) struct ProbedPath<'a> {
    pub(super) probe: &'a StreamProbe,
    pub(super) to: SocketAddr,
    pub(super) labels: [String; 2],
}

/// Minimum, default and maximum send buffer on the prober's host; the maximum holds two of the largest
/// messages.
pub(super) const SEND_BUFFER: &str = "4096 16384 131072";

pub(super) fn with_stream_testbed<T>(
    probes: &[StreamProbe],
    delay: u64,
    act: impl FnOnce(&StreamTestbed<'_>) -> T,
) -> T {
    let net = NetPlan::pair().build(seed());
    net.wire("a", "b").set_links(&Link::perfect(delay), &Link::perfect(delay));
    net.node("a").set_sysctl("ipv4/tcp_wmem", SEND_BUFFER);
    let allow = [net.v4("a").to_string(), net.v6("a").to_string()];
    let config = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": allow}});
    let responder = NodeAgent::start(net.node("b"), config, &[]);
    let addresses = [net.v4("b"), net.v6("b")];
    let peers = PEERS.iter().zip(addresses);
    let peers: Vec<Value> =
        peers.map(|(name, address)| json!({"name": name, "address": address.to_string()})).collect();
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": peers,
        "probes": probes.iter().map(StreamProbe::config).collect::<Vec<Value>>(),
    });
    let prober = NodeAgent::start(net.node("a"), config, &[]);
    act(&StreamTestbed { net: &net, prober, responder, probes })
}

impl<'a> StreamTestbed<'a> {
    pub(super) fn wire(&self) -> &'a Wire {
        self.net.wire("a", "b")
    }

    pub(super) fn paths(&self) -> Vec<ProbedPath<'a>> {
        let of = |probe: &'a StreamProbe| {
            PEERS.into_iter().zip([self.net.v4("b"), self.net.v6("b")]).map(
                move |(peer, address): (_, IpAddr)| {
                    let labels = [format!("probe=\"{}\"", probe.name), format!("peer=\"{peer}\"")];
                    ProbedPath { probe, to: (address, probe.protocol.port()).into(), labels }
                },
            )
        };
        self.probes.iter().flat_map(of).collect()
    }

    /// Waits until `more` further messages of each path are answered.
    pub(super) fn answers(&self, more: u64) {
        let paths = self.paths();
        let before = self.prober.page();
        let patience = 60 * Duration::from_secs(1);
        self.prober.page_within(patience, "answers on every path", |page| {
            paths.iter().all(|path| path.answered(page) >= path.answered(&before) + more)
        });
    }

    /// Sets both directions of the wire to this link.
    pub(super) fn set_links(&self, link: &Link) {
        self.wire().set_links(link, link);
    }

    /// Collects the outcome of each path. Must be called when links are unimpaired and the exported TCP
    /// statistics are up to date.
    pub(super) fn finish(&self) -> Vec<StreamOutcome<'a>> {
        self.paths().into_iter().map(|path| self.end(path)).collect()
    }

    pub(super) fn end(&self, path: ProbedPath<'a>) -> StreamOutcome<'a> {
        let begin = Instant::now();
        loop {
            let page = self.prober.page();
            // Read after the page, so that the log contains everything on the page.
            let mut connections = Connection::read(self.wire(), WireDirection::Forward, path.to);
            connections.retain(|connection| connection.tos >> 2 == path.probe.dscp);
            let outcome = StreamOutcome { path: path.clone(), page, connections };
            // TCP statistics are read once a second, and not after a connection has timed out.
            let is_up_to_date =
                outcome.connections.len() != 1 || outcome.retransmitted() == outcome.truly_retransmitted();
            if is_up_to_date || begin.elapsed() > DEADLINE {
                return outcome;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Compares the outcome of each path.
    pub(super) fn compare(&self, outcome: &[StreamOutcome<'_>]) -> Result<(), Inconclusive> {
        assert_eq!(self.prober.page().count("pathmeter_accounting_errors_total", &[]), 0);
        outcome.iter().try_for_each(|outcome| {
            outcome.path.check_stalls(&outcome.page)?;
            let differences = outcome.differences();
            assert!(
                differences.is_empty(),
                "LAB_SEED={}: {:?}\n{}\n--- prober\n{}\n{}\n--- responder\n{}",
                seed(),
                outcome.path,
                differences.join("\n"),
                outcome.page,
                self.prober.log(),
                self.responder.page()
            );
            eprintln!("{}", outcome.row());
            Ok(())
        })
    }
}

impl ProbedPath<'_> {
    pub(super) fn count(&self, page: &MetricsPage, name: &str, more: &[&str]) -> u64 {
        let labels: Vec<&str> = self.labels.iter().map(String::as_str).chain(more.iter().copied()).collect();
        page.count(&format!("pathmeter_echo_{name}"), &labels)
    }

    pub(super) fn answered(&self, page: &MetricsPage) -> u64 {
        self.count(page, "rtt_seconds_count", &[])
    }

    pub(super) fn seconds(&self, page: &MetricsPage, name: &str) -> f64 {
        let labels: Vec<&str> = self.labels.iter().map(String::as_str).collect();
        page.seconds(&format!("pathmeter_echo_{name}"), &labels)
    }

    /// Returns an error if so many slots went unsent that the machine must have paused.
    pub(super) fn check_stalls(&self, page: &MetricsPage) -> Result<(), Inconclusive> {
        let (unsent, sent) = (self.count(page, "unsent_total", &[]), self.count(page, "sent_total", &[]));
        if unsent > sent / UNSENT_ONE_OF {
            return Err(Inconclusive(format!(
                "{unsent} slots of {:?} went unsent, {sent} were sent",
                self.labels
            )));
        }
        Ok(())
    }
}
