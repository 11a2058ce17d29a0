//! A metrics page.

/// The text of a scrape.
#[derive(Debug)]
pub(crate) struct MetricsText(pub(crate) String);

impl MetricsText {
    /// The sum of all series of this name.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.lines(name).map(|(_, value)| value).sum()
    }

    /// The upper bound of the bucket that contains the `q`-quantile of all round trips, in microseconds.
    pub(crate) fn rtt_bucket_us(&self, q: f64) -> f64 {
        const BUCKETS: &str = "pathmeter_echo_rtt_seconds_bucket";
        let mut totals: Vec<(f64, f64)> = Vec::new();
        for (labels, count) in self.lines(BUCKETS) {
            let Some(bound) = labels.split("le=\"").nth(1).and_then(|rest| rest.split('"').next()) else {
                continue;
            };
            let bound: f64 = bound.parse().unwrap_or(f64::INFINITY);
            match totals.iter_mut().find(|(known, _)| known.total_cmp(&bound).is_eq()) {
                Some((_, total)) => *total += count,
                None => totals.push((bound, count)),
            }
        }
        let all = totals.last().map_or(0.0, |(_, total)| *total);
        let found = totals.iter().find(|(_, total)| *total >= all * q);
        found.map_or(f64::NAN, |(bound, _)| bound * 1e6)
    }

    /// The mean of all round trips in microseconds.
    pub(crate) fn rtt_mean_us(&self) -> f64 {
        self.sum("pathmeter_echo_rtt_seconds_sum") * 1e6 / self.sum("pathmeter_echo_rtt_seconds_count")
    }

    /// Labels and value of each series of this name.
    fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> + 'a {
        self.0.lines().filter_map(move |line| {
            let labels = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
            let (labels, value) = labels.rsplit_once(' ')?;
            Some((labels, value.parse().ok()?))
        })
    }
}
