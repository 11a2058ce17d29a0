//! Parses the text of a file into a tree, and finds the location of a value of the tree in the text.
//!
//! No other module uses the YAML library.

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::diagnostic::{Location, Problem};
use super::value_path::{PathEnd, ValuePath};

/// Maximum bytes of a file. Chosen: 20,000 peers with labels take a quarter of it.
pub(super) const FILE_BYTES_MAX: usize = 16 << 20;

/// A value of the file as it is written. A mapping keeps both entries of a duplicate key.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Self>),
    Mapping(Vec<(String, Self)>),
}

/// Reads the one document of a file. An empty file is [`Node::Null`].
///
/// # Errors
/// The first problem that makes the text invalid YAML, or YAML that is not supported: a second document, a
/// tag, a key that is not a scalar, nesting deeper than [`DEPTH_MAX`], aliases that expand beyond
/// [`TREE_BYTES_MAX`].
pub(super) fn read(text: &[u8]) -> Result<Node, Problem> {
    if text.len() > FILE_BYTES_MAX {
        let what = format!("the file has {} bytes", text.len());
        return Err(file_problem(None, what, format!("at most {FILE_BYTES_MAX} are allowed")));
    }
    reject_binary(text)?;
    let budget = Cell::new(TREE_BYTES_MAX);
    let mut documents = serde_yaml::Deserializer::from_slice(text);
    let Some(document) = documents.next() else {
        return Ok(Node::Null);
    };
    let node = NodeBuilder { depth: 0, budget: &budget }
        .deserialize(document)
        .map_err(|error| problem_from(&error))?;
    match documents.next() {
        None => Ok(node),
        Some(second) => {
            let location = location_in(second, &[], PathEnd::Value);
            let remedy = "a configuration is a single document: remove the line `---` before it".to_owned();
            Err(file_problem(location, "a second YAML document begins here".to_owned(), remedy))
        }
    }
}

/// Rejects what is not text. The library does so too, but does not report the line.
fn reject_binary(text: &[u8]) -> Result<(), Problem> {
    let valid = std::str::from_utf8(text).map_err(|error| {
        let (before, after) = text.split_at(error.valid_up_to());
        let location = std::str::from_utf8(before).map(Location::after).ok();
        let byte = after.first().copied().unwrap_or_default();
        file_problem(
            location,
            format!("byte 0x{byte:02x} is not valid UTF-8"),
            "save the file as UTF-8".to_owned(),
        )
    })?;
    let is_binary = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}');
    match valid.find(is_binary) {
        None => Ok(()),
        Some(at) => {
            let what = "control characters are not allowed".to_owned();
            let remedy = "remove it, or write it as an escape sequence in double quotes".to_owned();
            Err(file_problem(Some(Location::after(&valid[..at])), what, remedy))
        }
    }
}

/// Finds the locations of values in the text of a file that was [`read`].
///
/// The library reports a location only in an error, so each search reads the text again up to the value and
/// fails there on purpose.
#[derive(Debug)]
pub(super) struct Locator<'a> {
    text: &'a [u8],
    budget: usize,
}

impl<'a> Locator<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { text, budget: REREAD_BYTES_MAX }
    }

    /// The location of the value, or of the innermost value around it that is in the file. `None` for the
    /// whole file, and if [`REREAD_BYTES_MAX`] is used up.
    pub(super) fn find(&mut self, path: &ValuePath<'_>) -> Option<Location> {
        let (indices, end) = path.indices()?;
        self.budget = self.budget.checked_sub(self.text.len())?;
        location_in(serde_yaml::Deserializer::from_slice(self.text), &indices, end)
    }
}

fn location_in(document: serde_yaml::Deserializer<'_>, indices: &[usize], end: PathEnd) -> Option<Location> {
    let error = Walker { indices, end }.deserialize(document).err()?;
    error.location().map(|at| Location { line: at.line(), column: at.column() })
}

fn file_problem(location: Option<Location>, what: String, remedy: String) -> Problem {
    Problem { location, path: String::new(), what, remedy: Some(remedy) }
}

/// Converts an error of the library, with its location and, for a known error, a remedy.
fn problem_from(error: &serde_yaml::Error) -> Problem {
    let mut what = error.to_string();
    let location = error.location().map(|at| {
        let suffix = format!(" at line {} column {}", at.line(), at.column());
        if let Some(start) = what.find(&suffix) {
            what.replace_range(start..start + suffix.len(), "");
        }
        Location { line: at.line(), column: at.column() }
    });
    let known = KNOWN_ERRORS.iter().find(|(message, ..)| what.contains(message));
    match known {
        Some((_, replacement, remedy)) => Problem {
            location,
            path: String::new(),
            what: if replacement.is_empty() { what } else { (*replacement).to_owned() },
            remedy: Some((*remedy).to_owned()),
        },
        None => Problem { location, path: String::new(), what, remedy: None },
    }
}

