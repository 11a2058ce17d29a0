//! Route tracing: which routers a flow passes, how fast they answer, and when the route changes.
//!
//! [`Tracer`] sends STAMP requests with a limited TTL on the 5-tuples of an echo path, so that they take the
//! route of the measured datagrams, in sessions of their own, so that the records and counts of the echoes
//! do not change. The router at which a TTL ends answers with an ICMP error, whose quoted bytes identify the
//! probe. For the way back it asks the responder for replies with a limited TTL; routers answer the
//! responder, which passes their answers on ([`ReverseTrace`](crate::wire::ReverseTrace)).
//!
//! [`Enumerator`] finds the other equal-cost paths to the same responder, once, on demand.
//!
//! [`OwnFlowTracer`] traces an established TCP connection, once. [`ConnectionProbes`] sends the probes of a
//! tracer on the connection of the echoes.
//!
//! Traces are bursts, at the start, on demand and after a [`Trigger`]; in between every hop is probed once
//! per interval. All tracers of an agent share a [`ProbeBudget`], because routers limit their answers.

mod burst;
mod echo_history;
mod enumeration;
mod enumerator;
mod extensions;
mod flow;
mod hop;
mod own_flow;
mod probe_match;
mod reachability;
mod rejection;
mod reverse;
mod route;
mod tracer;
mod ttl_clamp;
mod watch;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use echo_history::EchoSummary;
pub use enumeration::{
    Completeness, EnumeratedHop, EnumeratedRouter, Enumeration, EnumerationEnd, EnumerationLimit,
    EnumerationStep, EqualCostPaths, HopProbes, Link, PathProbe, Reached,
};
pub use enumerator::{Enumerated, EnumerationReport, Enumerator};
pub use extensions::{AnswerExtensions, Interface};
pub use hop::{HopState, Responder};
pub use own_flow::{
    ConnectionEnd, ConnectionProbes, Delivered, FlowChange, FlowPosition, OwnFlowRefusal, OwnFlowSpec,
    OwnFlowStep, OwnFlowTracer, ProbeAnswer, ProbeStep,
};
pub use reachability::ReachabilityChange;
pub use rejection::{Rejection, RejectionReason};
pub use route::{CONFIRMATIONS, HopRouter, Route, RouteId, RouteUpdate};
pub use tracer::Tracer;
pub use ttl_clamp::{CLAMPED_FOR, TtlRewriting};
pub use watch::{EchoWatch, Finding};

use crate::dscp::Dscp;
use crate::echo::Quirks;
use crate::key::Keys;
use crate::machine::NotSent;
use crate::probe_budget::{Deferral, ProbeBudget};
use crate::time::Timestamp;

/// The TTL of probes that are not limited: they reach the destination.
pub const DESTINATION: u8 = crate::machine::SENT_TTL;

/// The packets of probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeProtocol {
    /// STAMP requests over UDP. Replies tell how many routers the request passed.
    Udp,
    /// ICMP echo requests. The number of routers is searched for.
    Icmp,
    /// UDP datagrams to a port that is not in use: the destination answers with an ICMP error. The
    /// number of routers is searched for.
    ClosedPort,
    /// TCP segments with SYN. The number of routers is searched for, with one segment at a time, because all
    /// segments of a flow have the same ports.
    Tcp,
}

impl ProbeProtocol {
    /// The protocol as configuration, labels and JSON show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp | Self::ClosedPort => "udp",
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
        }
    }

    /// Whether the number of routers is searched for.
    const fn is_searching(self) -> bool {
        match self {
            Self::Udp => false,
            Self::Icmp | Self::ClosedPort | Self::Tcp => true,
        }
    }
}

