//! Series of the agent itself: its datagram loops and its responders.

use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Refusal;
use pathmeter_proto::time::nanos;

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{CLOSE, Cell, Family, INFINITY, Suffix, Writer, counter, gauge, histogram, label};

/// Metrics of one datagram loop. Written by the loop's thread, read by scrapes.
#[derive(Debug, Default)]
pub struct LoopSeries {
    labels: String,
    /// Iterations of the loop. The watchdog checks that it increases.
    pub progress: Cell,
    /// Number of times the loop woke up.
    pub wakeups: Cell,
    /// Delay between the requested and the actual wake-up time.
    pub lag: WakeupLag,
    /// Sends that are due within this time are sent together, in nanoseconds.
    pub tick: Cell,
    /// Datagrams sent that have no verdict yet.
    pub outstanding: Cell,
    /// Datagrams that the kernel dropped at this loop's sockets.
    pub rx_dropped: Cell,
    /// Detected steps of the wall clock.
    pub clock_steps: Cell,
    /// Detected suspends of the host.
    pub suspends: Cell,
    /// Paths whose counters were inconsistent when checked.
    pub accounting_errors: Cell,
    /// Datagrams longer than the receive buffer.
    pub oversized: Cell,
    /// Received datagrams that match no path.
    pub unrouted: Cell,
    /// Events dropped because the daemon did not read them in time.
    pub events_dropped: Cell,
}

/// Histogram of wake-up delays.
#[derive(Debug, Default)]
pub struct WakeupLag {
    counts: [Cell; LAG_BOUNDS.len() + 1],
    sum: Cell,
}

