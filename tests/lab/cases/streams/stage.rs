//! Two agents and what one of them measures of the other over connections.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use pathmeter_lab::connection::{Connection, Spoken};
use pathmeter_lab::{DEADLINE, Net, Page, Plan, Way, Wire};
use pathmeter_proto::sim::Link;
use pathmeter_proto::wire::websocket::MessageFormat;
use serde_json::{Value, json};

use super::ended::{Ended, UNSENT_ONE_OF};
use crate::agent::Agent;
use crate::play::{Inconclusive, seed};

/// What is measured: a probe of the configuration.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    pub(super) name: &'static str,
    pub(super) speaks: Speaks,
    pub(super) interval: Duration,
    pub(super) lost_after: Duration,
    /// Tells its connections from others.
    pub(super) dscp: u8,
}

/// Over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaks {
    /// Messages whose round trips the wire can tell.
    Messages(Spoken),
    /// Requests.
    Http,
}

pub(super) const TCP: Speaks = Speaks::Messages(Spoken::Tcp { bytes: 56 });
pub(super) const TEXT: Speaks =
    Speaks::Messages(Spoken::WebSocket { format: MessageFormat::Text, bytes: 96 });
pub(super) const BINARY: Speaks =
    Speaks::Messages(Spoken::WebSocket { format: MessageFormat::Binary, bytes: 200 });

/// A round trip above this is late.
pub(super) const LATE_AFTER: Duration = Duration::from_secs(1);

impl Speaks {
    /// Keys of a probe.
    pub(super) fn keys(self) -> Value {
        match self {
            Self::Messages(Spoken::Tcp { bytes }) => {
                json!({"protocol": "tcp", "size": format!("{bytes}B")})
            }
            Self::Messages(Spoken::WebSocket { format, bytes }) => {
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
            Self::Messages(Spoken::Tcp { .. }) => 9_863,
            Self::Messages(Spoken::WebSocket { .. }) | Self::Http => 9_862,
        }
    }
}

impl Probe {
    pub(super) fn new(name: &'static str, dscp: u8, speaks: Speaks) -> Self {
        Self { name, speaks, interval: Duration::from_millis(20), lost_after: Duration::from_secs(15), dscp }
    }

    pub(super) fn config(&self) -> Value {
        let mut keys = self.speaks.keys();
        keys["name"] = self.name.into();
        keys["kind"] = "echo".into();
        keys["interval"] = format!("{}ms", self.interval.as_millis()).into();
        keys["late_after"] = format!("{}ms", LATE_AFTER.as_millis()).into();
        keys["lost_after"] = format!("{}ms", self.lost_after.as_millis()).into();
        keys["dscp"] = self.dscp.into();
        // Connections that are only timed would be in the wire's log.
        keys["connect_interval"] = "off".into();
        keys
    }
}

/// The other host's names in the configuration: one for each of its addresses.
pub(super) const PEERS: [&str; 2] = ["b", "b-ipv6"];

/// Two hosts, a wire between them, and an agent on each. One of them measures the other over IPv4 and IPv6.
pub(super) struct Stage<'a> {
    pub(super) net: &'a Net,
    pub(super) prober: Agent<'a>,
    pub(super) responder: Agent<'a>,
    pub(super) probes: &'a [Probe],
}

/// A probe over one address family.
#[derive(Debug, Clone)]
pub(super) struct Path<'a> {
    pub(super) probe: &'a Probe,
    pub(super) to: SocketAddr,
    pub(super) labels: [String; 2],
}

/// What sockets of the prober's host may keep, at least, at first and at most: two of the largest messages.
pub(super) const SEND_BUFFER: &str = "4096 16384 131072";

pub(super) fn on_stage<T>(probes: &[Probe], delay: u64, act: impl FnOnce(&Stage<'_>) -> T) -> T {
    let net = Plan::pair().build(seed());
    net.wire("a", "b").become_like(&Link::perfect(delay), &Link::perfect(delay));
    net.node("a").set("ipv4/tcp_wmem", SEND_BUFFER);
    let allow = [net.v4("a").to_string(), net.v6("a").to_string()];
    let config = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": allow}});
    let responder = Agent::start(net.node("b"), config, &[]);
    let addresses = [net.v4("b"), net.v6("b")];
    let peers = PEERS.iter().zip(addresses);
    let peers: Vec<Value> =
        peers.map(|(name, address)| json!({"name": name, "address": address.to_string()})).collect();
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": peers,
        "probes": probes.iter().map(Probe::config).collect::<Vec<Value>>(),
    });
    let prober = Agent::start(net.node("a"), config, &[]);
    act(&Stage { net: &net, prober, responder, probes })
}

