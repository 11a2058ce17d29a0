//! Dispersion of trains: the rate at which datagrams leave the narrowest link of a path if they enter it back
//! to back.
//!
//! It is not the available bandwidth: cross traffic that enters between the datagrams of a train lowers it,
//! and a train that passes at once does not show what a longer load would get (Dovrolis, Ramanathan and
//! Moore, "What do packet dispersion techniques measure?", 2001). It is a rate only where the trains agree,
//! and a range or nothing where they do not. Trains of two lengths tell a token bucket, which lets its burst
//! pass at the rate of the link, from a link.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::time::{Timestamp, nanos};
use crate::wire::load::{Dispersion, TrainPlace};

/// An arrival of a datagram of a train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainArrival {
    /// Its place.
    pub place: TrainPlace,
    /// When its batch was sent, in nanoseconds by the sender's clock.
    pub sent_at: u64,
    /// When it arrived, from the kernel's timestamp.
    pub at: Timestamp,
}

/// The arrivals of the trains of a run.
#[derive(Debug, Clone, Default)]
pub struct Trains {
    trains: BTreeMap<u16, Vec<TrainArrival>>,
    count: usize,
}

/// Maximum arrivals that are kept; later ones are ignored. Chosen: two megabytes.
const ARRIVALS_MAX: usize = 50_000;

/// Datagrams of a train that must arrive for it to count.
const ARRIVED_MIN: usize = 8;

/// One datagram in so many at the beginning of a train does not count: shapers let a few pass at once.
const BEGINNING: usize = 6;

/// Trains that must agree.
const TRAINS_MIN: usize = 4;

/// How far the rates of trains that agree may differ, and how uncertain each may be.
const AGREEMENT: f64 = 0.05;

/// A gap between two arrivals that is shorter than this part of the mean gap is within a bunch: datagrams
/// whose arrival the receiver's network interface reported together (interrupt coalescing).
const BUNCHED: f64 = 0.25;

/// A shorter mean gap is that between two timestamps of the kernel, not between two datagrams on a link:
/// above 5 Gbit/s trains tell nothing.
const GAP_MIN: f64 = 2e-6;

/// A train that takes less than so many times the longest time between two bunches says nothing.
const BUNCHES_MIN: f64 = 4.0;

/// The end of a train is slower than its beginning by this factor if a token bucket has run empty. Chosen:
/// several times what cross traffic does to trains that otherwise agree.
const SHAPED: f64 = 1.3;

/// Parts of a long train that are compared to find a token bucket.
const PARTS: usize = 6;

/// A train of so many times the datagrams of the shortest one is a long one.
const LONG: u16 = 3;

impl Trains {
    /// Adds the first arrival of a datagram.
    pub fn add(&mut self, arrival: TrainArrival) {
        if self.count < ARRIVALS_MAX {
            self.trains.entry(arrival.place.train).or_default().push(arrival);
            self.count += 1;
        }
    }

    /// What they tell; `None` if too few datagrams arrived, or too fast to be told apart. `bytes`: payload of
    /// a datagram.
    #[must_use]
    pub fn dispersion(&self, bytes: u64) -> Option<Dispersion> {
        let trains: Vec<Train> = self.trains.values().filter_map(|arrivals| Train::of(arrivals)).collect();
        let longest_pause = trains.iter().filter_map(|train| train.longest_pause).fold(0.0, f64::max);
        let mut trains: Vec<RatedTrain> =
            trains.into_iter().filter_map(|train| train.rated(longest_pause)).collect();
        let shortest = trains.iter().map(|train| train.length).min()?;
        let long = trains.iter().filter(|train| train.length >= shortest.saturating_mul(LONG));
        let short_rate = median(
            trains.iter().filter(|train| train.length == shortest).map(|train| train.rate.low).collect(),
        )?;
        let sustained = long.clone().find_map(|train| train.sustained(short_rate));
        if sustained.is_some() {
            // A long train says nothing about the link behind the bucket.
            trains.retain(|train| train.length < shortest.saturating_mul(LONG));
        }
        // A train that arrived too fast may have arrived with a single report of the interface.
        let known: Vec<Range> =
            trains.iter().map(|train| train.rate).filter(|rate| rate.is_known()).collect();
        let lows = known.iter().map(|rate| rate.low).chain(sustained);
        let low = lows.reduce(f64::min)?;
        let high = known.iter().map(|rate| rate.high).fold(0.0, f64::max);
        let is_limited = known.len() < trains.len() || trains.iter().any(|train| train.is_sender_limited);
        let middles: Vec<f64> = known.iter().map(|rate| f64::midpoint(rate.low, rate.high)).collect();
        let (slowest, fastest) = (
            middles.iter().copied().fold(f64::INFINITY, f64::min),
            middles.iter().copied().fold(0.0, f64::max),
        );
        let agree = middles.len() >= TRAINS_MIN
            && !is_limited
            && fastest - slowest <= fastest * AGREEMENT
            && known.iter().all(|rate| rate.high - rate.low <= rate.high * AGREEMENT);
        #[expect(clippy::cast_precision_loss, reason = "the length of a datagram")]
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let per_second = |datagrams: f64| (datagrams * bytes as f64) as u64;
        Some(Dispersion {
            rate: median(middles).filter(|_| agree).map(per_second),
            low: per_second(low),
            high: (!is_limited && !known.is_empty()).then(|| per_second(high)),
            sustained: sustained.map(per_second),
        })
    }
}

