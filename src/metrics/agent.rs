//! The series of the agent itself: its loops and its responder.

use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Refusal;
use pathmeter_proto::time::nanos;

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{CLOSE, Cell, Family, INFINITY, Suffix, Writer, counter, gauge, histogram, label};

/// What a datagram loop says about itself.
#[derive(Debug, Default)]
pub struct LoopSeries {
    labels: String,
    /// Turns of the loop; the watchdog looks whether it moves.
    pub progress: Cell,
    /// Sleeps that ended.
    pub wakeups: Cell,
    /// How much later than asked the loop woke.
    pub lag: WakeupLag,
    /// Within which sends leave together, in nanoseconds.
    pub tick: Cell,
    /// Datagrams that left and have no verdict.
    pub outstanding: Cell,
    /// Datagrams that the kernel dropped at our sockets.
    pub rx_dropped: Cell,
    /// Steps of the wall clock that were noticed.
    pub clock_steps: Cell,
    /// Suspends of the host that were noticed.
    pub suspends: Cell,
    /// Paths whose counts did not add up when they were looked at.
    pub accounting_errors: Cell,
    /// Datagrams longer than we read.
    pub oversized: Cell,
    /// Datagrams that belong to no path.
    pub unrouted: Cell,
    /// Events that the daemon was too slow for.
    pub events_dropped: Cell,
}

/// How late the loop woke, as a histogram.
#[derive(Debug, Default)]
pub struct WakeupLag {
    counts: [Cell; LAG_BOUNDS.len() + 1],
    sum: Cell,
}

/// Upper bounds in nanoseconds: from a good timer to a host that is out of processors.
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
    /// Takes one wake-up.
    pub fn observe(&self, late: Duration) {
        let late = nanos(late);
        let bucket = LAG_BOUNDS.partition_point(|(bound, _)| *bound < late);
        self.counts[bucket].inc();
        self.sum.add(late);
    }
}

impl LoopSeries {
    /// The series of the loop called `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { labels: label("loop", name), ..Self::default() }
    }
}

/// What the responder counts.
#[derive(Debug, Default)]
pub struct ResponderSeries {
    /// Datagrams that came.
    pub requests: Cell,
    /// Datagrams that were answered.
    pub replies: Cell,
    /// Answers that the kernel did not take.
    pub reply_errors: Cell,
    refused: Labelled<Refusal, 7>,
    /// Different sources that were answered in the last half to whole minute.
    pub peers_seen: Cell,
    /// Datagrams on the agent port that were no believable goodbye.
    pub goodbyes_refused: Arc<Cell>,
}

impl ResponderSeries {
    /// A datagram got no answer.
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

/// Why a connection to the agent port was refused, or ended otherwise than by the other side's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalOrEnd {
    /// The source is not listed and did not prove a key.
    Unlisted,
    /// By a key that is not valid here.
    Unauthentic,
    /// There was no room.
    Full,
    /// It did not greet in time.
    Silent,
    /// It does not speak our protocol, or stopped in the middle of a message.
    Malformed,
    /// It did not take its replies.
    Stalled,
    /// The connection broke.
    ConnectErrorKind,
}

labels!(RefusalOrEnd, "reason", {
    Unlisted => "unlisted",
    Unauthentic => "auth",
    Full => "full",
    Silent => "silent",
    Malformed => "malformed",
    Stalled => "stalled",
    ConnectErrorKind => "broken",
});

/// What the responder on the agent port counts.
#[derive(Debug, Default)]
pub struct StreamResponderSeries {
    /// Connections that are open.
    pub connections: Cell,
    /// Messages that were answered.
    pub messages: Cell,
    /// Times that accepting a connection failed.
    pub accept_errors: Cell,
    unanswered: Labelled<RefusalOrEnd, 7>,
}

impl StreamResponderSeries {
    /// A connection was refused, or ended badly.
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
        "Paths found, about once a second, whose sent datagrams are not their verdicts plus those in flight. Must stay 0.",
        |w, name, s| one(w, name, s, &s.accounting_errors),
    ),
    counter(
        "pathmeter_clock_steps_total",
        "Steps of the wall clock that were noticed and corrected for.",
        |w, name, s| one(w, name, s, &s.clock_steps),
    ),
    counter(
        "pathmeter_events_dropped_total",
        "Events that the daemon was too slow to take. Counts are not affected.",
        |w, name, s| one(w, name, s, &s.events_dropped),
    ),
    counter(
        "pathmeter_host_suspends_total",
        "Suspends of the host that were noticed; what was in flight was withdrawn.",
        |w, name, s| one(w, name, s, &s.suspends),
    ),
    histogram(
        "pathmeter_loop_lag_seconds",
        "How much later than asked the loop woke. With kernel stamps it is not part of any round trip.",
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
        "Datagrams of all paths that left and have no verdict.",
        |w, name, s| one(w, name, s, &s.outstanding),
    ),
    gauge(
        "pathmeter_loop_tick_seconds",
        "Sends that are due within this leave together. Grows with the load, at most 0.005.",
        |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, s.tick.get()),
    ),
    counter("pathmeter_loop_wakeups_total", "Sleeps of the loop that ended.", |w, name, s| {
        one(w, name, s, &s.wakeups)
    }),
    counter(
        "pathmeter_socket_oversized_total",
        "Datagrams that were longer than we read, and thrown away.",
        |w, name, s| one(w, name, s, &s.oversized),
    ),
    counter(
        "pathmeter_socket_rx_dropped_total",
        "Datagrams that the kernel dropped at our sockets because we did not read in time.",
        |w, name, s| one(w, name, s, &s.rx_dropped),
    ),
    counter("pathmeter_socket_unrouted_total", "Datagrams that belong to no path.", |w, name, s| {
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
        "pathmeter_goodbyes_refused_total",
        "Datagrams on the agent port that were no believable goodbye.",
        |w, name, s| w.plain(name, s.goodbyes_refused.get()),
    ),
    gauge(
        "pathmeter_responder_peers_seen",
        "Different sources that were answered in the last half to whole minute: who probes us.",
        |w, name, s| w.plain(name, s.peers_seen.get()),
    ),
    counter("pathmeter_responder_rejected_total", "Datagrams that got no answer.", |w, name, s| {
        s.refused.write(w, name, STAMP);
    }),
    counter("pathmeter_responder_replies_total", "Datagrams that were answered.", |w, name, s| {
        w.count(name, Suffix::None, STAMP, CLOSE, s.replies.get())
    }),
    counter("pathmeter_responder_reply_errors_total", "Answers that our host did not send.", |w, name, s| {
        w.count(name, Suffix::None, STAMP, CLOSE, s.reply_errors.get())
    }),
    counter("pathmeter_responder_requests_total", "Datagrams that came to be answered.", |w, name, s| {
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
        "Times that accepting a connection failed.",
        |w, name, s| w.count(name, Suffix::None, TCP, CLOSE, s.accept_errors.get()),
    ),
    gauge("pathmeter_responder_connections", "Connections that are open.", |w, name, s| {
        w.count(name, Suffix::None, TCP, CLOSE, s.connections.get());
    }),
    counter(
        "pathmeter_responder_connections_refused_total",
        "Connections that were refused, or ended otherwise than by the other side's wish.",
        |w, name, s| s.unanswered.write(w, name, TCP),
    ),
    counter("pathmeter_responder_messages_total", "Messages that were answered.", |w, name, s| {
        w.count(name, Suffix::None, TCP, CLOSE, s.messages.get());
    }),
];
