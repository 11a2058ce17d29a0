//! Which value of the file is meant.

use std::fmt;

/// The way from the top of the file to a value, or to the key of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValuePath<'a> {
    steps: Vec<PathStep<'a>>,
    end: PathEnd,
}

/// What lies at the end of the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathEnd {
    /// The last step's key.
    Key,
    /// The last step's value.
    Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathStep<'a> {
    /// Into a mapping, to the entry of that index; `None`: the key is not in it.
    Entry(Option<usize>, &'a str),
    /// Into a list.
    Item(usize),
}

impl<'a> ValuePath<'a> {
    /// The file as a whole.
    pub(super) fn top() -> Self {
        Self { steps: Vec::new(), end: PathEnd::Value }
    }

    /// The value of an entry; the index counts entries, because two of them may have the same key.
    pub(super) fn entry(&self, index: usize, key: &'a str) -> Self {
        self.step(PathStep::Entry(Some(index), key))
    }

    /// The key of the entry whose value this is.
    pub(super) fn at_key(self) -> Self {
        Self { end: PathEnd::Key, ..self }
    }

    /// The value that would be there if the key were.
    pub(super) fn missing(&self, key: &'a str) -> Self {
        self.step(PathStep::Entry(None, key))
    }

    /// An item of a list.
    pub(super) fn item(&self, index: usize) -> Self {
        self.step(PathStep::Item(index))
    }

    fn step(&self, step: PathStep<'a>) -> Self {
        Self { steps: self.steps.iter().copied().chain([step]).collect(), end: PathEnd::Value }
    }

    /// The indices to follow to what of the place is in the file, and what to look at there; `None` when that is
    /// only the file as a whole. Places sort by it in the order of the file.
    pub(super) fn indices(&self) -> Option<(Vec<usize>, PathEnd)> {
        let index = |step: &PathStep<'_>| match *step {
            PathStep::Entry(index, _) => index,
            PathStep::Item(index) => Some(index),
        };
        let indices: Vec<usize> = self.steps.iter().map_while(index).collect();
        let end = if indices.len() == self.steps.len() { self.end } else { PathEnd::Value };
        (!indices.is_empty()).then_some((indices, end))
    }
}

impl fmt::Display for ValuePath<'_> {
    /// Such as `probes[3].lost_after`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, step) in self.steps.iter().enumerate() {
            match *step {
                PathStep::Item(index) => write!(f, "[{index}]")?,
                PathStep::Entry(_, key) => {
                    f.write_str(if depth == 0 { "" } else { "." })?;
                    if !key.is_empty() && key.len() <= PLAIN_LEN_MAX && key.bytes().all(is_plain) {
                        f.write_str(key)?;
                    } else {
                        f.write_str(&super::diagnostic::quoted(key))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a key that is shown without quotes.
const PLAIN_LEN_MAX: usize = 64;

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'<')
}
