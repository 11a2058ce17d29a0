//! Quantiles of a complete list of values.

use std::time::Duration;

/// The `q`-quantile of `sorted` by nearest rank, with `q` between 0 and 1. `None` if fewer than ten values
/// lie beyond it: the p99 of 50 values would only be their maximum.
///
/// The rule `n · (1 − q) ≥ 10` requires 20 values for p50, 100 for p90 and 1,000 for p99.
#[must_use]
pub fn quantile(sorted: &[Duration], q: f64) -> Option<Duration> {
    const BEYOND: f64 = 10.0;
    // 52 bits of mantissa represent any length that fits in memory; the tolerance absorbs 1 − 0.9 ≠ 0.1.
    #[expect(clippy::cast_precision_loss, reason = "a length below 2⁵²")]
    let count = sorted.len() as f64;
    if count * (1.0 - q) < BEYOND - 1e-6 {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and the length")]
    let rank = (count * q).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_needs_ten_values_beyond_it() {
        let values: Vec<Duration> = (1..=1_000).map(Duration::from_micros).collect();
        assert_eq!(quantile(&values, 0.99), Some(Duration::from_micros(990)));
        assert_eq!(quantile(&values[..999], 0.99), None);
        assert_eq!(quantile(&values[..100], 0.90), Some(Duration::from_micros(90)));
        assert_eq!(quantile(&values[..20], 0.5), Some(Duration::from_micros(10)));
        assert_eq!(quantile(&values[..19], 0.5), None);
        assert_eq!(quantile(&[], 0.0), None);
    }
}
