//! The table of results.

use std::fmt;

/// One figure with that of the bare loop and its budget.
#[derive(Debug)]
pub(crate) struct Row {
    what: String,
    unit: &'static str,
    measured: f64,
    bare: Option<f64>,
    budget: Option<f64>,
}

/// Header of the table.
pub(crate) const HEAD: &str = "\
| what | measured | bare loop | ratio | budget | met |
|---|---|---|---|---|---|";

impl Row {
    pub(crate) fn new(what: impl Into<String>, measured: f64, unit: &'static str) -> Self {
        Self { what: what.into(), unit, measured, bare: None, budget: None }
    }

    /// Adds the figure of the bare loop from the same run.
    pub(crate) fn bare(self, bare: f64) -> Self {
        Self { bare: Some(bare), ..self }
    }

    /// Adds the upper limit.
    pub(crate) fn budget(self, budget: f64) -> Self {
        Self { budget: Some(budget), ..self }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, unit, measured, bare, budget } = self;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
        let bare_shown = or_dash(bare.map(|bare| format!("{} {unit}", short(bare))));
        let ratio = or_dash(bare.filter(|bare| *bare > 0.0).map(|bare| format!("{:.2}", measured / bare)));
        let budget_shown = or_dash(budget.map(|budget| format!("≤ {} {unit}", short(budget))));
        let met = or_dash(budget.map(|budget| if *measured <= budget { "yes" } else { "**no**" }.to_owned()));
        write!(
            f,
            "| {what} | {} {unit} | {bare_shown} | {ratio} | {budget_shown} | {met} |",
            short(*measured)
        )
    }
}

/// Three significant digits below 100, whole numbers from there on.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The median.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
