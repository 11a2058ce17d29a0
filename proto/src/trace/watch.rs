//! Watches the echoes of a path for reasons to trace it.

use std::collections::VecDeque;
use std::time::Duration;

use super::echo_history::{EchoHistory, EchoSummary};
use super::{Direction, Trigger};
use crate::echo::{EchoReport, Verdict};
use crate::time::Timestamp;

/// Derives from the reports of an echo prober when its path should be traced: before the evidence is gone.
#[derive(Debug, Default)]
pub struct EchoWatch {
    flows: Vec<FlowWatch>,
    findings: VecDeque<Finding>,
}

/// What the echoes of a flow show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The number of routers that a request or a reply passed, if it is not the same as before.
    Routers {
        /// The flow.
        flow: u8,
        /// The direction: forward for requests, reverse for replies.
        direction: Direction,
        /// The number of routers.
        routers: u8,
    },
    /// A flow loses much more than the others.
    LossyFlow {
        /// The flow.
        flow: u8,
        /// Its echoes in the last 30 s.
        echoes: EchoSummary,
        /// The other flows that are not found to be lossy.
        clean: Vec<u8>,
    },
    /// The source port of a flow's probes has changed.
    FlowReplaced {
        /// The flow.
        flow: u8,
    },
    /// A reason to trace.
    Trigger {
        /// The flow; `None`: all flows.
        flow: Option<u8>,
        /// The reason.
        trigger: Trigger,
    },
}

#[derive(Debug, Default)]
struct FlowWatch {
    /// Forward and reverse.
    routers: [Option<u8>; 2],
    lost_in_a_row: u8,
    rtt: RttLevel,
    history: EchoHistory,
    /// Whether it was found to lose more than the others.
    is_lossy: bool,
}

/// Number of findings that are kept until they are taken. At the limit the oldest is discarded.
const FINDINGS_MAX: usize = 64;

/// Number of losses in a row that lead to a trace.
const LOSSES: u8 = 3;

/// The time over which the losses of flows are compared.
const LOSS_WINDOW: Duration = Duration::from_secs(30);

/// Losses of a flow in that time below which it is not compared. Chosen: 10, so that chance does not make one
/// of several equal flows the worst by [`LOSS_RATIO`].
const LOSSES_MIN: u32 = 10;

/// How many times as much as all other flows together a flow must lose to be found.
const LOSS_RATIO: u64 = 5;

/// A flow that was found is found again only after it has lost less than this many times as much.
const LOSS_RATIO_OVER: u64 = 2;

impl EchoWatch {
    /// Takes a report that the prober made at `at`. Returns whether there are findings to
    /// [take](Self::take).
    pub fn record(&mut self, report: &EchoReport, at: Timestamp) -> bool {
        if let EchoReport::Decided { flow, verdict, sample, .. } = report {
            let (flow, index) = (*flow, usize::from(*flow));
            if self.flows.len() <= index {
                self.flows.resize_with(index + 1, FlowWatch::default);
            }
            let watch = &mut self.flows[index];
            let mut found = Vec::new();
            match verdict {
                Verdict::Ok | Verdict::Late => watch.lost_in_a_row = 0,
                Verdict::Lost(_) => {
                    watch.history.add(None, at);
                    watch.lost_in_a_row = watch.lost_in_a_row.saturating_add(1);
                    if watch.lost_in_a_row == LOSSES {
                        found.push(Finding::Trigger { flow: Some(flow), trigger: Trigger::Loss });
                    }
                }
                Verdict::HostDropped | Verdict::Withdrawn => {}
            }
            if let Some(sample) = sample {
                watch.history.add(Some(sample.rtt), at);
                let counts = [sample.hops_forward, sample.hops_reverse];
                for ((direction, known), count) in
                    Direction::ALL.into_iter().zip(&mut watch.routers).zip(counts)
                {
                    if let Some(routers) = count.filter(|routers| *known != Some(*routers)) {
                        *known = Some(routers);
                        found.push(Finding::Routers { flow, direction, routers });
                    }
                }
                if watch.rtt.add(sample.rtt) {
                    found.push(Finding::Trigger { flow: Some(flow), trigger: Trigger::Rtt });
                }
            }
            let is_lost = matches!(verdict, Verdict::Lost(_));
            if is_lost || self.flows[index].is_lossy {
                found.extend(self.lossy_flow(flow, at));
            }
            found.into_iter().for_each(|finding| self.add(finding));
        }
        !self.findings.is_empty()
    }