impl<'a> Stage<'a> {
    pub(super) fn wire(&self) -> &'a Wire {
        self.net.wire("a", "b")
    }

    pub(super) fn paths(&self) -> Vec<Path<'a>> {
        let of = |probe: &'a Probe| {
            PEERS.into_iter().zip([self.net.v4("b"), self.net.v6("b")]).map(
                move |(peer, address): (_, IpAddr)| {
                    let labels = [format!("probe=\"{}\"", probe.name), format!("peer=\"{peer}\"")];
                    Path { probe, to: (address, probe.speaks.port()).into(), labels }
                },
            )
        };
        self.probes.iter().flat_map(of).collect()
    }

    /// Waits until so many more messages of each path are answered.
    pub(super) fn answers(&self, more: u64) {
        let paths = self.paths();
        let before = self.prober.page();
        let patience = 60 * Duration::from_secs(1);
        self.prober.page_within(patience, "answers on every path", |page| {
            paths.iter().all(|path| path.answered(page) >= path.answered(&before) + more)
        });
    }

    /// Both directions become like this.
    pub(super) fn become_like(&self, link: &Link) {
        self.wire().become_like(link, link);
    }

    /// What came of each path. Links are harmless by then, and what was exported of what TCP says is up to date.
    pub(super) fn finish(&self) -> Vec<Ended<'a>> {
        self.paths().into_iter().map(|path| self.end(path)).collect()
    }

    pub(super) fn end(&self, path: Path<'a>) -> Ended<'a> {
        let begin = Instant::now();
        loop {
            let page = self.prober.page();
            // Behind the page: that knows nothing which the log does not.
            let mut connections = Connection::read(self.wire(), Way::Forward, path.to);
            connections.retain(|connection| connection.tos >> 2 == path.probe.dscp);
            let ended = Ended { path: path.clone(), page, connections };
            // TCP is asked once a second how it fares, and of a connection that was given up no more.
            let is_told = ended.connections.len() != 1 || ended.sent_again() == ended.truly_sent_again();
            if is_told || begin.elapsed() > DEADLINE {
                return ended;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Compares each path.
    pub(super) fn compare(&self, ended: &[Ended<'_>]) -> Result<(), Inconclusive> {
        assert_eq!(self.prober.page().count("pathmeter_accounting_errors_total", &[]), 0);
        ended.iter().try_for_each(|ended| {
            ended.path.stood_still(&ended.page)?;
            let differences = ended.differences();
            assert!(
                differences.is_empty(),
                "LAB_SEED={}: {:?}\n{}\n--- prober\n{}\n{}\n--- responder\n{}",
                seed(),
                ended.path,
                differences.join("\n"),
                ended.page,
                self.prober.log(),
                self.responder.page()
            );
            eprintln!("{}", ended.row());
            Ok(())
        })
    }
}

impl Path<'_> {
    pub(super) fn count(&self, page: &Page, name: &str, more: &[&str]) -> u64 {
        let labels: Vec<&str> = self.labels.iter().map(String::as_str).chain(more.iter().copied()).collect();
        page.count(&format!("pathmeter_echo_{name}"), &labels)
    }

    pub(super) fn answered(&self, page: &Page) -> u64 {
        self.count(page, "rtt_seconds_count", &[])
    }

    pub(super) fn seconds(&self, page: &Page, name: &str) -> f64 {
        let labels: Vec<&str> = self.labels.iter().map(String::as_str).collect();
        page.seconds(&format!("pathmeter_echo_{name}"), &labels)
    }

    /// Where a machine that stood still explains what went unsent, nothing is proved.
    pub(super) fn stood_still(&self, page: &Page) -> Result<(), Inconclusive> {
        let (unsent, sent) = (self.count(page, "unsent_total", &[]), self.count(page, "sent_total", &[]));
        if unsent > sent / UNSENT_ONE_OF {
            return Err(Inconclusive(format!(
                "{unsent} slots of {:?} went unsent, {sent} did not",
                self.labels
            )));
        }
        Ok(())
    }
}
