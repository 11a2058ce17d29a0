//! The ledger of the bytes that bandwidth runs may use each day.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::time::WallTime;

/// Maximum paths in a ledger. Runs of further ones are refused until the next day. Chosen: the number of
/// paths that an agent is built for.
pub const LEDGER_PATHS_MAX: usize = 10_000;

const DAY: u64 = 24 * 3600 * 1_000_000_000;

/// What may be used each day (UTC), in bytes; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DailyBudget {
    /// By all paths of the host together.
    pub host: Option<u64>,
    /// By each path.
    pub path: Option<u64>,
}

/// Why bytes cannot be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// The budget of the host has too few left.
    #[error("the budget of this host has {left} bytes left today")]
    Host {
        /// Bytes that are left.
        left: u64,
    },
    /// The budget of the path has too few left.
    #[error("the budget of this path has {left} bytes left today")]
    Path {
        /// Bytes that are left.
        left: u64,
    },
    /// [`LEDGER_PATHS_MAX`] other paths have used bytes today.
    #[error("{LEDGER_PATHS_MAX} other paths have used bytes today")]
    Paths,
}

/// The bytes that were used today, of each path and of all together.
///
/// The bytes that a run may use are reserved before it begins and settled when it ends. If the reservation is
/// stored before the run, a crash in its middle makes the ledger count too much, never too little.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ByteLedger {
    day: u64,
    host: u64,
    paths: BTreeMap<String, u64>,
}

/// Bytes that a run may use. It must be settled.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Reservation {
    path: String,
    bytes: u64,
    day: u64,
}

impl Reservation {
    /// The reserved bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl ByteLedger {
    /// A ledger with what was used on a day, counted from 1970 in UTC. Paths beyond [`LEDGER_PATHS_MAX`] are
    /// left out; their bytes count for the host.
    pub fn restore(day: u64, host: u64, paths: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self { day, host, paths: paths.into_iter().take(LEDGER_PATHS_MAX).collect() }
    }

    /// The day, counted from 1970 in UTC.
    #[must_use]
    pub const fn day(&self) -> u64 {
        self.day
    }

    /// Bytes that all paths have used or reserved.
    #[must_use]
    pub const fn host(&self) -> u64 {
        self.host
    }

    /// Bytes that each path has used or reserved, by its name.
    pub fn paths(&self) -> impl Iterator<Item = (&str, u64)> {
        self.paths.iter().map(|(path, bytes)| (path.as_str(), *bytes))
    }

    /// Reserves bytes for a run of `path`.
    ///
    /// # Errors
    /// [`BudgetError`] if they exceed a budget. Nothing is reserved then.
    pub fn reserve(
        &mut self,
        now: WallTime,
        budget: DailyBudget,
        path: &str,
        bytes: u64,
    ) -> Result<Reservation, BudgetError> {
        self.begin_day(now);
        let of_path = self.paths.get(path).copied();
        if of_path.is_none() && self.paths.len() >= LEDGER_PATHS_MAX {
            return Err(BudgetError::Paths);
        }
        let left = left(budget.path, of_path.unwrap_or(0));
        if bytes > left {
            return Err(BudgetError::Path { left });
        }
        let left = self::left(budget.host, self.host);
        if bytes > left {
            return Err(BudgetError::Host { left });
        }
        self.host = self.host.saturating_add(bytes);
        let of_path = self.paths.entry(path.to_owned()).or_default();
        *of_path = of_path.saturating_add(bytes);
        Ok(Reservation { path: path.to_owned(), bytes, day: self.day })
    }

    /// Replaces a reservation by what the run has used, which may be more. A reservation of another day
    /// changes nothing: it counted on its day.
    pub fn settle(&mut self, reservation: Reservation, used: u64) {
        let Reservation { path, bytes, day } = reservation;
        if day != self.day {
            return;
        }
        let settle = |total: &mut u64| *total = total.saturating_sub(bytes).saturating_add(used);
        settle(&mut self.host);
        if let Some(of_path) = self.paths.get_mut(&path) {
            settle(of_path);
        }
    }

    /// Bytes that are left today for a path; `None`: no limit.
    #[must_use]
    pub fn left(&self, now: WallTime, budget: DailyBudget, path: &str) -> Option<u64> {
        let is_today = day_of(now) <= self.day;
        let used = |bytes: u64| if is_today { bytes } else { 0 };
        let host = budget.host.map(|host| host.saturating_sub(used(self.host)));
        let of_path = self.paths.get(path).copied().unwrap_or(0);
        let path = budget.path.map(|path| path.saturating_sub(used(of_path)));
        [host, path].into_iter().flatten().min()
    }

    /// The time until the budgets are full again.
    #[must_use]
    pub fn renewed_in(now: WallTime) -> Duration {
        Duration::from_nanos(DAY - now.as_nanos() % DAY)
    }

    /// Begins a new day at midnight. A wall clock that was set back by up to a day continues the day that has
    /// begun. One that was set back further does not clear the ledger either, but its day counts from then
    /// on: a day in the far future does not stay.
    fn begin_day(&mut self, now: WallTime) {
        let today = day_of(now);
        if today > self.day {
            (self.host, self.paths) = (0, BTreeMap::new());
        }
        if today.saturating_add(1) != self.day {
            self.day = today;
        }
    }
}

fn day_of(now: WallTime) -> u64 {
    now.as_nanos() / DAY
}