/// Parameters of a tracer.
#[derive(Debug, Clone)]
pub struct TraceSpec {
    /// The packets of its probes.
    pub protocol: ProbeProtocol,
    /// Address of the responder. The port is not used for ICMP.
    pub to: SocketAddr,
    /// One session identifier per flow, different from those of the echoes.
    pub ssids: Vec<u16>,
    /// Time in which every hop of a known route is probed once.
    pub interval: Duration,
    /// Largest TTL.
    pub hops_max: u8,
    /// How long to wait for each answer; `None`: as long as the RTT suggests. Only for protocols that search
    /// for the number of routers.
    pub answer_wait: Option<Duration>,
    /// Class of service, the same as of the echoes.
    pub dscp: Dscp,
    /// Keys of authenticated mode; `None`: open mode.
    pub keys: Option<Arc<Keys>>,
    /// What the responder deviates in; `None`: it is a pathmeter agent.
    pub quirks: Option<Quirks>,
    /// Whether the driver delivers the kernel's transmit timestamps.
    pub tx_timestamps: bool,
    /// Whether to trace the way back too, if the responder supports it.
    pub traces_reverse: bool,
    /// Whether a hop is left out if its router would not answer at once, instead of probed later. Other
    /// tracers then do not wait longer.
    pub skips_busy_routers: bool,
    /// By flow, since when the destination has not answered, as an earlier tracer has reported; `None`: it
    /// answers, or nothing was reported. Flows that are missing are as `None`.
    pub missed_since: Vec<Option<Timestamp>>,
    /// The limits that all tracers of the agent share.
    pub budget: Arc<Mutex<ProbeBudget>>,
    /// Determines phases, orders and session numbers.
    pub seed: u64,
}

/// The direction of a traced route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the responder.
    Forward,
    /// From the responder back.
    Reverse,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Self; 2] = [Self::Forward, Self::Reverse];

    /// The direction as labels and JSON show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reverse => "reverse",
        }
    }
}

/// Why a trace was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Trigger {
    /// The tracer started.
    Start,
    /// The interval has passed. Where the number of routers is known, the probes of such a trace are spread
    /// over the interval.
    Interval,
    /// The number of routers has changed.
    Length,
    /// Another router answered at a known hop.
    Router,
    /// Several losses in a row.
    Loss,
    /// The level of the RTT has changed.
    Rtt,
    /// The path MTU has changed.
    Mtu,
    /// The host's own routes have changed.
    LocalRoute,
    /// The source port of the flow's probes has changed.
    Connection,
    /// The destination, which is an agent, has reported that another of its routes has changed.
    Peer,
    /// The destination, which has answered before, did not answer the trace before.
    Unreached,
    /// A user requested it.
    Request,
}

impl Trigger {
    /// The trigger as events and JSON show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Interval => "interval",
            Self::Length => "length",
            Self::Router => "router",
            Self::Loss => "loss",
            Self::Rtt => "rtt",
            Self::Mtu => "mtu",
            Self::LocalRoute => "local_route",
            Self::Connection => "connection",
            Self::Peer => "peer",
            Self::Unreached => "unreached",
            Self::Request => "request",
        }
    }
}

/// What a tracer reports of one direction.
#[derive(Debug, Clone, PartialEq)]
pub struct DirectedReport {
    /// The direction.
    pub direction: Direction,
    /// The report.
    pub report: TraceReport,
}

