//! Metric labels whose values are the variants of an enum.

use std::fmt;
use std::marker::PhantomData;

use super::text::{Cell, Suffix, Writer};

/// An enum whose variants are the values of a metric label. Implemented by [`labels!`], whose matches are
/// exhaustive.
pub(super) trait Labels: Copy + fmt::Debug + Send + Sync + 'static {
    /// All variants, in the order of the lines.
    const ALL: &'static [Self];

    /// Index in [`ALL`](Self::ALL).
    fn index(self) -> usize;

    /// The label's value, as on a page and in JSON: `buffer`.
    fn value(self) -> &'static str;

    /// The label as the end of a line's label set: `,error="buffer"} `.
    fn rest(self) -> &'static str;
}

/// Implements [`Labels`] for an enum: the label's name, and its value for each variant.
macro_rules! labels {
    ($type:ty, $label:literal, { $($variant:ident => $value:literal),+ $(,)? }) => {
        impl $crate::metrics::labels::Labels for $type {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn index(self) -> usize {
                enum Index { $($variant),+ }
                match self { $(Self::$variant => Index::$variant as usize),+ }
            }

            fn value(self) -> &'static str {
                match self {
                    $(Self::$variant => $value),+
                }
            }

            fn rest(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!(",", $label, "=\"", $value, "\"} ")),+
                }
            }
        }
    };
}
pub(super) use labels;

/// One counter for each value of a label. `N` is the number of values.
#[derive(Debug)]
pub(super) struct Labelled<L, const N: usize> {
    cells: [Cell; N],
    label: PhantomData<L>,
}

impl<L: Labels, const N: usize> Labelled<L, N> {
    const IS_COMPLETE: () = assert!(N == L::ALL.len(), "one cell for each variant");

    /// Returns the counter of one value.
    pub(super) fn of(&self, value: L) -> &Cell {
        &self.cells[value.index()]
    }

    /// Returns all values with their counts.
    pub(super) fn iter(&self) -> impl Iterator<Item = (L, u64)> + '_ {
        L::ALL.iter().zip(&self.cells).map(|(value, cell)| (*value, cell.get()))
    }

    /// Returns the sum of all counts.
    pub(super) fn total(&self) -> u64 {
        self.cells.iter().map(Cell::get).sum()
    }

    /// Writes one line for each value.
    pub(super) fn write(&self, writer: &mut Writer<'_>, name: &str, labels: &str) {
        for (value, count) in self.iter() {
            writer.count(name, Suffix::None, labels, value.rest(), count);
        }
    }

    /// Writes one line for each value, for a family without other labels.
    pub(super) fn write_alone(&self, writer: &mut Writer<'_>, name: &str) {
        for (value, count) in self.iter() {
            writer.count(name, Suffix::None, "", &value.rest()[1..], count);
        }
    }
}

impl<L: Labels, const N: usize> Default for Labelled<L, N> {
    fn default() -> Self {
        let () = Self::IS_COMPLETE;
        Self { cells: std::array::from_fn(|_| Cell::default()), label: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Outcome {
        Good,
        Bad,
    }

    labels!(Outcome, "outcome", { Good => "good", Bad => "bad" });

    #[test]
    fn each_label_value_has_its_own_counter_and_line() {
        let counts = Labelled::<Outcome, 2>::default();
        counts.of(Outcome::Bad).add(3);
        let mut page = Vec::new();
        counts.write(&mut Writer::new(&mut page), "x_total", "a=\"b\"");
        let expected = "x_total{a=\"b\",outcome=\"good\"} 0\nx_total{a=\"b\",outcome=\"bad\"} 3\n";
        assert_eq!(String::from_utf8(page).unwrap(), expected);
        assert_eq!(counts.total(), 3);
    }
}