/// A rate that is known to be between two bounds.
#[derive(Debug, Clone, Copy)]
struct Range {
    low: f64,
    high: f64,
}

impl Range {
    /// Of a train that arrived faster than can be told.
    const TOO_FAST: Self = Self { low: 1.0 / GAP_MIN, high: f64::INFINITY };

    fn is_known(self) -> bool {
        self.high.is_finite()
    }
}

/// A train of which enough has arrived.
#[derive(Debug)]
struct Train {
    /// Number of its datagrams that have arrived.
    arrived: usize,
    /// Those that count, in the order of their arrival.
    arrivals: Vec<TrainArrival>,
    /// Arrival times in seconds from the first, in order.
    times: Vec<f64>,
    /// The longest time between two bunches; `None`: it did not arrive in bunches.
    longest_pause: Option<f64>,
}

/// A train that says how fast it arrived.
#[derive(Debug)]
struct RatedTrain {
    length: u16,
    times: Vec<f64>,
    rate: Range,
    is_sender_limited: bool,
}

impl Train {
    fn of(arrivals: &[TrainArrival]) -> Option<Self> {
        let mut arrivals = arrivals.to_vec();
        arrivals.sort_by_key(|arrival| (arrival.at, arrival.place.position));
        let arrived = arrivals.len();
        if arrived < ARRIVED_MIN {
            return None;
        }
        arrivals.drain(..arrived / BEGINNING);
        let first = arrivals.first()?.at;
        let times: Vec<f64> = arrivals.iter().map(|arrival| seconds(arrival.at.since(first))).collect();
        let mean = mean_gap(&times);
        let in_bunch = gaps(&times).filter(|gap| *gap < mean * BUNCHED).count();
        let is_bunched = mean >= GAP_MIN && in_bunch * 2 > times.len() - 1;
        let longest_pause = is_bunched.then(|| gaps(&times).fold(0.0, f64::max));
        Some(Self { arrived, arrivals, times, longest_pause })
    }

    /// The rate; `None` if the train says nothing. `longest_pause`: between two bunches of any train.
    fn rated(self, longest_pause: f64) -> Option<RatedTrain> {
        let Self { arrived, arrivals, times, .. } = self;
        let (first, span) = (arrivals.first()?, *times.last()?);
        if span < longest_pause * BUNCHES_MIN {
            return None;
        }
        let mut rate = match self.longest_pause {
            None if mean_gap(&times) < GAP_MIN => Range::TOO_FAST,
            None => smooth_rate(&times)?,
            Some(_) => bunched_rate(&times)?,
        };
        // What was lost at the narrowest link did not use it, what was lost elsewhere did.
        let lost = usize::from(first.place.length).saturating_sub(arrived);
        rate.high *= float(arrivals.len() + lost - 1) / float(arrivals.len() - 1);
        let is_sender_limited = rate.is_known() && is_sender_limited(&arrivals, span);
        Some(RatedTrain { length: first.place.length, times, rate, is_sender_limited })
    }
}

