//! Series of paths over connections: connection setup, the reasons why connections end, and TCP statistics.

use std::time::Duration;

use pathmeter_proto::time::nanos;

use super::block::Series;
use super::distribution::{Buckets, RTT_BOUNDS, SumAndCount};
use super::labels::{Labelled, Labels as _, labels};
use super::text::{CLOSE, Cell, Family, Suffix, Writer, counter, gauge, histogram, label, summary};

/// Why a connection could not be established, or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConnectErrorKind {
    /// The connection was refused: the port is not listening.
    Refused,
    /// The network or this host reported that there is no route.
    Unreachable,
    /// Connecting, or waiting for a reply, took too long.
    Timeout,
    /// The connection was reset.
    Reset,
    /// The other side closed the connection.
    Closed,
    /// The other side refuses to answer this agent.
    Denied,
    /// The TLS handshake failed.
    Tls,
    /// The other side violated the protocol.
    Protocol,
    /// The name could not be resolved.
    Unresolved,
    /// A local error of this host.
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

/// Stage of establishing a connection other than the TCP handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectStage {
    /// DNS lookup.
    Resolve,
    /// TLS handshake.
    Tls,
    /// The pathmeter greeting over TCP.
    Greeting,
    /// Upgrade to WebSocket.
    WebSocket,
    /// From the first HTTP request to the header of its response.
    FirstByte,
}

labels!(ConnectStage, "stage", {
    Resolve => "resolve",
    Tls => "tls",
    Greeting => "greeting",
    WebSocket => "websocket",
    FirstByte => "first_byte",
});

/// Why an HTTP response is not the expected one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnexpectedResponse {
    /// Unexpected status code.
    Status,
    /// The body does not contain the expected text.
    Body,
}

labels!(UnexpectedResponse, "reason", {
    Status => "status",
    Body => "body",
});

/// Kernel statistics of a TCP connection (`TCP_INFO`). Times are in microseconds, as in the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed RTT (SRTT).
    pub rtt: u64,
    /// Mean deviation of the RTT (RTTVAR).
    pub rtt_variation: u64,
    /// Smallest RTT of the last minutes; 0 if there is none yet.
    pub rtt_minimum: u64,
    /// Retransmitted segments.
    pub retransmits: u64,
    /// Retransmitted bytes.
    pub bytes_retransmitted: u64,
    /// Last measured delivery rate in bytes per second; 0 if there is none yet.
    pub delivery_rate: u64,
    /// Time with unsent or unacknowledged data.
    pub busy: u64,
    /// Part of `busy` that was limited by the receive window of the other side.
    pub window_limited: u64,
    /// Part of `busy` that was limited by the local send buffer.
    pub buffer_limited: u64,
}

