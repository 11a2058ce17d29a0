//! What bandwidth runs may use of this host.

use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::bandwidth::ledger::DailyBudget;

use super::reader::{MappingReader, ValueReader};
use super::values::{bit_rate, duration, size};

/// What bandwidth runs may use of this host, as prober and as responder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BandwidthRules {
    /// Whether runs are allowed.
    pub enabled: bool,
    /// Maximum runs at a time; further ones wait.
    pub runs_max: u16,
    /// Maximum bits of payload per second of a run; `None`: no limit.
    pub rate_max: Option<u64>,
    /// Maximum bytes of payload of a run.
    pub run_bytes_max: u64,
    /// Maximum time in which a run sends.
    pub run_time_max: Duration,
    /// Bytes of payload that all runs may use each day, in UTC.
    pub bytes_per_day: u64,
    /// Bytes of payload that the runs of one path, or those of one client address, may use each day.
    pub path_bytes_per_day: u64,
}

impl BandwidthRules {
    /// The budgets of the ledger.
    #[must_use]
    pub fn budget(&self) -> DailyBudget {
        DailyBudget { host: Some(self.bytes_per_day), path: Some(self.path_bytes_per_day) }
    }
}

/// Runs at a time. Chosen: two runs that share a link measure each other.
const RUNS: u16 = 1;
const RUNS_ALLOWED: RangeInclusive<i128> = 1..=1_000;

/// Rates of 100 ms hold at least one datagram of 1,200 bytes.
const RATE_ALLOWED: RangeInclusive<u64> = 100_000..=1_000_000_000_000;

/// Bytes of a run. Chosen: ten seconds at 1 Gbit/s, and more.
const RUN_BYTES: u64 = 2_000_000_000;
const RUN_BYTES_ALLOWED: RangeInclusive<u64> = 100_000..=1_000_000_000_000;

/// Time of a run. Chosen: three times what speed tests take.
const RUN_TIME: Duration = Duration::from_secs(30);
const RUN_TIME_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);

/// Bytes of a day. Chosen: 0.2 % of what a port of 1 Gbit/s can carry, and half of it for one path.
const DAY_BYTES: u64 = 20_000_000_000;
const PATH_DAY_BYTES: u64 = 10_000_000_000;
const DAY_BYTES_ALLOWED: RangeInclusive<u64> = 0..=1_000_000_000_000_000;

pub(super) fn bandwidth(section: &mut MappingReader<'_, '_>) -> Option<BandwidthRules> {
    let enabled = section.key("enabled", ValueReader::boolean).or(true);
    let runs_max = section.key("runs_max", |value| value.number(&RUNS_ALLOWED)).or(RUNS);
    let rate_max = section.key("rate_max", |value| bit_rate(value, &RATE_ALLOWED)).optional();
    let run_bytes_max = section.key("run_bytes_max", |value| size(value, &RUN_BYTES_ALLOWED)).or(RUN_BYTES);
    let run_time_max = section.key("run_time_max", |value| duration(value, &RUN_TIME_ALLOWED)).or(RUN_TIME);
    let bytes_per_day = section.key("bytes_per_day", |value| size(value, &DAY_BYTES_ALLOWED)).or(DAY_BYTES);
    let path_bytes_per_day =
        section.key("path_bytes_per_day", |value| size(value, &DAY_BYTES_ALLOWED)).or(PATH_DAY_BYTES);
    Some(BandwidthRules {
        enabled: enabled?,
        runs_max: runs_max?,
        rate_max: rate_max?,
        run_bytes_max: run_bytes_max?,
        run_time_max: run_time_max?,
        bytes_per_day: bytes_per_day?,
        path_bytes_per_day: path_bytes_per_day?,
    })
}
