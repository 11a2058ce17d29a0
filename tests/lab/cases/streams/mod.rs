//! Echo over connections, across links that lose, fall silent, or are too narrow. A stream loses nothing of that; it makes
//! wait, and for how long is compared with what the wire did to every byte.

mod ended;
mod stage;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_lab::connection::Spoken;
use pathmeter_proto::sim::{Link, Loss, Queue};
use pathmeter_proto::time::nanos;

use self::stage::{BINARY, Probe, Speaks, Stage, TCP, TEXT, on_stage};
use crate::play::Inconclusive;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Loses so many both ways.
fn lossy(delay: u64, loss: Loss) -> Link {
    let mut link = Link::perfect(delay);
    link.loss = loss;
    link
}

/// Messages that see harmless links before and after.
const CALM: u64 = 60;
/// Messages of each path that see a bad one.
const BAD: u64 = 1_000;

/// Random loss makes messages wait, and each waits as long as the wire says.
fn random_loss(probes: &[Probe]) -> Result<(), Inconclusive> {
    on_stage(probes, 20 * MS, |stage| {
        stage.answers(CALM);
        stage.become_like(&lossy(20 * MS, Loss::Random(0.02)));
        stage.answers(BAD);
        stage.become_like(&Link::perfect(20 * MS));
        stage.answers(CALM);
        let ended = stage.finish();
        for path in &ended {
            for stream in path.connections.iter().flat_map(|connection| [&connection.there, &connection.back])
            {
                let tally = stream.tally;
                // What was lost had to be sent again, and besides it what only seemed lost.
                assert!(tally.dropped > 0 && tally.again_bytes >= tally.dropped_bytes, "{tally:?}");
            }
            // What TCP says: 20 ms each way at the least, and never idle for all of the time.
            let seconds = |name| path.path.seconds(&path.page, name);
            let (least, smoothed) = (seconds("tcp_rtt_minimum_seconds"), seconds("tcp_srtt_seconds"));
            assert!((0.039..1.0).contains(&least) && smoothed >= least, "{least} s, {smoothed} s");
            assert!(seconds("tcp_busy_seconds_total") >= least, "{}", path.page);
        }
        stage.compare(&ended)
    })
}

pub(crate) fn tcp_lossy() -> Result<(), Inconclusive> {
    random_loss(&[Probe::new("tcp-1", 8, TCP), Probe::new("tcp-2", 10, TCP)])
}

pub(crate) fn websocket_lossy() -> Result<(), Inconclusive> {
    random_loss(&[Probe::new("text", 8, TEXT), Probe::new("binary", 10, BINARY)])
}

pub(crate) fn http_lossy() -> Result<(), Inconclusive> {
    let http =
        |name, dscp| Probe { interval: Duration::from_millis(100), ..Probe::new(name, dscp, Speaks::Http) };
    let probes = [http("http-1", 8), http("http-2", 10)];
    on_stage(&probes, 20 * MS, |stage| {
        stage.answers(CALM / 4);
        stage.become_like(&lossy(20 * MS, Loss::Random(0.02)));
        stage.answers(BAD / 5);
        stage.become_like(&Link::perfect(20 * MS));
        stage.answers(CALM / 4);
        stage.compare(&stage.finish())
    })
}

fn now() -> u64 {
    nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// Nothing passes for so long, from now on.
fn fall_silent(stage: &Stage<'_>, delay: u64, span: Duration) -> (u64, u64) {
    let (from, to) = (now(), now() + nanos(span));
    stage.become_like(&lossy(delay, Loss::Blackout { from, to }));
    (from, to)
}

/// A connection outlives a silence that is shorter than `lost_after`: everything is late or ok.
pub(crate) fn tcp_blackout() -> Result<(), Inconclusive> {
    const SILENCE: Duration = Duration::from_secs(6);
    on_stage(&[Probe::new("tcp", 8, TCP)], 5 * MS, |stage| {
        stage.answers(CALM);
        fall_silent(stage, 5 * MS, SILENCE);
        stage.answers(10 * CALM);
        let ended = stage.finish();
        for path in &ended {
            let late = path.count("late_total", &[]);
            // Fifty a second, for all of the silence but its last second.
            assert!(late >= 240, "{late} are late");
            let longest = path.exchanges().iter().map(|(_, span)| span.0).max();
            assert!(longest > Some(nanos(SILENCE) - 100 * MS), "{longest:?}");
        }
        stage.compare(&ended)
    })
}

/// A connection on which nothing came back for `lost_after` is given up with everything on it; what waits for the next one waits
/// no longer than that.
pub(crate) fn tcp_given_up() -> Result<(), Inconclusive> {
    const SILENCE: Duration = Duration::from_secs(22);
    let probe = Probe { lost_after: Duration::from_secs(5), ..Probe::new("tcp", 8, TCP) };
    on_stage(&[probe], 5 * MS, |stage| {
        stage.answers(CALM);
        let (from, to) = fall_silent(stage, 5 * MS, SILENCE);
        stage.answers(10 * CALM);
        assert_eq!(stage.prober.page().count("pathmeter_accounting_errors_total", &[]), 0);
        stage.finish().iter().try_for_each(|ended| ended.was_given_up(from, to))
    })
}

/// A link that is too narrow fills the send buffer; what waits in front of it counts from when it was meant to leave.
pub(crate) fn tcp_bottleneck() -> Result<(), Inconclusive> {
    let large = Speaks::Messages(Spoken::Tcp { bytes: 65_536 });
    // 13 Mbit/s over each address family, where 20 fit.
    let probe = Probe { interval: Duration::from_millis(40), ..Probe::new("large", 8, large) };
    on_stage(&[probe], 5 * MS, |stage| {
        stage.answers(CALM / 2);
        let mut narrow = Link::perfect(5 * MS);
        narrow.queue = Some(Queue { rate: 20_000_000, burst: 0, room: 150_000 });
        stage.wire().become_like(&narrow, &Link::perfect(5 * MS));
        stage.answers(250);
        stage.become_like(&Link::perfect(5 * MS));
        stage.answers(CALM);
        let ended = stage.finish();
        for path in &ended {
            // A send buffer holds two of them, for a quarter of that: it was the program that had to keep them.
            let waited = path.exchanges().iter().filter_map(|(exchange, _)| exchange.waited()).max();
            if waited < Some(SECOND / 2) {
                return Err(Inconclusive(format!("nothing waited for longer than {waited:?} ns")));
            }
        }
        stage.compare(&ended)
    })
}
