//! The search for the number of routers where replies do not tell it.

/// What the answers so far say about the number of routers up to the destination.
///
/// Probes of several traces take part: where routers limit their answers, no single trace may have an answer
/// on both sides of the last router.
#[derive(Debug, Default)]
pub(super) struct DistanceSearch {
    /// The largest TTL at which a router answered; 0: none has.
    farthest_router: u8,
    /// The smallest TTL that reached the destination; `None`: none has.
    nearest_destination: Option<u8>,
}

impl DistanceSearch {
    /// A probe with this TTL reached the destination, or ended at a router. Answers that contradict each
    /// other are of different routes: then the search begins again.
    pub(super) fn answered(&mut self, ttl: u8, is_reached: bool) {
        match (is_reached, self.nearest_destination) {
            (true, Some(nearest)) => self.nearest_destination = Some(nearest.min(ttl)),
            (true, None) => self.nearest_destination = Some(ttl),
            (false, _) => self.farthest_router = self.farthest_router.max(ttl),
        }
        if self.nearest_destination.is_some_and(|nearest| nearest <= self.farthest_router) {
            *self = Self::default();
        }
    }

    /// The number of routers; `None` until the TTLs before and behind the last router were answered.
    pub(super) fn routers(&self) -> Option<u8> {
        (self.nearest_destination? == self.farthest_router + 1).then_some(self.farthest_router)
    }

    /// The largest possible number of routers; `None` if the destination has not answered.
    pub(super) fn routers_max(&self) -> Option<u8> {
        Some(self.nearest_destination?.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_on_both_sides_of_the_last_router_end_the_search() {
        let mut search = DistanceSearch::default();
        for (ttl, is_reached, routers, routers_max) in [
            (2, false, None, None),
            (9, true, None, Some(8)),
            (6, true, None, Some(5)),
            (8, true, None, Some(5)),
            (5, false, Some(5), Some(5)),
            (1, false, Some(5), Some(5)),
        ] {
            search.answered(ttl, is_reached);
            assert_eq!((search.routers(), search.routers_max()), (routers, routers_max), "{ttl}");
        }
    }

    #[test]
    fn destination_may_be_behind_no_router() {
        let mut search = DistanceSearch::default();
        search.answered(1, true);
        assert_eq!(search.routers(), Some(0));
    }

    #[test]
    fn contradicting_answers_begin_the_search_again() {
        for (first, second) in [((4, true), (4, false)), ((6, false), (5, true))] {
            let mut search = DistanceSearch::default();
            search.answered(first.0, first.1);
            search.answered(second.0, second.1);
            assert_eq!((search.routers(), search.routers_max()), (None, None));
        }
    }
}
