//! Individual round trips, from pathmeter's loops in this process, because an agent exports only a histogram.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use pathmeter::datagram::{self, SourceChoice, TimestampMatching};
use pathmeter::echo::DatagramEcho;
use pathmeter::http::client::TlsClient;
use pathmeter::loops::{EVENTS_PENDING_MAX, NewPath};
use pathmeter::metrics::echo::EchoSeries;
use pathmeter::metrics::stream::StreamSeries;
use pathmeter::paths::PathId;
use pathmeter::stream::{self, Dial, ExpectedResponse, HttpTarget, Observer, StreamEcho, StreamTask};
use pathmeter::tls::{Connector, Trust};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoReport, EchoSpec, Quirks, StreamSpec, Verdict, WireFormat};
use pathmeter_proto::machine::TimestampSource;
use pathmeter_proto::stats::quantile;
use pathmeter_proto::wire::stream::MESSAGE_BYTES_MIN;

use super::super::agent::{target, within};
use super::agents::{NAME, TransportSetup};
use super::{CaseTransport, TransportCase};

/// More than the 10,000 needed for p99.9.
const PROBES: usize = 11_000;
/// Reports of the first second, which are skipped.
const FIRST: usize = 1_000;
/// Longest time without a report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(20);

/// Round trips and losses of all paths.
#[derive(Debug, Default)]
pub(super) struct RttSamples {
    /// Sorted.
    all: Vec<Duration>,
    /// Percent without kernel transmit timestamp.
    pub(super) user_sent: f64,
    /// Percent without kernel receive timestamp.
    pub(super) user_received: f64,
    pub(super) lost: u32,
    pub(super) unsent: u64,
}

impl RttSamples {
    /// Quantile in microseconds.
    pub(super) fn quantile(&self, q: f64) -> f64 {
        quantile(&self.all, q).map_or(f64::NAN, |rtt| rtt.as_secs_f64() * 1e6)
    }

    /// Collects the reports of all paths.
    fn collect(reports: &Receiver<EchoReport>) -> io::Result<Self> {
        let mut found = Self::default();
        let (mut sent, mut received, mut first) = (0_u32, 0_u32, FIRST);
        while found.all.len() < PROBES {
            match reports.recv_timeout(REPORT_TIMEOUT) {
                Ok(EchoReport::Decided { sample: Some(_), .. } | EchoReport::Unsent(_)) if first > 0 => {
                    first -= 1
                }
                Ok(EchoReport::Decided { sample: Some(sample), .. }) => {
                    found.all.push(sample.rtt);
                    sent += u32::from(sample.transmit == TimestampSource::User);
                    received += u32::from(sample.receive == TimestampSource::User);
                }
                Ok(EchoReport::Decided { verdict: Verdict::Lost { .. }, .. }) => found.lost += 1,
                Ok(EchoReport::Unsent(slots)) => found.unsent += slots,
                Ok(_) => {}
                Err(error) => return Err(io::Error::other(format!("no reports: {error}"))),
            }
        }
        found.all.sort_unstable();
        let percent = |count| f64::from(count) * 100.0 / f64::from(u32::try_from(PROBES).expect("thousands"));
        (found.user_sent, found.user_received) = (percent(sent), percent(received));
        Ok(found)
    }
}

