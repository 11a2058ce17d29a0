//! Configuration of trace probes.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::probe_budget::{ProbeLimits, TokenRate};
use pathmeter_proto::trace::ProbeProtocol;

use super::echo::Echo;
use super::echo::transport::Transport;
use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::{MappingReader, ValueReader};
use super::values::slow_packet_rate;
use super::{Kind, Listen, Probe, TRACE_METHODS, Target, TraceMethod};

/// The configuration of a trace probe, which finds the routes of another probe's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The name of the echo probe whose flows are traced.
    pub follows: String,
    /// The protocol and the parameters of that probe's flows.
    pub transport: Transport,
    /// Largest TTL.
    pub hops_max: u8,
    /// How a probe over TCP, WebSocket or HTTP is traced. `unprivileged`: SYN segments from another source
    /// port. `own_flow`: empty segments on the connection itself, which the peer discards. It needs
    /// CAP_NET_RAW and Linux 4.19. SYN segments are used without these, while there is no connection that has
    /// carried some messages, for 24 h after two connections stalled, and for all but 64 paths.
    pub method: TraceMethod,
    /// Whether every hop has series of its own.
    pub hop_metrics: bool,
}

impl Trace {
    /// The packets of its probes.
    #[must_use]
    pub fn probe_protocol(&self) -> ProbeProtocol {
        probe_protocol(&self.transport)
    }

    /// Number of flows that are traced.
    #[must_use]
    pub fn flows(&self) -> u8 {
        match &self.transport {
            Transport::Udp(udp) => udp.flows,
            Transport::Icmp(icmp) => icmp.flows,
            Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => 1,
        }
    }
}

/// The packets that take the same route as those of an echo probe.
fn probe_protocol(transport: &Transport) -> ProbeProtocol {
    match transport {
        Transport::Udp(_) => ProbeProtocol::Udp,
        Transport::Icmp(_) => ProbeProtocol::Icmp,
        Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => ProbeProtocol::Tcp,
    }
}

const PROTOCOLS: [(&str, ProbeProtocol); 3] =
    [("udp", ProbeProtocol::Udp), ("icmp", ProbeProtocol::Icmp), ("tcp", ProbeProtocol::Tcp)];

/// Protocols of echo probes that are traced over TCP.
const CONNECTIONS: [&str; 2] = ["websocket", "http"];

/// What applies to all traces. Routers limit the ICMP errors with which they answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceRules {
    /// Maximum probes per second to one IPv4 router, after a burst of five. Raise it only if all routers of
    /// the traced routes answer that fast: Linux answers each prober once per second by default
    /// (`net.ipv4.icmp_ratelimit`), and unanswered probes look like loss at a healthy hop.
    pub router_rate: TokenRate,
    /// Maximum probes per second to one IPv6 router, after a burst of five. Linux answers each prober ten
    /// times per second by default (`net.ipv6.icmp.ratelimit`).
    pub router_rate_ipv6: TokenRate,
    /// Maximum probes per second to all routers together, after a burst of one second. For traces of other
    /// agents, half as many replies are sent to routers.
    pub agent_rate: TokenRate,
    /// Whether the DSCP, the ECN field and the checksum that routers quote of a probe are read, which needs
    /// CAP_NET_RAW.
    pub quoted_headers: bool,
}

impl TraceRules {
    /// The limits for the probe budget of an agent.
    #[must_use]
    pub fn probe_limits(self) -> ProbeLimits {
        let TokenRate { spacing, burst } = self.agent_rate;
        ProbeLimits {
            router_v4: self.router_rate,
            router_v6: self.router_rate_ipv6,
            agent: self.agent_rate,
            others: TokenRate { spacing: spacing * 2, burst: (burst / 2).max(1) },
        }
    }
}

/// Rates in thousandths of a packet per second. Chosen: 10,000 paths behind one router, at the shortest
/// interval.
const ROUTER_RATE_ALLOWED: RangeInclusive<u64> = 100..=5_000_000;

/// Chosen: 10,000 paths of thirty hops, each traced every half a minute.
const AGENT_RATE_ALLOWED: RangeInclusive<u64> = 1_000..=10_000_000;

/// Four fifths of what Linux routers answer by default.
const ROUTER_RATE: u64 = 800;
const ROUTER_RATE_IPV6: u64 = 8_000;

/// Chosen: four traces of twelve hops per second.
const AGENT_RATE: u64 = 50_000;

/// Linux answers six probes at once.
const ROUTER_BURST: u32 = 5;