impl RatedTrain {
    /// The rate of the end of the train if a token bucket ran empty in the middle of it: its parts have a
    /// higher rate first and a lower one from then on. `link`: the rate of short trains.
    fn sustained(&self, link: f64) -> Option<f64> {
        let part = self.times.len() / PARTS;
        if part < ARRIVED_MIN {
            return None;
        }
        let rates: Vec<f64> = (0..PARTS)
            .map(|index| {
                let times = &self.times[index * part..=((index + 1) * part).min(self.times.len() - 1)];
                float(times.len() - 1) / (times[times.len() - 1] - times[0]).max(f64::EPSILON)
            })
            .collect();
        // The part in which the bucket ran empty has a rate of its own.
        let empty_at = rates.iter().position(|rate| *rate * SHAPED < link)? + 1;
        let after = rates.get(empty_at..).filter(|after| after.len() >= 2)?;
        let (slowest, fastest) =
            (after.iter().copied().fold(f64::INFINITY, f64::min), after.iter().copied().fold(0.0, f64::max));
        let begin = self.times[empty_at * part];
        let end = *self.times.last()?;
        let rate = float(self.times.len() - 1 - empty_at * part) / (end - begin).max(f64::EPSILON);
        (fastest - slowest <= fastest * AGREEMENT * 2.0 && rate * SHAPED < link).then_some(rate)
    }
}

fn gaps(times: &[f64]) -> impl Iterator<Item = f64> + '_ {
    times.windows(2).map(|pair| pair[1] - pair[0])
}

fn mean_gap(times: &[f64]) -> f64 {
    times.last().copied().unwrap_or(0.0) / float(times.len().saturating_sub(1).max(1))
}

/// The rate of arrivals that were reported one by one. The time is as uncertain as half of the gaps are.
fn smooth_rate(times: &[f64]) -> Option<Range> {
    let (mean, span) = (mean_gap(times), *times.last()?);
    let error = median(gaps(times).map(|gap| (gap - mean).abs()).collect())?;
    let count = float(times.len() - 1);
    Some(Range { low: count / (span + error), high: count / (span - error).max(1e-9) })
}

/// The rate of arrivals that were reported in bunches. What a bunch holds has arrived since the one before
/// it; the last one may have been reported before it was full.
fn bunched_rate(times: &[f64]) -> Option<Range> {
    let mean = mean_gap(times);
    let begins: Vec<usize> =
        gaps(times).zip(1..).filter(|(gap, _)| *gap >= mean * BUNCHED).map(|(_, index)| index).collect();
    // From the second bunch on: those before it arrived in an unknown time.
    let [second, .., last] = begins.as_slice() else { return None };
    let first_at = times[second - 1];
    let end = *begins.get(begins.len().checked_sub(2)?)?;
    // Everything from the second bunch to the last full one, and the time from the first bunch to that one.
    let (count, span) = (float(last - second), times[end] - first_at);
    if count < float(ARRIVED_MIN) || span <= 0.0 {
        return None;
    }
    // A datagram more or less at each end.
    Some(Range { low: (count - 2.0).max(0.0) / span, high: (count + 2.0) / span })
}

/// Whether a train took about as long to be sent as to arrive. The time of its last batch is known, not how
/// long it took to send it.
fn is_sender_limited(sorted: &[TrainArrival], span: f64) -> bool {
    let sent = sorted.iter().map(|arrival| arrival.sent_at);
    let (Some(begin), Some(end)) = (sent.clone().min(), sent.max()) else { return false };
    seconds(Duration::from_nanos(end - begin)) * 2.0 > span
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn seconds(span: Duration) -> f64 {
    float(usize::try_from(nanos(span)).unwrap_or(usize::MAX)) / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "counts and times of a run are below 2⁵³")]
fn float(value: usize) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn slow_sender_gives_no_upper_bound() {
        let arrival = |train: u16, position: u16, gap: u64| TrainArrival {
            place: TrainPlace { train, position, length: 20 },
            sent_at: u64::from(position) * gap,
            at: Timestamp::from_nanos(u64::from(train) * 100 * MS + u64::from(position) * gap),
        };
        let mut trains = Trains::default();
        for train in 0..5 {
            (0..20).for_each(|position| trains.add(arrival(train, position, 100_000)));
        }
        let found = trains.dispersion(100).unwrap();
        assert_eq!((found.rate, found.high), (None, None));
        assert!(found.low.abs_diff(1_000_000) < 100, "{found:?}");
    }

    #[test]
    fn few_or_simultaneous_arrivals_tell_nothing() {
        assert_eq!(Trains::default().dispersion(100), None);
        let mut trains = Trains::default();
        for position in 0..7 {
            let place = TrainPlace { train: 0, position, length: 20 };
            trains.add(TrainArrival {
                place,
                sent_at: 0,
                at: Timestamp::from_nanos(u64::from(position) * MS),
            });
        }
        assert_eq!(trains.dispersion(100), None);
        // All at the same moment.
        for position in 0..20 {
            let place = TrainPlace { train: 1, position, length: 20 };
            trains.add(TrainArrival { place, sent_at: 0, at: Timestamp::from_nanos(5) });
        }
        assert_eq!(trains.dispersion(100), None);
    }
}