/// Part of a message of the library, the text that replaces the message (empty: not replaced), and the
/// remedy.
const KNOWN_ERRORS: &[(&str, &str, &str)] = &[
    (
        "repetition limit exceeded",
        "aliases repeat too many values",
        "write values out instead of repeating them with `*`",
    ),
    (
        "unknown anchor",
        "this alias has no anchor before it",
        "write the anchor `&name` before the alias `*name`",
    ),
    (
        "found character that cannot start any token",
        "",
        "indent with spaces, and put text that begins with @, ` or % in quotes",
    ),
    (
        "mapping values are not allowed",
        "",
        "put text that contains `: ` in quotes, and check the indentation",
    ),
    (TOO_DEEP, TOO_DEEP, "no key of a configuration is nested this deeply"),
    (TOO_BIG, TOO_BIG, "use fewer values, and fewer aliases `*name`"),
    (TAGGED, TAGGED, "remove the word that begins with `!`, or put it in quotes"),
    (
        "expected a key",
        "the key is a list or a mapping",
        "keys are strings: put text that begins with [, { or ? in quotes",
    ),
];

const TOO_DEEP: &str = "the file is nested too deeply";
const TOO_BIG: &str = "the file has too many values";
const TAGGED: &str = "YAML tags are not supported";

/// Maximum levels of nesting. Chosen: twice what a configuration has.
const DEPTH_MAX: usize = 16;

/// Maximum bytes of a tree, which aliases can make larger than the text without bounds. Chosen: eight times
/// the largest file.
const TREE_BYTES_MAX: usize = 8 * FILE_BYTES_MAX;

/// Maximum bytes that are read again to find locations, so that a hundred problems in a huge file do not take
/// a minute. Chosen: about 2 s; locations in files below 640 KiB are always found.
const REREAD_BYTES_MAX: usize = 64 << 20;

/// Builds a tree within the limits of depth and size.
#[derive(Clone, Copy)]
struct NodeBuilder<'b> {
    depth: usize,
    budget: &'b Cell<usize>,
}

impl NodeBuilder<'_> {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            return Err(E::custom(TOO_DEEP));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }

    fn spend<E: serde::de::Error>(self, text_bytes: usize) -> Result<(), E> {
        let left = self.budget.get().checked_sub(size_of::<Node>() + text_bytes);
        self.budget.set(left.ok_or_else(|| E::custom(TOO_BIG))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for NodeBuilder<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, document: D) -> Result<Node, D::Error> {
        self.spend(0)?;
        document.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeBuilder<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        // Every number that does not fit is above all limits.
        Ok(Node::Int(value.try_into().unwrap_or(i128::MAX)))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Int(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Node, E> {
        self.spend(value.len())?;
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let inner = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let inner = self.deeper()?;
        let mut mapping = Vec::new();
        while let Some(KeyText(key)) = entries.next_key()? {
            self.spend(size_of::<String>() + key.len())?;
            mapping.push((key, entries.next_value_seed(inner)?));
        }
        Ok(Node::Mapping(mapping))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Node, A::Error> {
        Err(A::Error::custom(TAGGED))
    }
}

/// A key as it is written: `1` and `true` are strings here.
struct KeyText(String);

impl<'de> Deserialize<'de> for KeyText {
    fn deserialize<D: Deserializer<'de>>(document: D) -> Result<Self, D::Error> {
        struct AsText;
        impl Visitor<'_> for AsText {
            type Value = KeyText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, key: &str) -> Result<KeyText, E> {
                Ok(KeyText(key.to_owned()))
            }
        }
        document.deserialize_str(AsText)
    }
}

/// Follows the indices into a document and fails at their end, for the location in the error.
#[derive(Clone, Copy)]
struct Walker<'p> {
    indices: &'p [usize],
    end: PathEnd,
}

impl Walker<'_> {
    /// The next index, and the walker for the value there. At the end of the path this fails.
    fn step<E: serde::de::Error>(self) -> Result<(usize, Self), E> {
        match self.indices.split_first() {
            Some((&index, indices)) => Ok((index, Self { indices, ..self })),
            None => Err(E::custom("here")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Walker<'_> {
    type Value = Infallible;

    fn deserialize<D: Deserializer<'de>>(self, document: D) -> Result<Infallible, D::Error> {
        document.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walker<'_> {
    type Value = Infallible;

    /// Scalars are rejected with this text: the value that was searched for is a scalar.
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Infallible, A::Error> {
        let (index, inner) = self.step()?;
        for _ in 0..index {
            items.next_element::<IgnoredAny>()?;
        }
        items.next_element_seed(inner)?.ok_or_else(|| A::Error::custom("beyond the end"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Infallible, A::Error> {
        let (index, inner) = self.step()?;
        for _ in 0..index {
            entries.next_entry::<IgnoredAny, IgnoredAny>()?;
        }
        if inner.indices.is_empty() && self.end == PathEnd::Key {
            return entries.next_key_seed(inner)?.ok_or_else(|| A::Error::custom("beyond the end"));
        }
        entries.next_key::<IgnoredAny>()?;
        entries.next_value_seed(inner)
    }
}