    /// Whether the flow has begun to lose much more than the others.
    fn lossy_flow(&mut self, flow: u8, at: Timestamp) -> Option<Finding> {
        let summary = |watch: &FlowWatch| watch.history.since(at - LOSS_WINDOW);
        let index = usize::from(flow);
        let echoes = summary(&self.flows[index]);
        let others = self.flows.iter().enumerate().filter(|(other, _)| *other != index);
        let (mut lost, mut decided) = (0_u64, 0_u64);
        for (_, watch) in others {
            let summary = summary(watch);
            lost += u64::from(summary.lost);
            decided += u64::from(summary.decided);
        }
        let was_lossy = self.flows[index].is_lossy;
        let (ratio, losses) = if was_lossy { (LOSS_RATIO_OVER, 1) } else { (LOSS_RATIO, LOSSES_MIN) };
        let (own_lost, own_decided) = (u64::from(echoes.lost), u64::from(echoes.decided));
        // The shares that were lost, both multiplied by the numbers of echoes.
        let is_worse = own_lost * decided > ratio * lost * own_decided;
        let is_lossy = echoes.lost >= losses && is_worse && own_lost * 100 >= own_decided;
        self.flows[index].is_lossy = is_lossy;
        let clean = (0..).zip(&self.flows).filter(|(_, watch)| !watch.is_lossy).map(|(flow, _)| flow);
        (is_lossy && !was_lossy).then(|| Finding::LossyFlow { flow, echoes, clean: clean.collect() })
    }

    /// The echoes of a flow in a span of time, as far back as they are kept.
    #[must_use]
    pub fn echoes(&self, flow: u8, from: Timestamp, to: Timestamp) -> EchoSummary {
        let watch = self.flows.get(usize::from(flow));
        watch.map_or_else(EchoSummary::default, |watch| watch.history.between(from, to))
    }

    /// Requests a trace of all flows.
    pub fn trigger(&mut self, trigger: Trigger) {
        self.add(Finding::Trigger { flow: None, trigger });
    }

    /// Adds what something else has found.
    pub fn add(&mut self, finding: Finding) {
        if self.findings.len() == FINDINGS_MAX {
            self.findings.pop_front();
        }
        self.findings.push_back(finding);
    }

    /// Takes the oldest finding.
    pub fn take(&mut self) -> Option<Finding> {
        self.findings.pop_front()
    }
}

/// The level of the RTT of a flow, and when it shifts.
///
/// A shift is a median of the last [`LATEST`] samples that differs from the median of the [`BASELINE`]
/// before them by more than three median absolute deviations, 5 % and 1 ms. The new level is then the
/// baseline.
#[derive(Debug, Default)]
struct RttLevel {
    samples: VecDeque<Duration>,
    /// Samples since the last comparison.
    since: usize,
}

/// Samples of the current level.
const LATEST: usize = 5;

/// Samples with which they are compared.
const BASELINE: usize = 45;

/// Differences up to this are no shift.
const SHIFT_MIN: Duration = Duration::from_millis(1);

impl RttLevel {
    /// Adds a sample; returns whether the level has shifted.
    fn add(&mut self, rtt: Duration) -> bool {
        if self.samples.len() == BASELINE + LATEST {
            self.samples.pop_front();
        }
        self.samples.push_back(rtt);
        self.since += 1;
        if self.since < LATEST || self.samples.len() < BASELINE / 3 + LATEST {
            return false;
        }
        self.since = 0;
        let all: Vec<Duration> = self.samples.iter().copied().collect();
        let (before, latest) = all.split_at(all.len() - LATEST);
        let (base, level) = (median(before), median(latest));
        let deviations: Vec<Duration> = before.iter().map(|sample| sample.abs_diff(base)).collect();
        let limit = (median(&deviations) * 3).max(base / 20).max(SHIFT_MIN);
        let is_shifted = level.abs_diff(base) > limit;
        if is_shifted {
            self.samples.drain(..self.samples.len() - LATEST);
        }
        is_shifted
    }
}