/// Upper bounds in nanoseconds: from an accurate timer to a host whose CPUs are exhausted.
const LAG_BOUNDS: [(u64, &str); 9] = [
    (20_000, r#",le="2e-05"} "#),
    (50_000, r#",le="5e-05"} "#),
    (100_000, r#",le="0.0001"} "#),
    (200_000, r#",le="0.0002"} "#),
    (500_000, r#",le="0.0005"} "#),
    (1_000_000, r#",le="0.001"} "#),
    (10_000_000, r#",le="0.01"} "#),
    (100_000_000, r#",le="0.1"} "#),
    (1_000_000_000, r#",le="1.0"} "#),
];

impl WakeupLag {
    /// Records one wake-up that was `late` by this much.
    pub fn observe(&self, late: Duration) {
        let late = nanos(late);
        let bucket = LAG_BOUNDS.partition_point(|(bound, _)| *bound < late);
        self.counts[bucket].inc();
        self.sum.add(late);
    }
}

impl LoopSeries {
    /// Returns the series of the loop `name`, all zero.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { labels: label("loop", name), ..Self::default() }
    }
}

/// Metrics of the STAMP responder.
#[derive(Debug, Default)]
pub struct ResponderSeries {
    /// Datagrams received.
    pub requests: Cell,
    /// Replies sent.
    pub replies: Cell,
    /// Replies that the kernel did not send.
    pub reply_errors: Cell,
    refused: Labelled<Refusal, 7>,
    /// Number of distinct sources answered in the last 30 to 60 s.
    pub peers_seen: Cell,
    /// Datagrams rejected on the agent port: unknown type, malformed or not authentic.
    pub agent_port_rejected: Arc<Cell>,
}

impl ResponderSeries {
    /// Counts a request that was not answered.
    pub fn refused(&self, why: Refusal) {
        self.refused.of(why).inc();
    }
}

labels!(Refusal, "reason", {
    Unlisted => "unlisted",
    Unauthentic => "auth",
    SourceRate => "source_rate",
    TotalRate => "total_rate",
    Malformed => "malformed",
    Reflection => "reflection",
    Replay => "replay",
});

/// Why a connection to the agent port was refused, or was closed other than by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalOrEnd {
    /// The source is not listed and did not prove that it has a key.
    Unlisted,
    /// The client used a key that is not valid here.
    Unauthentic,
    /// The connection limit was reached.
    Full,
    /// The client sent no greeting in time.
    Silent,
    /// The client does not speak the protocol, or stopped in the middle of a message.
    Malformed,
    /// The client did not read its replies.
    Stalled,
    /// The connection broke.
    Broken,
}

labels!(RefusalOrEnd, "reason", {
    Unlisted => "unlisted",
    Unauthentic => "auth",
    Full => "full",
    Silent => "silent",
    Malformed => "malformed",
    Stalled => "stalled",
    Broken => "broken",
});

/// Metrics of the responder on the agent's TCP port.
#[derive(Debug, Default)]
pub struct StreamResponderSeries {
    /// Open connections.
    pub connections: Cell,
    /// Messages answered.
    pub messages: Cell,
    /// Errors while accepting connections.
    pub accept_errors: Cell,
    unanswered: Labelled<RefusalOrEnd, 7>,
}

impl StreamResponderSeries {
    /// Counts a connection that was refused or closed abnormally.
    pub fn unanswered(&self, why: RefusalOrEnd) {
        self.unanswered.of(why).inc();
    }
}

fn one(writer: &mut Writer<'_>, name: &str, series: &LoopSeries, cell: &Cell) {
    writer.count(name, Suffix::None, &series.labels, CLOSE, cell.get());
}

impl Series for LoopSeries {
    const FAMILIES: &'static [Family<Self>] = &LOOP_FAMILIES;
    const LINES: usize = 22;
}

/// In alphabetical order.
const LOOP_FAMILIES: [Family<LoopSeries>; 11] = [
    counter(
        "pathmeter_accounting_errors_total",
        "Inconsistent paths found by checks once a second: sent is not verdicts plus in flight. Must stay 0.",
        |w, name, s| one(w, name, s, &s.accounting_errors),
    ),
    counter(
        "pathmeter_clock_steps_total",
        "Detected steps of the wall clock. Measurements are corrected for them.",
        |w, name, s| one(w, name, s, &s.clock_steps),
    ),
    counter(
        "pathmeter_events_dropped_total",
        "Events dropped because the daemon did not read them in time. Counters are not affected.",
        |w, name, s| one(w, name, s, &s.events_dropped),
    ),
    counter(
        "pathmeter_host_suspends_total",
        "Detected suspends of the host. Datagrams in flight were withdrawn.",
        |w, name, s| one(w, name, s, &s.suspends),
    ),
    histogram(
        "pathmeter_loop_lag_seconds",
        "Delay of the loop's wake-ups. With kernel timestamps it is not part of any RTT.",
        |w, name, s| {
            let mut total = 0;
            for (cell, (_, bound)) in s.lag.counts.iter().zip(&LAG_BOUNDS) {
                total += cell.get();
                w.count(name, Suffix::Bucket, &s.labels, bound, total);
            }
            total += s.lag.counts[LAG_BOUNDS.len()].get();
            w.count(name, Suffix::Bucket, &s.labels, INFINITY, total);
            w.seconds(name, Suffix::Sum, &s.labels, CLOSE, s.lag.sum.get());
            w.count(name, Suffix::Count, &s.labels, CLOSE, total);
        },
    ),
    gauge(
        "pathmeter_loop_outstanding",
        "Datagrams sent on all paths that have no verdict yet.",
        |w, name, s| one(w, name, s, &s.outstanding),
    ),
    gauge(
        "pathmeter_loop_tick_seconds",
        "Sends that are due within this time are sent together. Grows with the load, up to 0.005.",
        |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, s.tick.get()),
    ),
    counter("pathmeter_loop_wakeups_total", "Wake-ups of the loop.", |w, name, s| {
        one(w, name, s, &s.wakeups)
    }),
    counter(
        "pathmeter_socket_oversized_total",
        "Received datagrams discarded because they were longer than the receive buffer.",
        |w, name, s| one(w, name, s, &s.oversized),
    ),
    counter(
        "pathmeter_socket_rx_dropped_total",
        "Received datagrams that the kernel dropped because the agent did not read its socket in time.",
        |w, name, s| one(w, name, s, &s.rx_dropped),
    ),
    counter("pathmeter_socket_unrouted_total", "Received datagrams that match no path.", |w, name, s| {
        one(w, name, s, &s.unrouted)
    }),
];

const STAMP: &str = r#"protocol="stamp""#;

impl Series for ResponderSeries {
    const FAMILIES: &'static [Family<Self>] = &RESPONDER_FAMILIES;
    const LINES: usize = 12;
}

/// In alphabetical order.
const RESPONDER_FAMILIES: [Family<ResponderSeries>; 6] = [
    counter(
        "pathmeter_agent_port_rejected_total",
        "Datagrams rejected on the agent port: unknown type, malformed or not authentic.",
        |w, name, s| w.plain(name, s.agent_port_rejected.get()),
    ),
    gauge(
        "pathmeter_responder_peers_seen",
        "Distinct sources answered in the last 30 to 60 s: the hosts that probe this agent.",
        |w, name, s| w.plain(name, s.peers_seen.get()),
    ),
    counter("pathmeter_responder_rejected_total", "Requests not answered, by reason.", |w, name, s| {
        s.refused.write(w, name, STAMP);
    }),
    counter("pathmeter_responder_replies_total", "Requests answered.", |w, name, s| {
        w.count(name, Suffix::None, STAMP, CLOSE, s.replies.get())
    }),
    counter(
        "pathmeter_responder_reply_errors_total",
        "Replies that this host could not send.",
        |w, name, s| w.count(name, Suffix::None, STAMP, CLOSE, s.reply_errors.get()),
    ),
    counter("pathmeter_responder_requests_total", "Requests received.", |w, name, s| {
        w.count(name, Suffix::None, STAMP, CLOSE, s.requests.get())
    }),
];

const TCP: &str = r#"protocol="tcp""#;

impl Series for StreamResponderSeries {
    const FAMILIES: &'static [Family<Self>] = &STREAM_RESPONDER_FAMILIES;
    const LINES: usize = 10;
}

/// In alphabetical order.
const STREAM_RESPONDER_FAMILIES: [Family<StreamResponderSeries>; 4] = [
    counter(
        "pathmeter_responder_accept_errors_total",
        "Errors while accepting connections.",
        |w, name, s| w.count(name, Suffix::None, TCP, CLOSE, s.accept_errors.get()),
    ),
    gauge("pathmeter_responder_connections", "Open connections.", |w, name, s| {
        w.count(name, Suffix::None, TCP, CLOSE, s.connections.get());
    }),
    counter(
        "pathmeter_responder_connections_refused_total",
        "Connections refused, or closed other than by the client, by reason.",
        |w, name, s| s.unanswered.write(w, name, TCP),
    ),
    counter("pathmeter_responder_messages_total", "Messages answered.", |w, name, s| {
        w.count(name, Suffix::None, TCP, CLOSE, s.messages.get());
    }),
];
