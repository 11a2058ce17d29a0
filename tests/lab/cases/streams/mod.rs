//! Echo over connections, across links with loss, blackouts and bottlenecks. A stream loses nothing then, but
//! messages wait, and each wait is compared with what happened to every byte on the wire.

mod outcome;
mod testbed;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_lab::connection::MessageProtocol;
use pathmeter_proto::sim::{Link, Loss, Queue};
use pathmeter_proto::time::nanos;

use self::testbed::{BINARY, ProbeProtocol, StreamProbe, StreamTestbed, TCP, TEXT, with_stream_testbed};
use crate::testbed::Inconclusive;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// A link with loss.
fn lossy(delay: u64, loss: Loss) -> Link {
    let mut link = Link::perfect(delay);
    link.loss = loss;
    link
}

/// Messages of each path before and after the impairment.
const UNIMPAIRED: u64 = 60;
/// Messages of each path during the impairment.
const IMPAIRED: u64 = 1_000;

/// Random loss makes messages wait; each wait equals the wire's.
fn random_loss(probes: &[StreamProbe]) -> Result<(), Inconclusive> {
    with_stream_testbed(probes, 20 * MS, |testbed| {
        testbed.answers(UNIMPAIRED);
        testbed.set_links(&lossy(20 * MS, Loss::Random(0.02)));
        testbed.answers(IMPAIRED);
        testbed.set_links(&Link::perfect(20 * MS));
        testbed.answers(UNIMPAIRED);
        let outcome = testbed.finish();
        for path in &outcome {
            for stream in
                path.connections.iter().flat_map(|connection| [&connection.to_server, &connection.to_client])
            {
                let segments = stream.segments;
                // Lost segments had to be retransmitted, and others that only seemed lost.
                assert!(
                    segments.dropped > 0 && segments.retransmitted_bytes >= segments.dropped_bytes,
                    "{segments:?}"
                );
            }
            // TCP's own estimates: at least 20 ms each way, and busy for at least one round trip.
            let seconds = |name| path.path.seconds(&path.page, name);
            let (least, smoothed) = (seconds("tcp_rtt_minimum_seconds"), seconds("tcp_srtt_seconds"));
            assert!((0.039..1.0).contains(&least) && smoothed >= least, "{least} s, {smoothed} s");
            assert!(seconds("tcp_busy_seconds_total") >= least, "{}", path.page);
        }
        testbed.compare(&outcome)
    })
}

pub(crate) fn tcp_lossy() -> Result<(), Inconclusive> {
    random_loss(&[StreamProbe::new("tcp-1", 8, TCP), StreamProbe::new("tcp-2", 10, TCP)])
}

pub(crate) fn websocket_lossy() -> Result<(), Inconclusive> {
    random_loss(&[StreamProbe::new("text", 8, TEXT), StreamProbe::new("binary", 10, BINARY)])
}

pub(crate) fn http_lossy() -> Result<(), Inconclusive> {
    let http = |name, dscp| StreamProbe {
        interval: Duration::from_millis(100),
        ..StreamProbe::new(name, dscp, ProbeProtocol::Http)
    };
    let probes = [http("http-1", 8), http("http-2", 10)];
    with_stream_testbed(&probes, 20 * MS, |testbed| {
        testbed.answers(UNIMPAIRED / 4);
        testbed.set_links(&lossy(20 * MS, Loss::Random(0.02)));
        testbed.answers(IMPAIRED / 5);
        testbed.set_links(&Link::perfect(20 * MS));
        testbed.answers(UNIMPAIRED / 4);
        testbed.compare(&testbed.finish())
    })
}

fn now() -> u64 {
    nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// Drops everything from now on for a period. Returns its start and end.
fn black_out(testbed: &StreamTestbed<'_>, delay: u64, span: Duration) -> (u64, u64) {
    let (from, to) = (now(), now() + nanos(span));
    testbed.set_links(&lossy(delay, Loss::Blackout { from, to }));
    (from, to)
}

/// A connection survives a blackout that is shorter than `lost_after`: every message is late or ok.
pub(crate) fn tcp_blackout() -> Result<(), Inconclusive> {
    const BLACKOUT: Duration = Duration::from_secs(6);
    with_stream_testbed(&[StreamProbe::new("tcp", 8, TCP)], 5 * MS, |testbed| {
        testbed.answers(UNIMPAIRED);
        black_out(testbed, 5 * MS, BLACKOUT);
        testbed.answers(10 * UNIMPAIRED);
        let outcome = testbed.finish();
        for path in &outcome {
            let late = path.count("late_total", &[]);
            // Fifty messages a second, for all of the blackout but its last second.
            assert!(late >= 240, "{late} are late");
            let longest = path.exchanges().iter().map(|(_, span)| span.0).max();
            assert!(longest > Some(nanos(BLACKOUT) - 100 * MS), "{longest:?}");
        }
        testbed.compare(&outcome)
    })
}

/// A connection without a reply for `lost_after` is closed and its messages are lost. Messages wait no longer
/// than that for the next connection.
pub(crate) fn tcp_timeout() -> Result<(), Inconclusive> {
    const BLACKOUT: Duration = Duration::from_secs(22);
    let probe = StreamProbe { lost_after: Duration::from_secs(5), ..StreamProbe::new("tcp", 8, TCP) };
    with_stream_testbed(&[probe], 5 * MS, |testbed| {
        testbed.answers(UNIMPAIRED);
        let (from, to) = black_out(testbed, 5 * MS, BLACKOUT);
        testbed.answers(10 * UNIMPAIRED);
        assert_eq!(testbed.prober.page().count("pathmeter_accounting_errors_total", &[]), 0);
        testbed.finish().iter().try_for_each(|outcome| outcome.compare_after_timeout(from, to))
    })
}

/// A bottleneck fills the send buffer; messages that wait for it count from their scheduled departure.
pub(crate) fn tcp_bottleneck() -> Result<(), Inconclusive> {
    let large = ProbeProtocol::Messages(MessageProtocol::Tcp { bytes: 65_536 });
    // 13 Mbit/s over each address family, on a link of 20 Mbit/s.
    let probe = StreamProbe { interval: Duration::from_millis(40), ..StreamProbe::new("large", 8, large) };
    with_stream_testbed(&[probe], 5 * MS, |testbed| {
        testbed.answers(UNIMPAIRED / 2);
        let mut narrow = Link::perfect(5 * MS);
        narrow.queue = Some(Queue { rate: 20_000_000, burst: 0, room: 150_000 });
        testbed.wire().set_links(&narrow, &Link::perfect(5 * MS));
        testbed.answers(250);
        testbed.set_links(&Link::perfect(5 * MS));
        testbed.answers(UNIMPAIRED);
        let outcome = testbed.finish();
        for path in &outcome {
            // A send buffer holds two messages, a quarter of this time: the program had to hold the others.
            let waited = path.exchanges().iter().filter_map(|(exchange, _)| exchange.waited()).max();
            if waited < Some(SECOND / 2) {
                return Err(Inconclusive(format!("nothing waited for longer than {waited:?} ns")));
            }
        }
        testbed.compare(&outcome)
    })
}