/// What is left of a budget.
fn left(budget: Option<u64>, used: u64) -> u64 {
    budget.map_or(u64::MAX, |budget| budget.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: WallTime = WallTime::from_nanos(20_000 * DAY + DAY / 2);
    const BUDGET: DailyBudget = DailyBudget { host: Some(1_000), path: Some(400) };

    fn days_later(days: u64) -> WallTime {
        WallTime::from_nanos(NOON.as_nanos() + days * DAY)
    }

    #[test]
    fn reservations_count_until_they_are_settled() {
        let mut ledger = ByteLedger::default();
        let first = ledger.reserve(NOON, BUDGET, "a", 400).unwrap();
        assert_eq!(ledger.reserve(NOON, BUDGET, "a", 1), Err(BudgetError::Path { left: 0 }));
        assert_eq!(ledger.left(NOON, BUDGET, "a"), Some(0));
        ledger.settle(first, 150);
        assert_eq!(ledger.left(NOON, BUDGET, "a"), Some(250));
        assert_eq!(ledger.host(), 150);
        let _b = ledger.reserve(NOON, BUDGET, "b", 400).unwrap();
        let _c = ledger.reserve(NOON, BUDGET, "c", 400).unwrap();
        assert_eq!(ledger.reserve(NOON, BUDGET, "d", 100), Err(BudgetError::Host { left: 50 }));
        assert_eq!(ledger.left(NOON, BUDGET, "a"), Some(50), "that of the host is smaller");
        assert_eq!(ledger.paths().collect::<Vec<_>>(), [("a", 150), ("b", 400), ("c", 400)]);
    }

    #[test]
    fn run_that_used_more_than_it_reserved_is_counted_in_full() {
        let mut ledger = ByteLedger::default();
        let reserved = ledger.reserve(NOON, BUDGET, "a", 100).unwrap();
        assert_eq!(reserved.bytes(), 100);
        ledger.settle(reserved, 300);
        assert_eq!((ledger.host(), ledger.left(NOON, BUDGET, "a")), (300, Some(100)));
    }

    #[test]
    fn budgets_are_full_again_at_midnight_in_utc() {
        let mut ledger = ByteLedger::default();
        let late = ledger.reserve(NOON, BUDGET, "a", 400).unwrap();
        assert_eq!(ByteLedger::renewed_in(NOON), Duration::from_secs(12 * 3600));
        let midnight = WallTime::from_nanos(20_001 * DAY);
        assert_eq!(ByteLedger::renewed_in(midnight), Duration::from_secs(24 * 3600));
        let before = WallTime::from_nanos(midnight.as_nanos() - 1);
        assert_eq!(ledger.left(before, BUDGET, "a"), Some(0));
        assert_eq!(ledger.left(midnight, BUDGET, "a"), Some(400));
        let _next = ledger.reserve(midnight, BUDGET, "a", 100).unwrap();
        ledger.settle(late, 400);
        assert_eq!((ledger.day(), ledger.host()), (20_001, 100), "the run of the day before is not counted");
    }

    #[test]
    fn wall_clock_that_is_set_back_or_far_ahead_gives_no_bytes_back_and_keeps_none_for_ever() {
        let mut ledger = ByteLedger::default();
        let _ahead = ledger.reserve(days_later(1_000), BUDGET, "a", 400).unwrap();
        assert_eq!(ledger.reserve(NOON, BUDGET, "a", 1), Err(BudgetError::Path { left: 0 }));
        assert_eq!(ledger.left(NOON, BUDGET, "a"), Some(0));
        assert!(ledger.reserve(days_later(1), BUDGET, "a", 400).is_ok());
    }

    #[test]
    fn day_that_comes_twice_is_counted_once() {
        let mut ledger = ByteLedger::default();
        let _today = ledger.reserve(days_later(1), BUDGET, "a", 400).unwrap();
        assert_eq!(ledger.reserve(NOON, BUDGET, "a", 1), Err(BudgetError::Path { left: 0 }));
        assert_eq!(ledger.reserve(days_later(1), BUDGET, "a", 1), Err(BudgetError::Path { left: 0 }));
        assert!(ledger.reserve(days_later(2), BUDGET, "a", 1).is_ok());
    }

    #[test]
    fn number_of_paths_is_limited() {
        let mut ledger = ByteLedger::default();
        let unlimited = DailyBudget { host: None, path: None };
        for index in 0..LEDGER_PATHS_MAX {
            let _ = ledger.reserve(NOON, unlimited, &index.to_string(), 1).unwrap();
        }
        assert_eq!(ledger.reserve(NOON, unlimited, "another", 1), Err(BudgetError::Paths));
        assert!(ledger.reserve(NOON, unlimited, "0", 1).is_ok());
        assert!(ledger.reserve(days_later(1), unlimited, "another", 1).is_ok());
        assert_eq!(ledger.left(NOON, unlimited, "another"), None);
    }

    #[test]
    fn restored_ledger_is_the_same() {
        let mut ledger = ByteLedger::default();
        let _a = ledger.reserve(NOON, BUDGET, "a", 100).unwrap();
        let _b = ledger.reserve(NOON, BUDGET, "b", 200).unwrap();
        let paths = ledger.paths().map(|(path, bytes)| (path.to_owned(), bytes)).collect::<Vec<_>>();
        assert_eq!(ByteLedger::restore(ledger.day(), ledger.host(), paths), ledger);
    }
}
