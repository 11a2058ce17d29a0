//! A table with a column for each load.

use std::io;

use super::super::machine::load_average;
use super::super::report::short;

/// Figures of one load, in row order.
#[derive(Debug, Default)]
pub(super) struct Column {
    head: String,
    cells: Vec<(&'static str, String)>,
    /// Whether the load was handled in full.
    is_met: bool,
}

impl Column {
    pub(super) fn new(head: impl Into<String>) -> Self {
        Self { head: head.into(), cells: Vec::new(), is_met: true }
    }

    /// Adds a figure with its unit.
    pub(super) fn add(&mut self, name: &'static str, value: f64, unit: &str) {
        let shown = if value >= 1e4 { grouped(value) } else { short(value) };
        self.cells.push((name, format!("{shown} {unit}").trim_end().to_owned()));
    }

    /// Adds several related figures in one cell.
    pub(super) fn add_all(&mut self, name: &'static str, values: &[f64]) {
        let values: Vec<String> = values.iter().map(|value| grouped(*value)).collect();
        self.cells.push((name, values.join(" / ")));
    }

    /// Marks the load as exceeded if `is_so`.
    pub(super) fn mark_exceeded(&mut self, is_so: bool) {
        self.is_met &= !is_so;
    }

    pub(super) fn add_load_average(&mut self) {
        self.cells.push(("load average", load_average()));
    }
}

/// Prints the loads side by side, and the first that was exceeded.
pub(super) fn print(out: &mut dyn io::Write, corner: &str, columns: &[Column]) -> io::Result<()> {
    let heads: Vec<&str> = columns.iter().map(|column| column.head.as_str()).collect();
    writeln!(out, "\n| {corner} | {} |\n|---|{}", heads.join(" | "), "---|".repeat(heads.len()))?;
    let names = columns.first().map_or(&[][..], |column| &column.cells);
    for (row, (name, _)) in names.iter().enumerate() {
        let cells: Vec<&str> = columns.iter().map(|column| column.cells[row].1.as_str()).collect();
        writeln!(out, "| {name} | {} |", cells.join(" | "))?;
    }
    let first = columns.iter().find(|column| !column.is_met);
    let first = first.map_or("none of them", |column| column.head.as_str());
    writeln!(out, "\nFirst that was not met in full: {first}.")
}

/// A whole number with thousands separators.
pub(super) fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut shown = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}
