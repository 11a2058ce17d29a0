//! Sums of a metrics page, computed after the measurement: with 100,000 paths a page is 600 MB long, and
//! parsing it takes a core.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::time::{Duration, Instant};

use super::super::agent::BenchAgent;
use super::super::page::MetricsText;

/// Values by series, summed over all paths: `name`, or `name{label="value"}` without the labels of a path.
#[derive(Debug)]
pub(crate) struct Totals(BTreeMap<String, f64>);

impl Totals {
    pub(crate) fn of(page: &MetricsText) -> Self {
        let mut totals = BTreeMap::new();
        let mut key = String::new();
        for line in page.0.lines() {
            if let Some(value) = read(line, &mut key) {
                match totals.get_mut(key.as_str()) {
                    Some(total) => *total += value,
                    None => drop(totals.insert(key.clone(), value)),
                }
            }
        }
        Self(totals)
    }

    /// The value of a series, 0 if it does not exist.
    pub(crate) fn get(&self, series: &str) -> f64 {
        self.0.get(series).copied().unwrap_or(0.0)
    }

    /// Increase since `then`, over all series with this name.
    pub(crate) fn since(&self, then: &Self, name: &str) -> f64 {
        let sum = |totals: &Self| -> f64 {
            let is_it = |series: &str| {
                series == name || series.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'))
            };
            totals
                .0
                .range(name.to_owned()..)
                .take_while(|(s, _)| s.starts_with(name))
                .filter(|(s, _)| is_it(s))
                .map(|(_, v)| v)
                .sum()
        };
        sum(self) - sum(then)
    }

    /// Increase of one series since `then`.
    pub(crate) fn one_since(&self, then: &Self, series: &str) -> f64 {
        self.get(series) - then.get(series)
    }

    /// The upper bound of the bucket that contains the `q`-quantile of a histogram's increase since `then`.
    /// `labels` are those before `le`, with a trailing comma.
    pub(crate) fn quantile_since(&self, then: &Self, histogram: &str, labels: &str, q: f64) -> f64 {
        let begin = format!("{histogram}_bucket{{{labels}le=\"");
        let mut counts: Vec<(f64, f64)> = Vec::new();
        for (series, count) in
            self.0.range(begin.clone()..).take_while(|(series, _)| series.starts_with(&begin))
        {
            let bound = series[begin.len()..].trim_end_matches("\"}");
            counts.push((bound.parse().unwrap_or(f64::INFINITY), count - then.get(series)));
        }
        counts.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let all = counts.last().map_or(0.0, |(_, count)| *count);
        counts.iter().find(|(_, count)| *count >= all * q).map_or(f64::NAN, |(bound, _)| *bound)
    }
}

/// Parses a line: returns its value, and writes its series to `key`.
fn read(line: &str, key: &mut String) -> Option<f64> {
    const PATH: &str = "{probe=\"";
    let (series, value) = line.trim_end().rsplit_once(' ')?;
    let value = value.parse().ok()?;
    key.clear();
    match series.split_once(PATH) {
        Some((name, labels)) => {
            key.push_str(name);
            // Labels that distinguish the series of a probe are dropped as well.
            let rest = labels.split_once("family=\"").and_then(|(_, rest)| rest.split_once('"'));
            if let Some(rest) = rest.and_then(|(_, rest)| rest.strip_prefix(',')) {
                key.push('{');
                key.push_str(rest);
            }
        }
        None => key.push_str(series),
    }
    Some(value)
}

/// Duration of a scrape, and its length in bytes.
pub(crate) fn time_scrape(agent: &BenchAgent) -> io::Result<(Duration, f64)> {
    let (begin, mut bytes, mut buffer) = (Instant::now(), 0.0, vec![0; 1 << 20]);
    let mut page = agent.request_page()?;
    loop {
        match u32::try_from(page.read(&mut buffer)?).map_err(io::Error::other)? {
            0 => return Ok((begin.elapsed(), bytes)),
            count => bytes += f64::from(count),
        }
    }
}
