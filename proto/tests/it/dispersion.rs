//! Trains over simulated links.

use std::time::Duration;

use pathmeter_proto::load::dispersion::{TrainArrival, Trains};
use pathmeter_proto::load::{DATAGRAM_BYTES, LoadSender, LoadStep, Pattern};
use pathmeter_proto::sim::{Jitter, Link, Loss, Packet, Queue, Random};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::load::TrainPlace;

const MS: u64 = 1_000_000;
const MBIT: u64 = 1_000_000;
/// IP and UDP headers.
const HEADERS: usize = 28;

/// A path: a fast link of the sender, then a slower one with cross traffic.
struct Path {
    access: Link,
    narrow: Link,
    /// Rate of the cross traffic in bits per second, and whether it comes in bursts.
    cross: (u64, bool),
    /// Interval at which the receiver's interface reports arrivals; 0: at once.
    coalescing: u64,
    /// Random error of the receiver's timestamps.
    noise: u64,
}

impl Path {
    fn new(rate: u64) -> Self {
        let link = |rate: u64| {
            let mut link = Link::perfect(2 * MS);
            (link.queue, link.keeps_order) = (Some(Queue { rate, burst: 0, room: 1 << 24 }), true);
            link
        };
        Self { access: link(10_000 * MBIT), narrow: link(rate), cross: (0, false), coalescing: 0, noise: 0 }
    }

    fn bucket(rate: u64, sustained: u64, burst: u64) -> (Self, Link) {
        let mut bucket = Self::new(rate).narrow;
        bucket.queue = Some(Queue { rate: sustained, burst, room: 1 << 24 });
        (Self::new(rate), bucket)
    }

    /// Sends the trains of a run of `bytes`, and returns what they tell in bits of IP per second, and the
    /// bytes that were sent.
    fn measure(mut self, mut bucket: Option<Link>, bytes: u64, seed: u64) -> (Option<Measured>, u64) {
        let mut random = Random::new(seed);
        let start = Timestamp::from_nanos(1_000_000_000);
        let mut sender = LoadSender::new(Pattern::trains(bytes), bytes, None, Duration::from_secs(10), start);
        let mut entering: Vec<Entering> = Vec::new();
        let (mut now, mut sent) = (start, 0);
        loop {
            match sender.step(now) {
                LoadStep::Wait(until) => now = until,
                LoadStep::Finished(_) => break,
                LoadStep::Send { first, count } => {
                    for index in 0..count {
                        let mut place = first.place.unwrap();
                        place.position += index;
                        let packet = Packet { bytes: DATAGRAM_BYTES + HEADERS, tos: 0, ttl: 64 };
                        sent += packet.bytes as u64;
                        if let Ok([Some(delivery), _]) = self.access.pass(&mut random, now.as_nanos(), packet)
                        {
                            entering.push((delivery.at, packet.bytes, Some((place, now.as_nanos()))));
                        }
                    }
                    // A system call takes a while.
                    now = now + Duration::from_micros(20 + random.below(30));
                    sender.sent(count, now);
                }
            }
        }
        let (rate, is_bursty) = self.cross;
        let end = now.as_nanos();
        let mut at = start.as_nanos();
        while rate > 0 && at < end {
            let (count, bytes) = if is_bursty { (12, 1_500) } else { (1, 400 + random.below(1_100)) };
            let mean = count * bytes * 8 * 1_000_000_000 / rate;
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_sign_loss,
                reason = "a gap of some milliseconds"
            )]
            let gap = (-(1.0_f64 - random.fraction()).ln() * mean as f64) as u64;
            at += gap;
            entering.extend((0..count).map(|_| (at, usize::try_from(bytes).unwrap(), None)));
        }
        entering.sort_by_key(|(at, ..)| *at);
        let mut trains = Trains::default();
        let mut reported = 0;
        for (at, bytes, load) in entering {
            let packet = Packet { bytes, tos: 0, ttl: 64 };
            let Ok([Some(delivery), _]) = self.narrow.pass(&mut random, at, packet) else { continue };
            let mut at = delivery.at;
            let Some((place, sent_at)) = load else { continue };
            if let Some(bucket) = &mut bucket {
                let Ok([Some(delivery), _]) = bucket.pass(&mut random, at, packet) else { continue };
                at = delivery.at;
            }
            if self.coalescing > 0 {
                // The first arrival after a report begins the time to the next one.
                if at > reported {
                    reported = at + self.coalescing;
                }
                at = reported;
            }
            at += random.below(self.noise + 1);
            trains.add(TrainArrival { place, sent_at, at: Timestamp::from_nanos(at) });
        }
        let found = trains.dispersion(DATAGRAM_BYTES as u64).map(|found| {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let bits = |rate: u64| {
                (rate * 8 * (DATAGRAM_BYTES + HEADERS) as u64 / DATAGRAM_BYTES as u64) as f64 / 1e6
            };
            Measured {
                rate: found.rate.map(bits),
                low: bits(found.low),
                high: found.high.map(bits),
                sustained: found.sustained.map(bits),
            }
        });
        (found, sent)
    }
}

/// What enters the narrow link: the time, the length, and the load.
type Entering = (u64, usize, Option<(TrainPlace, u64)>);

/// In Mbit/s.
#[derive(Debug)]
struct Measured {
    rate: Option<f64>,
    low: f64,
    high: Option<f64>,
    sustained: Option<f64>,
}

