//! The series of paths over connections: how they are made, why they end, what TCP says about them.

use std::time::Duration;

use pathmeter_proto::time::nanos;

use super::block::Series;
use super::distribution::{Buckets, RTT_BOUNDS, SumAndCount};
use super::labels::{Labelled, Labels as _, labels};
use super::text::{CLOSE, Cell, Family, Suffix, Writer, counter, gauge, histogram, label, summary};

/// Why there is no connection, or no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConnectErrorKind {
    /// Nobody listens there.
    Refused,
    /// The network said that there is no way.
    Unreachable,
    /// It took too long: to connect, or until something came back.
    Timeout,
    /// It was reset.
    Reset,
    /// The other side closed it.
    Closed,
    /// The other side will not answer us.
    Denied,
    /// TLS could not be agreed on.
    Tls,
    /// The other side does not speak as it should.
    Protocol,
    /// Its name has no address any more.
    Unresolved,
    /// Our own host could not.
    Local,
}

labels!(ConnectErrorKind, "reason", {
    Refused => "refused",
    Unreachable => "unreachable",
    Timeout => "timeout",
    Reset => "reset",
    Closed => "closed",
    Denied => "denied",
    Tls => "tls",
    Protocol => "protocol",
    Unresolved => "unresolved",
    Local => "local",
});

/// What making a connection consists of besides TCP's own handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectStage {
    /// Looking up the name.
    Resolve,
    /// Agreeing on TLS.
    Tls,
    /// Our own greeting over TCP.
    Greeting,
    /// The upgrade to a WebSocket.
    WebSocket,
    /// From a first HTTP request to the head of its answer.
    FirstByte,
}

labels!(ConnectStage, "stage", {
    Resolve => "resolve",
    Tls => "tls",
    Greeting => "greeting",
    WebSocket => "websocket",
    FirstByte => "first_byte",
});

/// How an answer that came can still be the wrong one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnexpectedResponse {
    /// Another status than was expected.
    Status,
    /// A body without what was expected in it.
    Body,
}

labels!(UnexpectedResponse, "reason", {
    Status => "status",
    Body => "body",
});

/// What the kernel says about a TCP connection (TCP_INFO). Times in microseconds, as the kernel has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round trip.
    pub rtt: u64,
    /// Its mean deviation.
    pub rtt_variation: u64,
    /// Smallest round trip of the last minutes; 0: none yet.
    pub rtt_minimum: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Bytes sent again.
    pub bytes_retransmitted: u64,
    /// The last measured rate in bytes per second; 0: none yet.
    pub delivery_rate: u64,
    /// Time with data to send or unacknowledged.
    pub busy: u64,
    /// Of that, limited by the receiver's window.
    pub window_limited: u64,
    /// Of that, limited by our send buffer.
    pub buffer_limited: u64,
}

/// What one path over connections has seen.
#[derive(Debug, Default)]
pub struct StreamSeries {
    labels: String,
    connected: Cell,
    connects: Buckets<{ RTT_BOUNDS.len() + 1 }>,
    connect_failures: Labelled<ConnectErrorKind, 10>,
    stages: [SumAndCount; ConnectStage::ALL.len()],
    reconnects: Labelled<ConnectErrorKind, 10>,
    unexpected: Labelled<UnexpectedResponse, 2>,
    certificate_expiry: Cell,
    retransmits: Cell,
    bytes_retransmitted: Cell,
    rtt: Cell,
    rtt_variation: Cell,
    rtt_minimum: Cell,
    delivery_rate: Cell,
    busy: Cell,
    window_limited: Cell,
    buffer_limited: Cell,
}

impl StreamSeries {
    /// The series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// The connection that carries the messages stands.
    pub fn connected(&self) {
        self.connected.set(1);
    }

    /// The connection that carries the messages, or an attempt to make it, has ended.
    pub fn disconnected(&self, why: ConnectErrorKind) {
        self.connected.set(0);
        self.forget_tcp();
        self.reconnects.of(why).inc();
    }

    /// Another path goes on with these, maybe without TLS.
    pub fn begin_again(&self) {
        self.certificate_expiry.set(0);
    }

    /// There is no connection because none is wanted any more.
    pub fn put_away(&self) {
        self.connected.set(0);
        self.forget_tcp();
    }

    /// What TCP said of a connection that is gone says nothing of the next one.
    fn forget_tcp(&self) {
        for cell in [&self.rtt, &self.rtt_variation, &self.rtt_minimum, &self.delivery_rate] {
            cell.set(0);
        }
    }

    /// HTTP answers that were not the expected ones.
    #[must_use]
    pub fn unexpected_answers(&self) -> u64 {
        self.unexpected.total()
    }

    /// TCP's handshake of a fresh connection took this long.
    pub fn connects_took(&self, span: Duration) {
        self.connects.add(&RTT_BOUNDS, nanos(span));
    }

    /// A stage of a fresh connection took this long.
    pub fn stage_took(&self, stage: ConnectStage, span: Duration) {
        self.stages[stage.index()].add(span);
    }

    /// A fresh connection could not be made.
    pub fn connect_failed(&self, why: ConnectErrorKind) {
        self.connect_failures.of(why).inc();
    }

    /// An answer was not the expected one.
    pub fn unexpected(&self, what: UnexpectedResponse) {
        self.unexpected.of(what).inc();
    }

