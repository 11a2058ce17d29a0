//! Echo over connections, across links that lose, fall silent, or are too narrow. A stream loses nothing of that; it makes
//! wait, and for how long is compared with what the wire did to every byte.

mod outcome;
mod testbed;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_lab::connection::MessageProtocol;
use pathmeter_proto::sim::{Link, Loss, Queue};
use pathmeter_proto::time::nanos;

use self::testbed::{BINARY, StreamProbe, StreamProtocol, StreamTestbed, TCP, TEXT, with_stream_testbed};
use crate::testbed::Inconclusive;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Loses so many both ways.
fn lossy(delay: u64, loss: Loss) -> Link {
    let mut link = Link::perfect(delay);
    link.loss = loss;
    link
}

/// Messages that see harmless links before and after.
const UNIMPAIRED: u64 = 60;
/// Messages of each path that see a bad one.
const IMPAIRED: u64 = 1_000;

/// Random loss makes messages wait, and each waits as long as the wire says.
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
                // What was lost had to be sent again, and besides it what only seemed lost.
                assert!(
                    segments.dropped > 0 && segments.retransmitted_bytes >= segments.dropped_bytes,
                    "{segments:?}"
                );
            }
            // What TCP says: 20 ms each way at the least, and never idle for all of the time.
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
        ..StreamProbe::new(name, dscp, StreamProtocol::Http)
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

/// Nothing passes for so long, from now on.
fn black_out(testbed: &StreamTestbed<'_>, delay: u64, span: Duration) -> (u64, u64) {
    let (from, to) = (now(), now() + nanos(span));
    testbed.set_links(&lossy(delay, Loss::Blackout { from, to }));
    (from, to)
}

/// A connection outlives a silence that is shorter than `lost_after`: everything is late or ok.
pub(crate) fn tcp_blackout() -> Result<(), Inconclusive> {
    const BLACKOUT: Duration = Duration::from_secs(6);
    with_stream_testbed(&[StreamProbe::new("tcp", 8, TCP)], 5 * MS, |testbed| {
        testbed.answers(UNIMPAIRED);
        black_out(testbed, 5 * MS, BLACKOUT);
        testbed.answers(10 * UNIMPAIRED);
        let outcome = testbed.finish();
        for path in &outcome {
            let late = path.count("late_total", &[]);
            // Fifty a second, for all of the silence but its last second.
            assert!(late >= 240, "{late} are late");
            let longest = path.exchanges().iter().map(|(_, span)| span.0).max();
            assert!(longest > Some(nanos(BLACKOUT) - 100 * MS), "{longest:?}");
        }
        testbed.compare(&outcome)
    })
}

/// A connection on which nothing came back for `lost_after` is given up with everything on it; what waits for the next one waits
/// no longer than that.
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

/// A link that is too narrow fills the send buffer; what waits in front of it counts from when it was meant to leave.
pub(crate) fn tcp_bottleneck() -> Result<(), Inconclusive> {
    let large = StreamProtocol::Messages(MessageProtocol::Tcp { bytes: 65_536 });
    // 13 Mbit/s over each address family, where 20 fit.
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
            // A send buffer holds two of them, for a quarter of that: it was the program that had to keep them.
            let waited = path.exchanges().iter().filter_map(|(exchange, _)| exchange.waited()).max();
            if waited < Some(SECOND / 2) {
                return Err(Inconclusive(format!("nothing waited for longer than {waited:?} ns")));
            }
        }
        testbed.compare(&outcome)
    })
}