fn median(samples: &[Duration]) -> Duration {
    let mut sorted = samples.to_vec();
    let middle = sorted.len() / 2;
    *sorted.select_nth_unstable(middle).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::RoundTrip;
    use crate::machine::TimestampSource;

    fn answered(rtt: Duration, hops_forward: Option<u8>) -> EchoReport {
        let by = TimestampSource::Kernel;
        let sample = Some(RoundTrip {
            rtt,
            sent: Timestamp::default(),
            responder_received: None,
            turnaround: Duration::ZERO,
            variation: Duration::ZERO,
            minimum: rtt,
            transmit: by,
            receive: by,
            hops_forward,
            hops_reverse: None,
            class_forward: None,
            class_reverse: None,
        });
        EchoReport::Decided { flow: 0, sequence: 0, verdict: Verdict::Ok, sample }
    }

    fn lost() -> EchoReport {
        let verdict = Verdict::Lost(crate::echo::Direction::Unknown);
        EchoReport::Decided { flow: 0, sequence: 0, verdict, sample: None }
    }

    fn findings(watch: &mut EchoWatch, report: &EchoReport) -> Vec<Finding> {
        let has_findings = watch.record(report, Timestamp::from_nanos(0));
        let found: Vec<Finding> = std::iter::from_fn(|| watch.take()).collect();
        assert_eq!(has_findings, !found.is_empty());
        found
    }

    #[test]
    fn new_number_of_routers_is_found_with_the_first_reply() {
        let mut watch = EchoWatch::default();
        let mut found = |forward, reverse| {
            let mut report = answered(Duration::from_millis(5), forward);
            if let EchoReport::Decided { sample: Some(sample), .. } = &mut report {
                sample.hops_reverse = reverse;
            }
            findings(&mut watch, &report)
        };
        let forward = |routers| Finding::Routers { flow: 0, direction: Direction::Forward, routers };
        let reverse = |routers| Finding::Routers { flow: 0, direction: Direction::Reverse, routers };
        assert_eq!(found(Some(7), Some(5)), [forward(7), reverse(5)]);
        assert_eq!(found(Some(7), Some(5)), []);
        assert_eq!(found(Some(8), None), [forward(8)]);
        assert_eq!(found(Some(8), Some(6)), [reverse(6)]);
    }

    /// Echoes of four flows each 80 ms, of which `is_lost` loses some; the seconds at which findings about
    /// losses come, with the flow.
    fn lossy_flows(seconds: u64, is_lost: impl Fn(u8, u64) -> bool) -> Vec<(u64, u8, EchoSummary)> {
        let (mut watch, mut found) = (EchoWatch::default(), Vec::new());
        for tick in 0..seconds * 1_000 / 80 {
            let at = Timestamp::from_nanos((1_000_000 + tick * 80) * 1_000_000);
            for index in 0..4 {
                let mut report = match is_lost(index, tick) {
                    true => lost(),
                    false => answered(Duration::from_millis(5), None),
                };
                if let EchoReport::Decided { flow, .. } = &mut report {
                    *flow = index;
                }
                watch.record(&report, at);
            }
            found.extend(std::iter::from_fn(|| watch.take()).filter_map(|finding| match finding {
                Finding::LossyFlow { flow, echoes, clean } => {
                    assert_eq!(clean, [0, 1, 2]);
                    Some((tick * 80 / 1_000, flow, echoes))
                }
                Finding::Routers { .. } | Finding::Trigger { .. } | Finding::FlowReplaced { .. } => None,
            }));
        }
        found
    }

    #[test]
    fn flow_that_loses_a_tenth_alone_is_found_within_seconds_and_once() {
        let [(at, flow, echoes)] = lossy_flows(300, |flow, tick| flow == 3 && tick % 10 == 9)[..] else {
            panic!("once")
        };
        assert_eq!((flow, echoes.lost, echoes.decided), (3, 10, 100));
        assert!(at < 9, "{at}");
    }

    #[test]
    fn flow_that_loses_as_much_as_the_others_is_not_found() {
        let tenth = |flow: u8, tick: u64| (tick + 3 * u64::from(flow)) % 10 == 9;
        assert_eq!(lossy_flows(300, tenth), []);
        let less = |flow: u8, tick: u64| tick % if flow == 3 { 10 } else { 43 } == 9;
        assert_eq!(lossy_flows(300, less), [], "not five times as much");
        assert_eq!(lossy_flows(300, |flow, tick| flow == 3 && tick % 101 == 9), [], "less than 1 %");
    }

    #[test]
    fn flow_is_compared_with_others_only() {
        let mut watch = EchoWatch::default();
        let found: Vec<Finding> = (0..100).flat_map(|_| findings(&mut watch, &lost())).collect();
        assert_eq!(found, [Finding::Trigger { flow: Some(0), trigger: Trigger::Loss }]);
    }

    #[test]
    fn echoes_of_a_flow_are_summed_and_those_of_no_flow_are_none() {
        let mut watch = EchoWatch::default();
        let at = |seconds: u64| Timestamp::from_nanos(1_000_000_000 * (1_000 + seconds));
        let rtt = Duration::from_millis(5);
        for second in 0..10 {
            watch.record(&answered(rtt, None), at(second));
            watch.record(&lost(), at(second));
        }
        let expected = EchoSummary { decided: 10, lost: 5, rtt: Some(rtt) };
        assert_eq!(watch.echoes(0, at(5), at(10)), expected);
        assert_eq!(watch.echoes(1, at(5), at(10)), EchoSummary::default());
    }

    #[test]
    fn requested_trace_is_one_of_all_flows() {
        let mut watch = EchoWatch::default();
        watch.trigger(Trigger::Mtu);
        assert_eq!(watch.take(), Some(Finding::Trigger { flow: None, trigger: Trigger::Mtu }));
        assert_eq!(watch.take(), None);
    }

    /// The samples, by their number, with which the level shifts; RTTs in microseconds.
    fn shifts(rtts: impl IntoIterator<Item = u64>) -> Vec<usize> {
        let mut level = RttLevel::default();
        let found = (1..)
            .zip(rtts)
            .filter_map(|(number, rtt)| level.add(Duration::from_micros(rtt)).then_some(number));
        found.collect()
    }

    #[test]
    fn level_is_compared_every_fifth_sample_from_the_twentieth_on() {
        for before in 1..120 {
            let samples = std::iter::repeat_n(20_000, before).chain([30_000; 30]);
            // Three of the latest five samples, and less than half of those before.
            let found = (before + 3).next_multiple_of(5).max(20);
            let expected = if before > 7 { vec![found] } else { vec![] };
            assert_eq!(shifts(samples), expected, "after {before} samples");
        }
    }

    #[test]
    fn shift_is_more_than_a_twentieth_and_more_than_a_millisecond() {
        for (from, to, is_shift) in [
            (40_000, 42_000, false),
            (40_000, 42_001, true),
            (40_000, 37_999, true),
            (5_000, 6_000, false),
            (5_000, 6_001, true),
        ] {
            let samples = [from; 50].into_iter().chain([to; 20]);
            assert_eq!(shifts(samples).len(), usize::from(is_shift), "{from} to {to}");
        }
    }

    #[test]
    fn deviation_is_that_of_the_latest_45_samples() {
        let noise = [21_000, 5_000, 35_000, 12_000, 28_000].repeat(60);
        for (calm, is_shift) in [(15, false), (25, true)] {
            let samples = noise.iter().copied().chain(std::iter::repeat_n(20_000, calm));
            assert_eq!(shifts(samples.chain([24_000; 5])).len(), usize::from(is_shift), "{calm}");
        }
    }

    #[test]
    fn flow_that_has_recovered_is_found_again() {
        let twice = |flow: u8, tick: u64| flow == 3 && tick % 10 == 9 && !(1_000..2_000).contains(&tick);
        assert_eq!(lossy_flows(300, twice).len(), 2);
    }

    #[test]
    fn third_loss_in_a_row_is_a_trigger() {
        let mut watch = EchoWatch::default();
        let trigger = [Finding::Trigger { flow: Some(0), trigger: Trigger::Loss }];
        for _ in 0..2 {
            assert_eq!(findings(&mut watch, &lost()), []);
            assert_eq!(findings(&mut watch, &lost()), []);
            assert_eq!(findings(&mut watch, &answered(Duration::from_millis(5), None)), []);
        }
        assert_eq!(findings(&mut watch, &lost()), []);
        assert_eq!(findings(&mut watch, &lost()), []);
        assert_eq!(findings(&mut watch, &lost()), trigger);
        assert_eq!(findings(&mut watch, &lost()), [], "once per run of losses");
    }

    #[test]
    fn shifted_rtt_is_a_trigger_once_and_noise_is_none() {
        let mut watch = EchoWatch::default();
        let mut shifts = |base: u64, count: u64| {
            let found = (0..count).flat_map(|index| {
                // Noise of up to 20 %, and one outlier in ten.
                let noise = base * (index % 7) / 30;
                let outlier = if index % 10 == 9 { 5 * base } else { 0 };
                findings(&mut watch, &answered(Duration::from_micros(base + noise + outlier), None))
            });
            found.count()
        };
        assert_eq!(shifts(20_000, 200), 0);
        assert_eq!(shifts(30_000, 200), 1);
        assert_eq!(shifts(20_000, 200), 1);
    }
}
