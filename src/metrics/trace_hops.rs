//! Series of the hops of traced paths, for probes with `hop_metrics`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pathmeter_proto::time::nanos;
use pathmeter_proto::trace::{DESTINATION, Direction, HopRouter, HopState, Trace, TraceReport};

use super::block::Series;
use super::text::{Cell, Family, Suffix, counter, gauge, label};
use super::trace::path_labels;

/// The hops of one path in one direction. Only the hops of the latest trace are on the page, and only the
/// current router of each, so a change of the route does not add series.
#[derive(Debug)]
pub struct HopSeries {
    labels: String,
    /// Index: TTL − 1.
    counts: Vec<HopCounts>,
    /// The hops of the latest trace of flow 0. Index: TTL − 1.
    hops: Mutex<Vec<ShownHop>>,
}

/// Probes of one TTL.
#[derive(Debug)]
struct HopCounts {
    /// The label `ttl` as the end of a line's labels.
    rest: String,
    sent: Cell,
    answered: Cell,
}

#[derive(Debug, Clone, Default)]
struct ShownHop {
    state: Option<HopState>,
    rtt: Option<Duration>,
    routers: String,
}

impl HopSeries {
    /// The series of one path in one direction: no hops yet.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str, direction: Direction, hops_max: u8) -> Self {
        let counts = (1..=hops_max).map(|ttl| HopCounts {
            rest: format!(",ttl=\"{ttl}\"}} "),
            sent: Cell::default(),
            answered: Cell::default(),
        });
        Self {
            labels: path_labels(probe, peer, family, direction),
            counts: counts.collect(),
            hops: Mutex::default(),
        }
    }

    /// The largest TTL whose hop has series.
    #[must_use]
    pub fn hops_max(&self) -> u8 {
        u8::try_from(self.counts.len()).unwrap_or(u8::MAX)
    }

    /// Counts what a report says.
    pub fn record(&self, report: &TraceReport) {
        match report {
            TraceReport::Sent { ttl } => self.count(*ttl, |counts| counts.sent.inc()),
            TraceReport::Answered { ttl, .. } => self.count(*ttl, |counts| counts.answered.inc()),
            TraceReport::Traced(trace) if trace.flow == 0 => self.traced(trace),
            TraceReport::Traced(_)
            | TraceReport::Unanswered { .. }
            | TraceReport::Withdrawn
            | TraceReport::Rejected { .. }
            | TraceReport::SendError(_)
            | TraceReport::Deferred(_)
            | TraceReport::Unmatched
            | TraceReport::LossyFlow { .. }
            | TraceReport::Reachability(_)
            | TraceReport::TtlClamped { .. }
            | TraceReport::Route { .. } => {}
        }
    }

    fn count(&self, ttl: u8, change: impl FnOnce(&HopCounts)) {
        if ttl != DESTINATION
            && let Some(counts) = usize::from(ttl).checked_sub(1).and_then(|index| self.counts.get(index))
        {
            change(counts);
        }
    }

    fn traced(&self, trace: &Trace) {
        let mut hops = self.lock();
        hops.resize(trace.hops.len().min(self.counts.len()), ShownHop::default());
        for (shown, hop) in hops.iter_mut().zip(&trace.hops) {
            // Without a probe in this trace the hop is as it was.
            if !matches!(hop.state, HopState::Inherited | HopState::NotProbed) {
                shown.state = Some(hop.state);
            }
            let last = hop.answers.last().map(|answer| answer.rtt);
            shown.rtt = last.or_else(|| Some(hop.responder.as_ref()?.rtt_last));
        }
    }

    /// Sets the current route of flow 0. The hop with TTL `n` is at index `n − 1`.
    pub fn set_route(&self, route: &[HopRouter]) {
        let mut hops = self.lock();
        for (index, shown) in hops.iter_mut().enumerate() {
            shown.routers.clear();
            match route.get(index) {
                Some(HopRouter::Single(router)) => shown.routers = router.to_string(),
                Some(HopRouter::Balanced(routers)) => {
                    let routers: Vec<String> = routers.iter().map(ToString::to_string).collect();
                    shown.routers = routers.join(",");
                }
                Some(HopRouter::Unknown) | None => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ShownHop>> {
        self.hops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counts of the hops on the page.
    fn shown_counts(&self) -> impl Iterator<Item = &HopCounts> {
        let length = self.lock().len();
        self.counts.iter().take(length)
    }
}

impl Series for HopSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = FAMILIES.len();

    fn lines_max(&self) -> usize {
        FAMILIES.len() * self.counts.len()
    }
}

/// In alphabetical order.
const FAMILIES: [Family<HopSeries>; 4] = [
    counter(
        "pathmeter_trace_hop_answers_total",
        "Trace probes with this TTL that a router or the peer answered, all flows.",
        |w, name, s| {
            for hop in s.shown_counts() {
                w.count(name, Suffix::None, &s.labels, &hop.rest, hop.answered.get());
            }
        },
    ),
    gauge(
        "pathmeter_trace_hop_info",
        "Always 1. The router and the state of a hop, flow 0. Labels: several routers are separated by commas, and router is empty if none has answered.",
        |w, name, s| {
            for (hop, counts) in s.lock().iter().zip(&s.counts) {
                let state = hop.state.map_or("", HopState::as_str);
                let labels = [label("router", &hop.routers), label("state", state)].join(",");
                w.count(name, Suffix::None, &s.labels, &format!(",{labels}{}", counts.rest), 1);
            }
        },
    ),
    counter(
        "pathmeter_trace_hop_probes_total",
        "Trace probes sent with this TTL, all flows.",
        |w, name, s| {
            for hop in s.shown_counts() {
                w.count(name, Suffix::None, &s.labels, &hop.rest, hop.sent.get());
            }
        },
    ),
    gauge(
        "pathmeter_trace_hop_rtt_seconds",
        "RTT of the latest answer at this hop, flow 0. Absent if the hop has not answered.",
        |w, name, s| {
            for (hop, counts) in s.lock().iter().zip(&s.counts) {
                if let Some(rtt) = hop.rtt {
                    w.seconds(name, Suffix::None, &s.labels, &counts.rest, nanos(rtt));
                }
            }
        },
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    use pathmeter_proto::time::Timestamp;
    use pathmeter_proto::trace::{Answer, Hop, Trigger};

    use super::*;

    fn router(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    /// A trace of flow 0 with these hops: the router that answered, if one did, and the state.
    fn trace(hops: &[(Option<u8>, HopState)]) -> TraceReport {
        let hops = (1..).zip(hops).map(|(ttl, (last, state))| {
            let answers = last.map(|last| Answer::new(router(last), Duration::from_millis(last.into())));
            Hop { ttl, state: *state, sent: 1, answers: answers.into_iter().collect(), responder: None }
        });
        TraceReport::Traced(Box::new(Trace {
            flow: 0,
            trigger: Trigger::Interval,
            began: Timestamp::from_nanos(0),
            duration: Duration::ZERO,
            is_burst: false,
            rtt: None,
            routers: None,
            hops: hops.collect(),
            route: None,
            first_lossy_hop: None,
            is_ttl_clamped: false,
            rejection: None,
        }))
    }

    fn page(series: &HopSeries) -> Vec<String> {
        let mut page = Vec::new();
        for family in HopSeries::FAMILIES {
            family.write(&mut page, std::iter::once(series));
        }
        let lines = String::from_utf8(page).unwrap();
        let shown = |line: &str| {
            let line = line.replace("probe=\"routes\",peer=\"b\",family=\"ipv4\",direction=\"forward\",", "");
            line.trim_start_matches("pathmeter_trace_hop_").to_owned()
        };
        lines.lines().map(shown).collect()
    }

    #[test]
    fn page_shows_the_hops_of_the_latest_trace_with_their_current_routers() {
        let series = HopSeries::new("routes", "b", "ipv4", Direction::Forward, 30);
        assert_eq!(page(&series), Vec::<String>::new());
        for ttl in [1, 2, 2, 3, DESTINATION] {
            series.record(&TraceReport::Sent { ttl });
        }
        for ttl in [1, 2, DESTINATION] {
            let answer = Answer::new(router(ttl), Duration::from_millis(1));
            series.record(&TraceReport::Answered {
                flow: 0,
                ttl,
                answer,
                is_destination: ttl == DESTINATION,
            });
        }
        let answered = |last| (Some(last), HopState::Answered);
        series.record(&trace(&[answered(1), (None, HopState::Silent), answered(3)]));
        let balanced: BTreeSet<IpAddr> = [router(3), router(4)].into();
        let balanced = HopRouter::Balanced(balanced);
        series.set_route(&[HopRouter::Single(router(1)), HopRouter::Unknown, balanced]);
        let expected = [
            r#"answers_total{ttl="1"} 1"#,
            r#"answers_total{ttl="2"} 1"#,
            r#"answers_total{ttl="3"} 0"#,
            r#"info{router="192.0.2.1",state="answered",ttl="1"} 1"#,
            r#"info{router="",state="silent",ttl="2"} 1"#,
            r#"info{router="192.0.2.3,192.0.2.4",state="answered",ttl="3"} 1"#,
            r#"probes_total{ttl="1"} 1"#,
            r#"probes_total{ttl="2"} 2"#,
            r#"probes_total{ttl="3"} 1"#,
            r#"rtt_seconds{ttl="1"} 0.001"#,
            r#"rtt_seconds{ttl="3"} 0.003"#,
        ];
        assert_eq!(page(&series), expected);
    }

    #[test]
    fn hop_that_was_not_probed_keeps_its_state() {
        let series = HopSeries::new("routes", "b", "ipv4", Direction::Forward, 30);
        series.record(&trace(&[(Some(1), HopState::RateLimited)]));
        series.record(&trace(&[(None, HopState::Inherited)]));
        assert!(page(&series).contains(&r#"info{router="",state="rate_limited",ttl="1"} 1"#.to_owned()));
    }

    #[test]
    fn number_of_lines_does_not_grow_with_route_changes() {
        let series = HopSeries::new("routes", "b", "ipv4", Direction::Forward, 2);
        for last in 0..=255 {
            series.record(&trace(&[(Some(last), HopState::Answered); 3]));
            series.set_route(&[HopRouter::Single(router(last)), HopRouter::Single(router(last))]);
            assert_eq!(page(&series).len(), series.lines_max());
        }
        series.record(&trace(&[(Some(1), HopState::Answered)]));
        assert_eq!(page(&series).len(), series.lines_max() / 2, "the route has become shorter");
    }
}
