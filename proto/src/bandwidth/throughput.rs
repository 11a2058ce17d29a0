//! The result of a run: how fast its bytes arrived.

use std::time::Duration;

use crate::time::Timestamp;

/// The bytes that have arrived by a time, from the beginning of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The time.
    pub at: Timestamp,
    /// Bytes of payload.
    pub bytes: u64,
}

/// The rate at which the bytes of a run arrived, without its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SteadyRate {
    /// Bytes of payload per second.
    pub bytes_per_second: u64,
    /// The time that it is the mean of.
    pub span: Duration,
}

/// Number of parts into which a run is divided to find its beginning.
const PARTS: u32 = 20;

/// A part belongs to the steady time from this fraction of the upper quartile on, in percent.
const STEADY_PERCENT: u64 = 90;

/// The steady rate of a run: the mean rate after its slow start.
///
/// The run is divided into 20 parts of equal time. The slow start ends where a part has at least 90 % of the
/// upper quartile of the rates of all parts: it may be three quarters of a run that is stopped soon.
/// `samples` are sorted by time; the first one has the bytes that had arrived when the measurement of time
/// began, and is left out of the sum. `None` if fewer than two samples differ in time.
#[must_use]
pub fn steady_rate(samples: &[Progress]) -> Option<SteadyRate> {
    let (first, last) = (samples.first()?, samples.last()?);
    let span = last.at.since(first.at);
    if span.is_zero() {
        return None;
    }
    let bounds: Vec<Progress> = (0..=PARTS).map(|part| at(samples, first.at + span * part / PARTS)).collect();
    let rates: Vec<u64> = bounds.windows(2).filter_map(|pair| rate(pair[0], pair[1])).collect();
    let mut sorted = rates.clone();
    sorted.sort_unstable();
    let upper_quartile = *sorted.get(sorted.len() * 3 / 4)?;
    let is_steady =
        |rate: &u64| u128::from(*rate) * 100 >= u128::from(upper_quartile) * u128::from(STEADY_PERCENT);
    let begin = rates.iter().position(is_steady).and_then(|index| bounds.get(index)).unwrap_or(first);
    Some(SteadyRate { bytes_per_second: rate(*begin, *last)?, span: last.at.since(begin.at) })
}

/// The bytes at `when`, between the samples before and after it; `samples` is not empty.
fn at(samples: &[Progress], when: Timestamp) -> Progress {
    let after = samples.partition_point(|sample| sample.at <= when);
    let before = samples[after.saturating_sub(1)];
    let Some(next) = samples.get(after).filter(|_| after > 0) else { return before };
    let (part, whole) = (when.since(before.at).as_nanos(), next.at.since(before.at).as_nanos());
    let more = u128::from(next.bytes.saturating_sub(before.bytes)) * part / whole.max(1);
    Progress { at: when, bytes: before.bytes + u64::try_from(more).unwrap_or(0) }
}

/// Bytes per second between two samples; `None` if they have the same time.
fn rate(from: Progress, to: Progress) -> Option<u64> {
    let nanos = to.at.since(from.at).as_nanos();
    let bytes = u128::from(to.bytes.saturating_sub(from.bytes));
    (bytes * 1_000_000_000).checked_div(nanos).map(|rate| u64::try_from(rate).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples each `step`, with the bytes that `rate` gives for each step.
    fn samples(steps: u64, step: Duration, rate: impl Fn(u64) -> u64) -> Vec<Progress> {
        let mut bytes = 0;
        let start = Timestamp::from_nanos(1_000);
        (0..=steps)
            .map(|number| {
                let at = start + step * u32::try_from(number).unwrap();
                bytes += if number == 0 { 0 } else { rate(number - 1) };
                Progress { at, bytes }
            })
            .collect()
    }

    const STEP: Duration = Duration::from_millis(10);

    #[test]
    fn constant_rate_is_the_mean_of_the_whole_run() {
        let steady = steady_rate(&samples(100, STEP, |_| 10_000)).unwrap();
        assert_eq!(steady, SteadyRate { bytes_per_second: 1_000_000, span: Duration::from_secs(1) });
    }

    #[test]
    fn slow_start_is_left_out() {
        // Doubles each 10 ms, up to the rate of the link.
        let steady = steady_rate(&samples(200, STEP, |step| 100_000.min(100 << step.min(30)))).unwrap();
        assert!((9_900_000..=10_000_000).contains(&steady.bytes_per_second), "{steady:?}");
        assert!(steady.span >= Duration::from_millis(1_700), "{steady:?}");
    }

    #[test]
    fn run_that_is_mostly_slow_start_has_the_rate_of_its_end() {
        let steady = steady_rate(&samples(30, STEP, |step| 100_000.min(1 << step))).unwrap();
        assert!((9_500_000..=10_000_000).contains(&steady.bytes_per_second), "{steady:?}");
    }

    #[test]
    fn rare_samples_give_the_same_rate() {
        let all = samples(200, STEP, |step| 100_000.min(100 << step.min(30)));
        let rare: Vec<Progress> = all.iter().copied().step_by(8).collect();
        let (all, rare) = (steady_rate(&all).unwrap(), steady_rate(&rare).unwrap());
        let difference = all.bytes_per_second.abs_diff(rare.bytes_per_second);
        assert!(difference * 100 <= all.bytes_per_second, "{all:?} {rare:?}");
    }

    #[test]
    fn pause_in_the_middle_counts() {
        let steady = steady_rate(&samples(100, STEP, |step| u64::from(!(40..60).contains(&step)) * 10_000));
        assert_eq!(steady.unwrap().bytes_per_second, 800_000);
    }

    #[test]
    fn rate_of_one_moment_is_unknown() {
        let now = Progress { at: Timestamp::from_nanos(5), bytes: 100 };
        assert_eq!(steady_rate(&[]), None);
        assert_eq!(steady_rate(&[now]), None);
        assert_eq!(steady_rate(&[now, Progress { bytes: 200, ..now }]), None);
    }

    #[test]
    fn few_samples_give_the_mean() {
        let start = Progress { at: Timestamp::from_nanos(0), bytes: 0 };
        let end = Progress { at: Timestamp::from_nanos(500_000_000), bytes: 1_000 };
        let steady = steady_rate(&[start, end]).unwrap();
        assert_eq!(steady, SteadyRate { bytes_per_second: 2_000, span: Duration::from_millis(500) });
    }
}