/// Measurements of one path over connections.
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
    /// Returns the series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// Records that the connection that carries the messages is established.
    pub fn connected(&self) {
        self.connected.set(1);
    }

    /// Records that the connection that carries the messages, or an attempt to establish it, ended.
    pub fn disconnected(&self, why: ConnectErrorKind) {
        self.connected.set(0);
        self.forget_tcp();
        self.reconnects.of(why).inc();
    }

    /// Prepares the series for another path, which may not use TLS: counters continue.
    pub fn continue_with(&self) {
        self.certificate_expiry.set(0);
    }

    /// Records that the connection was closed because it is not needed.
    pub fn close(&self) {
        self.connected.set(0);
        self.forget_tcp();
    }

    /// Resets the TCP gauges: those of a closed connection do not describe the next one.
    fn forget_tcp(&self) {
        for cell in [&self.rtt, &self.rtt_variation, &self.rtt_minimum, &self.delivery_rate] {
            cell.set(0);
        }
    }

    /// Returns the number of unexpected HTTP responses.
    #[must_use]
    pub fn unexpected_responses(&self) -> u64 {
        self.unexpected.total()
    }

    /// Records the duration of the TCP handshake of a new connection.
    pub fn observe_connect(&self, span: Duration) {
        self.connects.add(&RTT_BOUNDS, nanos(span));
    }

    /// Records the duration of a stage of establishing a new connection.
    pub fn observe_stage(&self, stage: ConnectStage, span: Duration) {
        self.stages[stage.index()].add(span);
    }

    /// Counts a new connection that could not be established.
    pub fn connect_failed(&self, why: ConnectErrorKind) {
        self.connect_failures.of(why).inc();
    }

    /// Counts an unexpected HTTP response.
    pub fn unexpected(&self, what: UnexpectedResponse) {
        self.unexpected.of(what).inc();
    }

    /// Sets the expiry of the other side's certificate, in seconds since the Unix epoch.
    pub fn certificate_expires(&self, at: u64) {
        self.certificate_expiry.set(at);
    }

    /// Records the statistics of a connection: `now`, and `before` as of the previous call.
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
        "Duration of the TCP handshake of new connections that are opened only to be timed.",
        |w, name, s| s.connects.write(w, name, &s.labels, &RTT_BOUNDS, Writer::seconds),
    ),
    counter(
        "pathmeter_echo_connect_failures_total",
        "New connections that failed before their first response, by reason.",
        |w, name, s| s.connect_failures.write(w, name, &s.labels),
    ),
    gauge(
        "pathmeter_echo_connected",
        "1 if the connection that carries the messages is established, else 0.",
        |w, name, s| {
            one(w, name, s, &s.connected);
        },
    ),
    summary(
        "pathmeter_echo_handshake_duration_seconds",
        "Duration of the stages of a new connection other than the TCP handshake.",
        |w, name, s| {
            for (mean, stage) in s.stages.iter().zip(ConnectStage::ALL) {
                mean.write(w, name, &s.labels, stage.rest());
            }
        },
    ),
    counter(
        "pathmeter_echo_reconnects_total",
        "Closed connections that carried messages, and failed attempts to establish one, by reason.",
        |w, name, s| s.reconnects.write(w, name, &s.labels),
    ),
    counter(
        "pathmeter_echo_tcp_busy_seconds_total",
        "Time with unsent or unacknowledged data.",
        |w, name, s| micros(w, name, s, &s.busy),
    ),
    gauge(
        "pathmeter_echo_tcp_delivery_rate_bytes_per_second",
        "Last delivery rate measured by the kernel; 0 if there is none yet.",
        |w, name, s| one(w, name, s, &s.delivery_rate),
    ),
    counter(
        "pathmeter_echo_tcp_receive_window_limited_seconds_total",
        "Part of the busy time in which the receive window of the other side limited sending.",
        |w, name, s| micros(w, name, s, &s.window_limited),
    ),
    counter(
        "pathmeter_echo_tcp_retransmitted_bytes_total",
        "Bytes retransmitted by the kernel.",
        |w, name, s| one(w, name, s, &s.bytes_retransmitted),
    ),
    counter("pathmeter_echo_tcp_retransmits_total", "Segments retransmitted by the kernel.", |w, name, s| {
        one(w, name, s, &s.retransmits);
    }),
    gauge(
        "pathmeter_echo_tcp_rtt_minimum_seconds",
        "Smallest RTT measured by the kernel in the last minutes; 0 if there is none yet.",
        |w, name, s| micros(w, name, s, &s.rtt_minimum),
    ),
    gauge(
        "pathmeter_echo_tcp_rtt_variation_seconds",
        "Mean deviation of the RTT measured by the kernel (RTTVAR, RFC 6298).",
        |w, name, s| micros(w, name, s, &s.rtt_variation),
    ),
    counter(
        "pathmeter_echo_tcp_send_buffer_limited_seconds_total",
        "Part of the busy time in which the local send buffer limited sending.",
        |w, name, s| micros(w, name, s, &s.buffer_limited),
    ),
    gauge(
        "pathmeter_echo_tcp_srtt_seconds",
        "Smoothed RTT measured by the kernel (SRTT, RFC 6298); 0 if there is none yet.",
        |w, name, s| micros(w, name, s, &s.rtt),
    ),
    counter(
        "pathmeter_echo_unexpected_total",
        "HTTP responses with an unexpected status or body. They count as answered.",
        |w, name, s| s.unexpected.write(w, name, &s.labels),
    ),
    gauge(
        "pathmeter_tls_certificate_expiry_timestamp_seconds",
        "Unix time at which the certificate of the other side expires. Absent without TLS.",
        |w, name, s| {
            if s.certificate_expiry.get() > 0 {
                one(w, name, s, &s.certificate_expiry);
            }
        },
    ),
];
