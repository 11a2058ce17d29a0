//! The series of a traced path in both directions.

use std::sync::Arc;

use pathmeter_proto::trace::{Direction, Route, TraceReport};

use crate::metrics::AnySeries;
use crate::metrics::trace::TraceSeries;
use crate::metrics::trace_hops::HopSeries;
use crate::paths::PathKey;

/// The series of both directions.
#[derive(Debug, Clone)]
pub(super) struct DirectedSeries {
    forward: SeriesOfDirection,
    reverse: SeriesOfDirection,
    /// Whether the way back can be traced.
    has_reverse: bool,
}

#[derive(Debug, Clone)]
struct SeriesOfDirection {
    path: Arc<TraceSeries>,
    /// `None` unless the probe exports its hops.
    hops: Option<Arc<HopSeries>>,
}

impl DirectedSeries {
    /// The series of a path; the counts of `earlier` continue. `has_reverse`: whether the way back can be
    /// traced; its series are not exported otherwise. `hops_max` is the largest TTL of hops that are
    /// exported; `None`: hops have no series.
    pub(super) fn new(key: &PathKey, has_reverse: bool, hops_max: Option<u8>, earlier: Option<Self>) -> Self {
        let PathKey { probe, peer, family } = key;
        let new = |direction| {
            let earlier = earlier.as_ref().map(|earlier| earlier.in_direction(direction).clone());
            let (path, hops) = earlier.map_or((None, None), |earlier| (Some(earlier.path), earlier.hops));
            SeriesOfDirection {
                path: path.unwrap_or_else(|| Arc::new(TraceSeries::new(probe, peer, family, direction))),
                hops: hops_max.map(|hops_max| {
                    let hops = hops.filter(|hops| hops.hops_max() == hops_max);
                    hops.unwrap_or_else(|| Arc::new(HopSeries::new(probe, peer, family, direction, hops_max)))
                }),
            }
        };
        Self { forward: new(Direction::Forward), reverse: new(Direction::Reverse), has_reverse }
    }

    fn in_direction(&self, direction: Direction) -> &SeriesOfDirection {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Reverse => &self.reverse,
        }
    }

    /// The series of the path in one direction.
    pub(super) fn of(&self, direction: Direction) -> &Arc<TraceSeries> {
        &self.in_direction(direction).path
    }

    /// The series to export.
    pub(super) fn all(&self) -> Vec<Arc<dyn AnySeries>> {
        let mut all: Vec<Arc<dyn AnySeries>> = Vec::new();
        let reverse = Some(&self.reverse).filter(|_| self.has_reverse);
        for SeriesOfDirection { path, hops } in std::iter::once(&self.forward).chain(reverse) {
            all.push(Arc::clone(path) as _);
            all.extend(hops.as_ref().map(|hops| Arc::clone(hops) as _));
        }
        all
    }

    /// Counts what a report says. `now` is the wall clock in nanoseconds since 1970.
    pub(super) fn record(&self, direction: Direction, report: &TraceReport, now: u64) {
        let SeriesOfDirection { path, hops } = self.in_direction(direction);
        path.record(report, now);
        if let Some(hops) = hops {
            hops.record(report);
        }
    }

    /// Sets the current routes of the flows.
    pub(super) fn set_routes<'a>(
        &self,
        direction: Direction,
        routes: impl Iterator<Item = Option<&'a Route>> + Clone,
    ) {
        let SeriesOfDirection { path, hops } = self.in_direction(direction);
        if let Some(hops) = hops {
            let first = routes.clone().next().flatten();
            hops.set_route(first.map_or(&[][..], |route| &route.hops));
        }
        path.set_routes(routes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_hops_continue_unless_the_largest_ttl_changes() {
        let key = PathKey { probe: "routes".into(), peer: "ams-1".into(), family: "ipv4" };
        let hops = |series: &DirectedSeries| series.forward.hops.clone().unwrap();
        let first = DirectedSeries::new(&key, true, Some(30), None);
        let same = DirectedSeries::new(&key, true, Some(30), Some(first.clone()));
        assert!(Arc::ptr_eq(&hops(&first), &hops(&same)));
        assert!(Arc::ptr_eq(first.of(Direction::Reverse), same.of(Direction::Reverse)));
        let other = DirectedSeries::new(&key, true, Some(20), Some(first.clone()));
        assert!(!Arc::ptr_eq(&hops(&first), &hops(&other)));
        assert!(Arc::ptr_eq(first.of(Direction::Forward), other.of(Direction::Forward)));
        assert!(DirectedSeries::new(&key, true, None, Some(first)).forward.hops.is_none());
    }
}
