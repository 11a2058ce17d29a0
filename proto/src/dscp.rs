//! Class of service: differentiated services code points.

use std::fmt;
use std::str::FromStr;

/// A differentiated services code point, 0..=63 (RFC 2474 section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Dscp(u8);

impl Dscp {
    /// Best effort, used when no class is configured.
    pub const DEFAULT: Self = Self(0);

    /// Lower effort, which gives way to all other traffic (RFC 8622).
    pub const LOWER_EFFORT: Self = Self(1);

    /// A code point from its number; `None` above 63.
    #[must_use]
    pub const fn new(value: u8) -> Option<Self> {
        if value <= MAX { Some(Self(value)) } else { None }
    }

    /// The code point, 0..=63.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.0
    }

    /// The TOS or traffic class byte: the code point in the upper six bits, both ECN bits 0.
    #[must_use]
    pub const fn tos(self) -> u8 {
        self.0 << 2
    }
}

impl FromStr for Dscp {
    type Err = DscpError;

    /// Reads a number or a name in any case: `cs0`..`cs7`, `af11`..`af43`, `ef`, `va`, `le`, `default`, `be`.
    fn from_str(text: &str) -> Result<Self, DscpError> {
        let text = text.to_ascii_lowercase();
        if let Some(&(_, value)) = NAMES.iter().chain(ALIASES).find(|(name, _)| *name == text) {
            return Ok(Self(value));
        }
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(DscpError::Name);
        }
        text.parse().ok().and_then(Self::new).ok_or(DscpError::Number)
    }
}

impl fmt::Display for Dscp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, value)| *value == self.0) {
            Some((name, _)) => f.write_str(name),
            None => self.0.fmt(f),
        }
    }
}

/// Why a text is not a code point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DscpError {
    /// Neither a number nor a name.
    #[error("is not a class of service")]
    Name,
    /// The number does not fit into six bits.
    #[error("is above {MAX}, the highest code point")]
    Number,
}

const MAX: u8 = 63;

/// RFC 2474 (CS), RFC 2597 (AF), RFC 3246 (EF), RFC 5865 (VA), RFC 8622 (LE).
const NAMES: &[(&str, u8)] = &[
    ("default", 0),
    ("le", 1),
    ("cs1", 8),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("cs2", 16),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("cs3", 24),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("cs4", 32),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("cs5", 40),
    ("va", 44),
    ("ef", 46),
    ("cs6", 48),
    ("cs7", 56),
];

/// Other names of 0.
const ALIASES: &[(&str, u8)] = &[("be", 0), ("cs0", 0)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displayed_code_point_parses_to_itself() {
        for value in 0..=63 {
            let dscp = Dscp::new(value).unwrap();
            assert_eq!(dscp.to_string().parse(), Ok(dscp));
            assert_eq!(value.to_string().parse(), Ok(dscp));
            assert_eq!(dscp.tos(), value << 2);
        }
        assert_eq!(Dscp::new(64), None);
    }

    #[test]
    fn cs_and_af_names_follow_their_formulas() {
        for class in 0..=7 {
            assert_eq!(format!("cs{class}").parse::<Dscp>().unwrap().value(), 8 * class);
        }
        for (class, drop) in (1..=4).flat_map(|class| (1..=3).map(move |drop| (class, drop))) {
            let dscp: Dscp = format!("AF{class}{drop}").parse().unwrap();
            assert_eq!(dscp.value(), 8 * class + 2 * drop);
        }
    }

    #[test]
    fn names_are_read_in_any_case() {
        for (text, value) in [("EF", 46), ("ef", 46), ("Va", 44), ("LE", 1), ("BE", 0), ("Default", 0)] {
            assert_eq!(text.parse::<Dscp>().unwrap().value(), value, "{text}");
        }
        assert_eq!(Dscp::DEFAULT, "be".parse().unwrap());
    }

    #[test]
    fn invalid_code_point_is_rejected() {
        for text in ["", "af44", "af10", "cs8", "-1", "+1", "0x2e", "1.0", " ef"] {
            assert_eq!(text.parse::<Dscp>(), Err(DscpError::Name), "{text:?}");
        }
        for text in ["64", "256", "99999999999999999999"] {
            assert_eq!(text.parse::<Dscp>(), Err(DscpError::Number), "{text:?}");
        }
    }
}
