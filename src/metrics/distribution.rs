//! Histograms, and summaries without quantiles (a sum and a count).

use std::time::Duration;

use pathmeter_proto::time::nanos;

use super::text::{CLOSE, Cell, INFINITY, Suffix, Writer};

/// Upper bounds of RTT histograms in nanoseconds: 1-2-5 steps from 50 µs (inside a rack) to 5 s
/// (intercontinental, behind a full queue).
pub(super) const RTT_BOUNDS: [(u64, &str); 16] = [
    (50_000, r#",le="5e-05"} "#),
    (100_000, r#",le="0.0001"} "#),
    (200_000, r#",le="0.0002"} "#),
    (500_000, r#",le="0.0005"} "#),
    (1_000_000, r#",le="0.001"} "#),
    (2_000_000, r#",le="0.002"} "#),
    (5_000_000, r#",le="0.005"} "#),
    (10_000_000, r#",le="0.01"} "#),
    (20_000_000, r#",le="0.02"} "#),
    (50_000_000, r#",le="0.05"} "#),
    (100_000_000, r#",le="0.1"} "#),
    (200_000_000, r#",le="0.2"} "#),
    (500_000_000, r#",le="0.5"} "#),
    (1_000_000_000, r#",le="1.0"} "#),
    (2_000_000_000, r#",le="2.0"} "#),
    (5_000_000_000, r#",le="5.0"} "#),
];

/// Counts of values by upper bound. `N` is the number of bounds plus one.
#[derive(Debug)]
pub(super) struct Buckets<const N: usize> {
    counts: [Cell; N],
    sum: Cell,
}

impl<const N: usize> Default for Buckets<N> {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| Cell::default()), sum: Cell::default() }
    }
}

/// Writes a line whose value is a plain number or nanoseconds shown as seconds.
type WriteValue<'w> = fn(&mut Writer<'w>, &str, Suffix, &str, &str, u64);

impl<const N: usize> Buckets<N> {
    /// Counts a value.
    pub(super) fn add(&self, bounds: &[(u64, &str)], value: u64) {
        let bucket = bounds.partition_point(|(bound, _)| *bound < value);
        self.counts[bucket].inc();
        self.sum.add(value);
    }

    /// Returns the count of each bucket, not cumulated. The last bucket has the values above all bounds.
    pub(super) fn counts(&self) -> impl Iterator<Item = u64> + '_ {
        self.counts.iter().map(Cell::get)
    }

    /// Writes the lines of a histogram; `put` writes its sum.
    pub(super) fn write<'w>(
        &self,
        writer: &mut Writer<'w>,
        name: &str,
        labels: &str,
        bounds: &[(u64, &str)],
        put: WriteValue<'w>,
    ) {
        write_buckets(writer, name, labels, bounds, self.counts(), |writer| {
            put(writer, name, Suffix::Sum, labels, CLOSE, self.sum.get());
        });
    }

    /// Returns the sum of all values.
    pub(super) fn sum(&self) -> u64 {
        self.sum.get()
    }
}

/// Writes the lines of a histogram with these counts by bucket; `write_sum` writes the line of its sum.
pub(super) fn write_buckets<'w>(
    writer: &mut Writer<'w>,
    name: &str,
    labels: &str,
    bounds: &[(u64, &str)],
    counts: impl IntoIterator<Item = u64>,
    write_sum: impl FnOnce(&mut Writer<'w>),
) {
    let mut total = 0;
    let rest = bounds.iter().map(|(_, bound)| *bound).chain([INFINITY]);
    for (count, bound) in counts.into_iter().zip(rest) {
        total += count;
        writer.count(name, Suffix::Bucket, labels, bound, total);
    }
    write_sum(writer);
    writer.count(name, Suffix::Count, labels, CLOSE, total);
}

/// Sum and number of durations.
#[derive(Debug, Default)]
pub(super) struct SumAndCount {
    sum: Cell,
    count: Cell,
}

impl SumAndCount {
    /// Counts a duration.
    pub(super) fn add(&self, span: Duration) {
        self.sum.add(nanos(span));
        self.count.inc();
    }

    /// Returns the sum in nanoseconds, and the count.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.sum.get(), self.count.get())
    }

    /// Writes the lines of a summary; `rest` as in [`Writer::count`].
    pub(super) fn write(&self, writer: &mut Writer<'_>, name: &str, labels: &str, rest: &str) {
        writer.seconds(name, Suffix::Sum, labels, rest, self.sum.get());
        writer.count(name, Suffix::Count, labels, rest, self.count.get());
    }
}
