//! Markdown tables.

/// Formats a table.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&head.map(ToOwned::to_owned)) + "|" + &"---|".repeat(N) + "\n";
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// Placeholder for a missing value.
pub(crate) const NO_VALUE: &str = "–";

pub(crate) fn or_no_value(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NO_VALUE.to_owned(), |value| value.to_string())
}

/// Three significant digits below 100, whole numbers from there on.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if size.is_nan() => NO_VALUE.to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The `q`-quantile of sorted values, by nearest rank.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most the length")]
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let count = values.len() as f64;
    values.iter().sum::<f64>() / count
}
