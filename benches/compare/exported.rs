//! Round trips as a dashboard shows them: quantiles of an exported histogram, as `histogram_quantile()`
//! computes them.

use pathmeter_lab::exchange::Exchanges;

use crate::table::{self, mean, quantile, short};
use crate::tools::{ExportedHistogram, ToolReport};

/// Name of the tool; then true and shown mean, median and 99th percentile, in milliseconds.
pub(crate) fn row(name: &str, report: &ToolReport, truth: &Exchanges) -> Option<[String; 7]> {
    let page = report.page.as_ref()?;
    let mut true_ones: Vec<f64> = truth
        .iter()
        .filter_map(|(_, exchange)| exchange.round_trip())
        .map(|took| std::time::Duration::from_nanos(took.nanos).as_secs_f64() * 1e3)
        .collect();
    true_ones.sort_by(f64::total_cmp);
    let shown = |q| short(page.quantile(q) * 1e3);
    Some([
        name.to_owned(),
        short(mean(&true_ones)),
        short(page.mean() * 1e3),
        short(quantile(&true_ones, 0.5)),
        shown(0.5),
        short(quantile(&true_ones, 0.99)),
        shown(0.99),
    ])
}

pub(crate) fn table(rows: &[[String; 7]]) -> String {
    table::table(["program", "mean, ms", "shown", "p50, ms", "shown", "p99, ms", "shown"], rows)
}

impl ExportedHistogram {
    fn mean(&self) -> f64 {
        self.sum("_sum") / self.sum("_count")
    }

    fn sum(&self, suffix: &str) -> f64 {
        self.lines(suffix).map(|(_, value)| value).sum()
    }

    /// Interpolates linearly within a bucket.
    fn quantile(&self, q: f64) -> f64 {
        let bound = |labels: &str| labels.split_once("le=\"")?.1.split_once('"')?.0.parse::<f64>().ok();
        let buckets: Vec<(f64, f64)> =
            self.lines("_bucket").filter_map(|(labels, count)| Some((bound(labels)?, count))).collect();
        let rank = buckets.last().map_or(0.0, |(_, all)| all * q);
        let (mut low, mut below) = (0.0, 0.0);
        for (high, count) in buckets {
            if count >= rank {
                return low + (high - low) * (rank - below) / (count - below);
            }
            (low, below) = (high, count);
        }
        f64::NAN
    }

    /// Labels and value of each series.
    fn lines<'a>(&'a self, suffix: &'a str) -> impl Iterator<Item = (&'a str, f64)> + 'a {
        self.text.lines().filter_map(move |line| {
            let rest = line.strip_prefix(self.name)?.strip_prefix(suffix)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            Some((labels, value.parse().ok()?))
        })
    }
}