/// Reads the section `trace`.
pub(super) fn rules(section: &mut MappingReader<'_, '_>) -> Option<TraceRules> {
    let mut rate =
        |key, allowed, default| section.key(key, |value| slow_packet_rate(value, allowed)).or(default);
    let router = rate("router_rate", &ROUTER_RATE_ALLOWED, ROUTER_RATE);
    let router_ipv6 = rate("router_rate_ipv6", &ROUTER_RATE_ALLOWED, ROUTER_RATE_IPV6);
    let agent = rate("agent_rate", &AGENT_RATE_ALLOWED, AGENT_RATE);
    let quoted_headers = section.key("quoted_headers", ValueReader::boolean).or(false)?;
    let agent = agent?;
    Some(TraceRules {
        router_rate: probe_rate(router?, ROUTER_BURST),
        router_rate_ipv6: probe_rate(router_ipv6?, ROUTER_BURST),
        // The probes of one second.
        agent_rate: probe_rate(agent, u32::try_from(agent / 1_000).unwrap_or(u32::MAX)),
        quoted_headers,
    })
}

/// A rate in thousandths of a packet per second.
fn probe_rate(thousandths: u64, burst: u32) -> TokenRate {
    TokenRate { spacing: Duration::from_secs(1_000) / u32::try_from(thousandths).unwrap_or(u32::MAX), burst }
}

/// A shorter interval would exceed what routers answer by default on every route.
const INTERVAL_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(3600);

const INTERVAL: Duration = Duration::from_secs(30);

const HOPS_ALLOWED: RangeInclusive<i128> = 1..=64;

/// The default of traceroute.
const HOPS: u8 = 30;

impl KindConfig for Trace {
    fn name(&self) -> &'static str {
        "trace"
    }

    fn protocol(&self) -> &'static str {
        self.probe_protocol().as_str()
    }

    fn check_target(&self, target: &Target) -> Result<(), String> {
        self.transport.check_target(target)
    }

    fn follows(&self) -> Option<&str> {
        Some(&self.follows)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads the probe that a trace probe follows. Reports a problem if it cannot be followed.
pub(super) fn followed(
    section: &mut MappingReader<'_, '_>,
    probes: &[Probe],
) -> Option<(Box<dyn KindReader>, Probe)> {
    section.required("follows", |value: ValueReader<'_, '_>| {
        let name = value.text("the name of an echo probe")?;
        let Some(probe) = probes.iter().find(|probe| probe.name == name) else {
            let what = format!("no probe before this one is named {name}");
            return value.reject(what, "name an echo probe, and list it first");
        };
        let Some(echo) = probe.kind.downcast::<Echo>() else {
            return value.reject(format!("{name} sends no packets of its own"), "name an echo probe");
        };
        let reader = TraceReader { follows: name.to_owned(), transport: echo.transport.clone() };
        Some((Box::new(reader) as Box<dyn KindReader>, probe.clone()))
    })
}

struct TraceReader {
    follows: String,
    transport: Transport,
}

impl KindReader for TraceReader {
    fn interval_allowed(&self) -> RangeInclusive<Duration> {
        INTERVAL_ALLOWED
    }

    fn interval_default(&self) -> Duration {
        INTERVAL
    }

    fn dscp_default(&self) -> Dscp {
        Dscp::DEFAULT
    }

    fn check_target(&self, _: &DeclaredHost) -> Result<(), (String, String)> {
        Ok(())
    }

    fn read(&self, section: &mut MappingReader<'_, '_>, _: Option<&Listen>) -> Option<Kind> {
        let followed = probe_protocol(&self.transport);
        // Derived; named only to be sure of it.
        section.key("protocol", |value| {
            let text = value.text("udp or icmp or tcp")?;
            if !CONNECTIONS.contains(&text) && value.clone().one_of(&PROTOCOLS)? == followed {
                return Some(());
            }
            let follows = &self.follows;
            let what = match &self.transport {
                Transport::WebSocket(_) | Transport::Http(_) => {
                    format!("{follows} is traced over tcp, which carries its connections")
                }
                Transport::Udp(_) | Transport::Icmp(_) | Transport::Tcp(_) => {
                    format!("{follows} is traced over {}", followed.as_str())
                }
            };
            value.reject(what, "remove this key, or follow a probe over another protocol")
        });
        let hops_max = section.key("hops_max", |value| value.number(&HOPS_ALLOWED)).or(HOPS);
        let method = section.key("method", |value| {
            let method = value.clone().one_of(&TRACE_METHODS)?;
            if method == TraceMethod::OwnFlow && followed != ProbeProtocol::Tcp {
                let what =
                    format!("{} is traced over {} on its own flow already", self.follows, followed.as_str());
                return value.reject(what, "remove this key");
            }
            Some(method)
        });
        let method = method.or(TraceMethod::Unprivileged);
        let hop_metrics = section.key("hop_metrics", ValueReader::boolean).or(false);
        let (follows, transport) = (self.follows.clone(), self.transport.clone());
        Some(Kind::Trace(Trace {
            follows,
            transport,
            hops_max: hops_max?,
            method: method?,
            hop_metrics: hop_metrics?,
        }))
    }
}