const BYTES: u64 = 300_000;

fn is_within(found: f64, truth: u64, part: f64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let truth = truth as f64 / 1e6;
    (found - truth).abs() <= truth * part
}

#[test]
fn rate_of_a_link_is_known() {
    for rate in [1, 5, 10, 50, 100, 500, 1_000].map(|rate| rate * MBIT) {
        for seed in 0..50 {
            let (found, sent) = Path { noise: 300, ..Path::new(rate) }.measure(None, BYTES, seed);
            let found = found.unwrap();
            assert!(sent <= BYTES * 103 / 100, "{sent}");
            assert!(is_within(found.rate.unwrap(), rate, 0.05), "{rate} {seed}: {found:?}");
            assert_eq!(found.sustained, None, "{rate} {seed}: {found:?}");
        }
    }
}

#[test]
fn cross_traffic_never_makes_a_wrong_rate() {
    let (mut known, mut all) = (0, 0);
    for rate in [10, 100, 1_000].map(|rate| rate * MBIT) {
        for percent in [10, 30, 50, 70] {
            for is_bursty in [false, true] {
                for seed in 0..40 {
                    let path = Path { cross: (rate * percent / 100, is_bursty), ..Path::new(rate) };
                    let (found, _) = path.measure(None, BYTES, seed);
                    let found = found.unwrap();
                    let what = format!("{rate} {percent} {is_bursty} {seed}: {found:?}");
                    if let Some(found) = found.rate {
                        known += 1;
                        assert!(is_within(found, rate, 0.05), "{what}");
                    }
                    assert!(found.high.is_none_or(|high| high * 1e6 >= rate as f64 * 0.95), "{what}");
                    all += 1;
                }
            }
        }
    }
    assert!(known * 2 > all, "{known} of {all}");
}

#[test]
fn token_bucket_is_told_from_a_link() {
    for (rate, sustained, burst) in [
        (1_000, 100, 50_000),
        (1_000, 20, 30_000),
        (100, 50, 40_000),
        (100, 10, 50_000),
        (1_000, 300, 60_000),
    ] {
        for seed in 0..30 {
            let (path, bucket) = Path::bucket(rate * MBIT, sustained * MBIT, burst);
            let (found, _) = path.measure(Some(bucket), BYTES, seed);
            let found = found.unwrap();
            let what = format!("{rate} {sustained} {burst} {seed}: {found:?}");
            assert!(is_within(found.sustained.expect(&what), sustained * MBIT, 0.05), "{what}");
            if let Some(found) = found.rate {
                assert!(is_within(found, rate * MBIT, 0.05), "{what}");
            }
        }
    }
}

#[test]
fn coalescing_never_makes_a_wrong_rate() {
    for rate in [100, 1_000, 10_000].map(|rate| rate * MBIT) {
        for coalescing in [20_000, 50_000, 200_000, 1_000_000] {
            for seed in 0..30 {
                let path = Path { coalescing, noise: 500, ..Path::new(rate) };
                let (found, _) = path.measure(None, BYTES, seed);
                let what = format!("{rate} {coalescing} {seed}: {found:?}");
                // A datagram takes 98 µs, so that few are reported together.
                let is_easy = rate == 100 * MBIT && coalescing <= 50_000;
                assert!(found.as_ref().is_some_and(|found| found.rate.is_some()) || !is_easy, "{what}");
                let Some(found) = found else { continue };
                assert!(found.rate.is_none_or(|found| is_within(found, rate, 0.05)), "{what}");
                assert!(found.low * 1e6 <= rate as f64 * 1.05, "{what}");
                assert!(found.high.is_none_or(|high| high * 1e6 >= rate as f64 * 0.95), "{what}");
                assert_eq!(found.sustained, None, "{what}");
            }
        }
    }
}

#[test]
fn lost_datagrams_leave_a_range() {
    for seed in 0..50 {
        let mut path = Path::new(100 * MBIT);
        path.narrow.loss = Loss::Random(0.1);
        let (found, _) = path.measure(None, BYTES, seed);
        let found = found.unwrap();
        assert!(found.rate.is_none_or(|found| is_within(found, 100 * MBIT, 0.05)), "{seed}: {found:?}");
        assert!(found.low <= 105.0 && found.high.unwrap() >= 95.0, "{seed}: {found:?}");
    }
    // A queue that holds less than a train.
    for seed in 0..50 {
        let mut path = Path::new(100 * MBIT);
        path.narrow.queue = Some(Queue { rate: 100 * MBIT, burst: 0, room: 60_000 });
        let (found, _) = path.measure(None, BYTES, seed);
        let found = found.unwrap();
        assert!(found.low <= 105.0 && found.high.unwrap() >= 95.0, "{seed}: {found:?}");
    }
}

#[test]
fn jitter_behind_the_link_widens_the_range() {
    for seed in 0..50 {
        let mut path = Path::new(100 * MBIT);
        path.narrow.jitter = Jitter::Uniform(400_000);
        path.narrow.keeps_order = false;
        let (found, _) = path.measure(None, BYTES, seed);
        let found = found.unwrap();
        assert!(found.low <= 100.0 && found.high.is_none_or(|high| high >= 100.0), "{seed}: {found:?}");
        assert!(found.rate.is_none_or(|found| is_within(found, 100 * MBIT, 0.05)), "{seed}: {found:?}");
    }
}