/// What a tracer reports.
#[derive(Debug, Clone, PartialEq)]
pub enum TraceReport {
    /// A probe left the host.
    Sent {
        /// Its TTL.
        ttl: u8,
    },
    /// A probe was answered.
    Answered {
        /// Its flow.
        flow: u8,
        /// Its TTL.
        ttl: u8,
        /// Which router answered, or the destination, and after which time.
        answer: Answer,
        /// Whether it was the destination.
        is_destination: bool,
    },
    /// A probe was rejected on the way. It counts as unanswered later.
    Rejected {
        /// Its flow.
        flow: u8,
        /// The rejection, with the TTL of the probe.
        rejection: Rejection,
    },
    /// A probe was not answered within [`ANSWER_AGE_MAX`].
    Unanswered {
        /// Its TTL.
        ttl: u8,
    },
    /// A probe became undecidable: the host was suspended, or the tracer stopped.
    Withdrawn,
    /// A probe could not be sent.
    SendError(NotSent),
    /// A probe had to wait.
    Deferred(Deferral),
    /// A reply or ICMP error that belongs to no probe.
    Unmatched,
    /// A trace is complete.
    Traced(Box<Trace>),
    /// A flow loses much more than the others.
    LossyFlow {
        /// The flow.
        flow: u8,
        /// Its latest echoes.
        echoes: EchoSummary,
        /// The first TTL at which its route to the destination has another router than each flow that is not
        /// lossy; `None` if there is none, or it is not known.
        forward_hop: Option<u8>,
        /// The same for the route back.
        reverse_hop: Option<u8>,
    },
    /// The route of a flow has changed, or is balanced.
    Route {
        /// The flow.
        flow: u8,
        /// What has changed.
        update: Box<RouteUpdate>,
        /// What led to the trace that showed it.
        trigger: Trigger,
        /// When it was first observed.
        since: Timestamp,
    },
    /// The destination of a flow no longer answers, or answers again. Only in forward direction.
    Reachability(Box<ReachabilityChange>),
    /// A device on the way of a flow rewrites TTLs. For [`CLAMPED_FOR`] no limited probes are sent on it.
    TtlClamped {
        /// The flow.
        flow: u8,
        /// How.
        rewriting: TtlRewriting,
        /// What led to the trace that showed it.
        trigger: Trigger,
    },
}

/// A complete trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The flow.
    pub flow: u8,
    /// Why it was made.
    pub trigger: Trigger,
    /// When it began.
    pub began: Timestamp,
    /// Time until the last answer, or until the last wait for one ended.
    pub duration: Duration,
    /// Whether all probes were sent at once, and not spread over the interval.
    pub is_burst: bool,
    /// RTT of the destination; `None` if it did not answer.
    pub rtt: Option<Duration>,
    /// Number of routers up to the destination; `None` if it is not known.
    pub routers: Option<u8>,
    /// The hops in the order of their TTL, without those behind the last one that answered, if the
    /// destination did not answer.
    pub hops: Vec<Hop>,
    /// The route of the flow.
    pub route: Option<RouteId>,
    /// The TTL from which on probes are lost up to the destination; `None` if the destination loses none.
    pub first_lossy_hop: Option<u8>,
    /// Whether a device on the way rewrites TTLs. Then hops and the number of routers are not known.
    pub is_ttl_clamped: bool,
    /// The nearest router, or the destination's host, that rejected a probe, or the latest one before if the
    /// destination did not answer; `None` if none was rejected, and always on the way back. Where the number
    /// of routers is searched for, a rejection by the destination is its answer.
    pub rejection: Option<Rejection>,
}

/// A hop of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Its TTL.
    pub ttl: u8,
    /// What the answers mean.
    pub state: HopState,
    /// Probes of this trace.
    pub sent: u16,
    /// Answers of this trace.
    pub answers: Vec<Answer>,
    /// The last known responder; `None` if there never was an answer.
    pub responder: Option<Responder>,
}

/// An answer to a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Address of the router, or of the destination.
    pub router: IpAddr,
    /// Time from the probe to the answer.
    pub rtt: Duration,
    /// What the router attached; `None` if nothing, and always on the way back: the responder passes on only
    /// the address and the RTT.
    pub extensions: Option<Arc<AnswerExtensions>>,
}

impl Answer {
    /// An answer to which nothing is attached.
    #[must_use]
    pub const fn new(router: IpAddr, rtt: Duration) -> Self {
        Self { router, rtt, extensions: None }
    }
}

/// A probe without an answer after this time is unanswered. Answers that come later than the trace waits are
/// added until then. Chosen: 5 s, longer than queues delay packets.
pub const ANSWER_AGE_MAX: Duration = Duration::from_secs(5);

/// Minimum time between two traces of a flow, except on request.
pub const TRACE_GAP_MIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod searching_tests;
#[cfg(test)]
mod tests;