    /// When the certificate that the other side showed expires, in seconds since 1970.
    pub fn certificate_expires(&self, at: u64) {
        self.certificate_expiry.set(at);
    }

    /// TCP says `now` of the connection of which it said `before` earlier.
    pub fn tcp(&self, before: &TcpInfo, now: &TcpInfo) {
        for (cell, before, now) in [
            (&self.retransmits, before.retransmits, now.retransmits),
            (&self.bytes_retransmitted, before.bytes_retransmitted, now.bytes_retransmitted),
            (&self.busy, before.busy, now.busy),
            (&self.window_limited, before.window_limited, now.window_limited),
            (&self.buffer_limited, before.buffer_limited, now.buffer_limited),
        ] {
            cell.add(now.saturating_sub(before));
        }
        for (cell, now) in [
            (&self.rtt, now.rtt),
            (&self.rtt_variation, now.rtt_variation),
            (&self.rtt_minimum, now.rtt_minimum),
            (&self.delivery_rate, now.delivery_rate),
        ] {
            cell.set(now);
        }
    }
}

fn one(writer: &mut Writer<'_>, name: &str, series: &StreamSeries, cell: &Cell) {
    writer.count(name, Suffix::None, &series.labels, CLOSE, cell.get());
}

fn micros(writer: &mut Writer<'_>, name: &str, series: &StreamSeries, cell: &Cell) {
    writer.seconds(name, Suffix::None, &series.labels, CLOSE, cell.get() * 1_000);
}

impl Series for StreamSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 60;
}

/// In alphabetical order.
const FAMILIES: [Family<StreamSeries>; 16] = [
    histogram(
        "pathmeter_echo_connect_duration_seconds",
        "TCP handshakes of fresh connections, made only to measure them.",
        |w, name, s| s.connects.write(w, name, &s.labels, &RTT_BOUNDS, Writer::seconds),
    ),
    counter(
        "pathmeter_echo_connect_failures_total",
        "Fresh connections that could not be made, or not as far as to the first answer.",
        |w, name, s| s.connect_failures.write(w, name, &s.labels),
    ),
    gauge(
        "pathmeter_echo_connected",
        "Whether the connection that carries the messages stands.",
        |w, name, s| {
            one(w, name, s, &s.connected);
        },
    ),
    summary(
        "pathmeter_echo_handshake_duration_seconds",
        "What fresh connections took besides TCP's handshake, by stage.",
        |w, name, s| {
            for (mean, stage) in s.stages.iter().zip(ConnectStage::ALL) {
                mean.write(w, name, &s.labels, stage.rest());
            }
        },
    ),
    counter(
        "pathmeter_echo_reconnects_total",
        "Ends of the connection that carries the messages, and failed attempts to make it.",
        |w, name, s| s.reconnects.write(w, name, &s.labels),
    ),
    counter(
        "pathmeter_echo_tcp_busy_seconds_total",
        "Time with data to send or unacknowledged.",
        |w, name, s| micros(w, name, s, &s.busy),
    ),
    gauge(
        "pathmeter_echo_tcp_delivery_rate_bytes_per_second",
        "The kernel's last measurement of how fast data was delivered; 0: none yet.",
        |w, name, s| one(w, name, s, &s.delivery_rate),
    ),
    counter(
        "pathmeter_echo_tcp_receive_window_limited_seconds_total",
        "Of the busy time, how long the receiver's window kept us from sending.",
        |w, name, s| micros(w, name, s, &s.window_limited),
    ),
    counter(
        "pathmeter_echo_tcp_retransmitted_bytes_total",
        "Bytes that the kernel sent again.",
        |w, name, s| one(w, name, s, &s.bytes_retransmitted),
    ),
    counter("pathmeter_echo_tcp_retransmits_total", "Segments that the kernel sent again.", |w, name, s| {
        one(w, name, s, &s.retransmits);
    }),
    gauge(
        "pathmeter_echo_tcp_rtt_minimum_seconds",
        "Smallest round trip that the kernel saw in the last minutes; 0: none yet.",
        |w, name, s| micros(w, name, s, &s.rtt_minimum),
    ),
    gauge(
        "pathmeter_echo_tcp_rtt_variation_seconds",
        "Mean deviation of the kernel's round trips (RTTVAR, RFC 6298).",
        |w, name, s| micros(w, name, s, &s.rtt_variation),
    ),
    counter(
        "pathmeter_echo_tcp_send_buffer_limited_seconds_total",
        "Of the busy time, how long our send buffer kept us from sending.",
        |w, name, s| micros(w, name, s, &s.buffer_limited),
    ),
    gauge(
        "pathmeter_echo_tcp_srtt_seconds",
        "The kernel's smoothed round trip (SRTT, RFC 6298); 0: none yet.",
        |w, name, s| micros(w, name, s, &s.rtt),
    ),
    counter(
        "pathmeter_echo_unexpected_total",
        "HTTP answers with another status or body than was expected; they count as answered.",
        |w, name, s| s.unexpected.write(w, name, &s.labels),
    ),
    gauge(
        "pathmeter_tls_certificate_expiry_timestamp_seconds",
        "When the certificate of the other side expires. Absent without TLS.",
        |w, name, s| {
            if s.certificate_expiry.get() > 0 {
                one(w, name, s, &s.certificate_expiry);
            }
        },
    ),
];