pub(super) fn measure(load: &TransportCase, setup: &TransportSetup<'_>) -> io::Result<RttSamples> {
    let secure = if setup.is_secure() { Some(secure(setup)?) } else { None };
    let ports = setup.ports;
    let place = |path: &str| HttpTarget {
        authority: format!("{NAME}:{}", ports.http),
        path: path.to_owned(),
        signer: None,
        secure: secure.clone(),
    };
    // Threads started in the namespace open their sockets there.
    within(&setup.namespace, || match load.transport {
        CaseTransport::Udp => {
            datagrams(load, ports.stamp, &WireFormat::Stamp { keys: None, quirks: Quirks::default() })
        }
        CaseTransport::Icmp(_) => datagrams(load, 0, &WireFormat::Icmp),
        CaseTransport::Tcp => {
            streams(load, ports.agent, &stream::StreamProtocol::Tcp { bytes: MESSAGE_BYTES_MIN, keys: None })
        }
        CaseTransport::WebSocket { format, .. } => {
            let place = place("/ws");
            let transport =
                stream::StreamProtocol::WebSocket { target: place, format, bytes: format.bytes_min() };
            streams(load, ports.http, &transport)
        }
        CaseTransport::Http { .. } => {
            let expected = ExpectedResponse { status: Vec::new(), body: None, is_agent: true };
            let place = place("/api/v1/ping");
            streams(load, ports.http, &stream::StreamProtocol::Http { target: place, expected })
        }
    })
}

fn secure(setup: &TransportSetup<'_>) -> io::Result<TlsClient> {
    let trust = Trust { ca_file: Some(setup.certificate()), ..Trust::default() };
    let connector = Connector::new(&trust).map_err(io::Error::other)?;
    Ok(TlsClient { connector, server_name: NAME.to_owned() })
}

fn datagrams(load: &TransportCase, port: u16, wire: &WireFormat) -> io::Result<RttSamples> {
    let (events, _unread) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
    let prober = datagram::spawn("bench", Vec::new(), TimestampMatching::detect(), events)?;
    let (tap, reports) = mpsc::channel();
    for n in 0..load.paths {
        let task = echo(load, n, port, wire.clone(), tap.clone()).into_task();
        prober.start(NewPath { id: PathId(n.into()), task, peer_left_at: None });
    }
    let found = RttSamples::collect(&reports);
    prober.stop(Duration::ZERO);
    found
}

fn echo(load: &TransportCase, n: u32, port: u16, wire: WireFormat, tap: Sender<EchoReport>) -> DatagramEcho {
    DatagramEcho {
        path_mtu: None,
        spec: EchoSpec {
            to: SocketAddr::from((target(n), port)),
            wire,
            interval: load.interval,
            ssids: vec![0],
            size: None,
            dscp: Dscp::default(),
            late_after: Duration::from_secs(1),
            lost_after: Duration::from_secs(3),
            tx_timestamps: true,
            count: None,
            seed: n.into(),
        },
        source: SourceChoice { address: Ipv4Addr::UNSPECIFIED.into(), port: 0, dont_fragment: false },
        series: Arc::new(EchoSeries::new("bench", &n.to_string(), "ipv4", 1)),
        reports: Some(tap),
        followed: Arc::default(),
    }
}

fn streams(load: &TransportCase, port: u16, transport: &stream::StreamProtocol) -> io::Result<RttSamples> {
    let (events, _unread) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
    let streams = stream::spawn(events)?;
    let (tap, reports) = mpsc::channel();
    for n in 0..load.paths {
        let peer = n.to_string();
        let echo = StreamEcho {
            spec: StreamSpec {
                interval: load.interval,
                late_after: Duration::from_secs(1),
                lost_after: Duration::from_secs(15),
                unanswered_max: transport.at_once(),
                on_demand: transport.is_on_demand(),
                count: None,
                seed: n.into(),
            },
            dial: Dial {
                to: SocketAddr::from((target(n), port)),
                host: None,
                source: None,
                dscp: Dscp::default(),
                protocol: transport.clone(),
            },
            connect_interval: None,
            series: Arc::new(EchoSeries::new("bench", &peer, "ipv4", 1)),
            stream: Arc::new(StreamSeries::new("bench", &peer, "ipv4")),
            shared: Arc::default(),
            observer: {
                let tap = tap.clone();
                Observer(Box::new(move |report| {
                    let _ = tap.send(*report);
                }))
            },
        };
        let task = StreamTask::Echo(Box::new(echo));
        streams.start(NewPath { id: PathId(n.into()), task, peer_left_at: None });
    }
    let found = RttSamples::collect(&reports);
    streams.stop(Duration::ZERO);
    found
}
