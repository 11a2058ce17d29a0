//! Parses quantities with units: `20ms`, `64KiB`, `100kpps`. A number without a unit is an error.

use std::time::Duration;

/// Reads a duration: `20ms`, `1.5s`, `6h`.
///
/// # Errors
/// [`UnitError`] shows how a duration is written.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    DURATION.read(text).map(Duration::from_nanos)
}

/// Reads a number of bytes: `1500B`, `64KiB`, `2GB`.
///
/// # Errors
/// [`UnitError`] shows how a size is written.
pub fn size(text: &str) -> Result<u64, UnitError> {
    SIZE.read(text)
}

/// Reads a bit rate in bits per second.
///
/// # Errors
/// [`UnitError`].
pub fn bit_rate(text: &str) -> Result<u64, UnitError> {
    BIT_RATE.read(text)
}

/// Formats a bit rate with the largest unit that needs no fraction.
#[must_use]
pub fn display_bit_rate(bits: u64) -> String {
    let fits = |(_, scale): &&(&str, u64)| bits.is_multiple_of(*scale) && bits >= *scale;
    let (name, scale) = BIT_RATE.units.iter().rev().find(fits).unwrap_or(&("bit/s", 1));
    format!("{}{name}", bits / scale)
}

/// Reads packets per second: `500pps`, `100kpps`.
///
/// # Errors
/// [`UnitError`] shows how a rate is written.
pub fn packet_rate(text: &str) -> Result<u64, UnitError> {
    PACKET_RATE.read(text)
}

/// Reads packets per second that may be less than one: `0.8pps`. The result is in thousandths.
///
/// # Errors
/// [`UnitError`] shows how a rate is written.
pub fn slow_packet_rate(text: &str) -> Result<u64, UnitError> {
    SLOW_PACKET_RATE.read(text)
}

/// Formats a rate in thousandths of a packet per second as it is written in a file.
#[must_use]
pub fn display_slow_packet_rate(thousandths: u64) -> String {
    let (whole, rest) = (thousandths / 1_000, thousandths % 1_000);
    let fraction = format!("{whole}.{rest:03}");
    format!("{}pps", fraction.trim_end_matches('0').trim_end_matches('.'))
}

/// Formats a duration as it is written in a file: exact, in the largest suitable unit.
///
/// From a minute on only whole units are used: `90s`, not `1.5m`.
#[must_use]
pub fn display(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let fits = |&&(name, scale): &&(&str, u64)| {
        let scale = u128::from(scale);
        nanos >= scale && (nanos.is_multiple_of(scale) || !WHOLE_ONLY.contains(&name))
    };
    let Some(&(name, scale)) = DURATION.units.iter().rev().find(fits) else {
        return "0s".to_owned();
    };
    let (whole, rest) = (nanos / u128::from(scale), nanos % u128::from(scale));
    if rest == 0 {
        return format!("{whole}{name}");
    }
    let digits = scale.ilog10() as usize;
    let fraction = format!("{rest:0digits$}");
    format!("{whole}.{}{name}", fraction.trim_end_matches('0'))
}

/// Why a text is not a valid quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct UnitError {
    /// The cause.
    pub cause: UnitErrorCause,
    what: String,
    remedy: &'static str,
}

impl UnitError {
    /// What was found, and what is wrong with it.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// How such a quantity is written.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        self.remedy
    }
}

/// The cause of a [`UnitError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitErrorCause {
    /// The text does not begin with a number.
    NoNumber,
    /// Nothing follows the number.
    NoUnit,
    /// The unit is not one of this quantity.
    UnknownUnit,
    /// More decimal places than the smallest unit can represent.
    TooPrecise,
    /// The value does not fit into 64 bits.
    TooLarge,
}

/// A kind of quantity.
struct Quantity {
    /// The name of the quantity, with its article.
    name: &'static str,
    /// The name of the smallest unit, in which results are counted.
    smallest_unit: &'static str,
    /// Unit names and their sizes in the smallest unit, ascending. Of two names of one unit the second is
    /// displayed.
    units: &'static [(&'static str, u64)],
    /// How the quantity is written.
    remedy: &'static str,
}

impl Quantity {
    /// Parses `<digits>[.<digits>][ ]<unit>`, without rounding.
    fn read(&self, text: &str) -> Result<u64, UnitError> {
        let text = text.trim();
        let number_len = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
        let (number, unit) = text.split_at(number_len);
        let unit = unit.trim_start();
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
            return Err(self.error(UnitErrorCause::NoNumber, text));
        }
        if unit.is_empty() {
            return Err(self.error(UnitErrorCause::NoUnit, text));
        }
        let Some(&(_, scale)) = self.units.iter().find(|(name, _)| *name == unit) else {
            return Err(self.error(UnitErrorCause::UnknownUnit, text));
        };
        let too_large = || self.error(UnitErrorCause::TooLarge, text);
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let whole = whole.checked_mul(scale).ok_or_else(too_large)?;
        let fraction = fraction.trim_end_matches('0');
        let rest =
            scaled_fraction(fraction, scale).ok_or_else(|| self.error(UnitErrorCause::TooPrecise, text))?;
        whole.checked_add(rest).ok_or_else(too_large)
    }

    fn error(&self, cause: UnitErrorCause, text: &str) -> UnitError {
        let Self { name, smallest_unit, .. } = self;
        let found = super::diagnostic::quoted(text);
        let what = match cause {
            UnitErrorCause::NoNumber => format!("{found} is not {name}"),
            UnitErrorCause::NoUnit => format!("{found} has no unit"),
            UnitErrorCause::UnknownUnit => format!("{found} has an unknown unit"),
            UnitErrorCause::TooPrecise => format!("{found} is not a whole number of {smallest_unit}"),
            UnitErrorCause::TooLarge => format!("{found} is too large"),
        };
        UnitError { cause, what, remedy: self.remedy }
    }
}

/// Returns `0.<fraction>` times `scale`; `None` if that is not a whole number.
fn scaled_fraction(fraction: &str, scale: u64) -> Option<u64> {
    if fraction.is_empty() {
        return Some(0);
    }
    let denominator = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = fraction.parse::<u128>().ok()?.checked_mul(scale.into())?;
    let exact = numerator.is_multiple_of(denominator);
    exact.then(|| u64::try_from(numerator / denominator).ok()).flatten()
}

const DURATION: Quantity = Quantity {
    name: "a duration",
    smallest_unit: "nanoseconds",
    units: &[
        ("ns", 1),
        ("µs", 1_000),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
        ("d", 86_400_000_000_000),
    ],
    remedy: "write a number and a unit (ns, us, ms, s, m, h, d), for example 20ms, 1.5s or 5m",
};

/// Units that are displayed without decimal places, because fractions of them are hard to read.
const WHOLE_ONLY: [&str; 3] = ["m", "h", "d"];

const SIZE: Quantity = Quantity {
    name: "a size",
    smallest_unit: "bytes",
    units: &[
        ("B", 1),
        ("kB", 1_000),
        ("KB", 1_000),
        ("KiB", 1 << 10),
        ("MB", 1_000_000),
        ("MiB", 1 << 20),
        ("GB", 1_000_000_000),
        ("GiB", 1 << 30),
    ],
    remedy: "write a number and a unit (B, kB, KiB, MB, MiB, GB, GiB), for example 128B or 1KiB",
};

const BIT_RATE: Quantity = Quantity {
    name: "a bit rate",
    smallest_unit: "bits per second",
    units: &[("bit/s", 1), ("kbit/s", 1_000), ("Mbit/s", 1_000_000), ("Gbit/s", 1_000_000_000)],
    remedy: "write a number and a unit (bit/s, kbit/s, Mbit/s, Gbit/s), for example 50Mbit/s or 1Gbit/s",
};

const PACKET_RATE: Quantity = Quantity {
    name: "a packet rate",
    smallest_unit: "packets per second",
    units: &[("pps", 1), ("kpps", 1_000), ("Mpps", 1_000_000)],
    remedy: "write a number and a unit (pps, kpps, Mpps), for example 500pps or 100kpps",
};

const SLOW_PACKET_RATE: Quantity = Quantity {
    name: "a packet rate",
    smallest_unit: "thousandths of a packet per second",
    units: &[("pps", 1_000), ("kpps", 1_000_000)],
    remedy: "write a number and a unit (pps, kpps), for example 0.8pps or 1kpps",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_exact() {
        for (text, nanos) in [
            ("20ms", 20_000_000),
            ("1s", 1_000_000_000),
            ("1.5s", 1_500_000_000),
            ("0.000000001s", 1),
            ("7ns", 7),
            ("3us", 3_000),
            ("3µs", 3_000),
            ("5m", 300_000_000_000),
            ("2 h", 7_200_000_000_000),
            ("1d", 86_400_000_000_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for (text, bytes) in [("1500B", 1500), ("64KiB", 65_536), ("1.5KiB", 1536), ("2GB", 2_000_000_000)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for (text, rate) in [("500pps", 500), ("100kpps", 100_000), ("0.5Mpps", 500_000)] {
            assert_eq!(packet_rate(text), Ok(rate), "{text}");
        }
        for (text, rate) in [("0.8pps", 800), ("50pps", 50_000), ("1.5kpps", 1_500_000)] {
            assert_eq!(slow_packet_rate(text), Ok(rate), "{text}");
        }
        assert_eq!(slow_packet_rate("0.0001pps").unwrap_err().cause, UnitErrorCause::TooPrecise);
    }

    #[test]
    fn slow_packet_rate_is_displayed_without_needless_digits() {
        for (rate, shown) in [(1, "0.001pps"), (800, "0.8pps"), (50_000, "50pps"), (1_500_000, "1500pps")] {
            assert_eq!(display_slow_packet_rate(rate), shown);
            assert_eq!(slow_packet_rate(shown), Ok(rate));
        }
    }

    #[test]
    fn error_has_the_cause() {
        use UnitErrorCause::{NoNumber, NoUnit, TooLarge, TooPrecise, UnknownUnit};
        for (text, cause) in [
            ("", NoNumber),
            ("s", NoNumber),
            (".5s", NoNumber),
            ("1.s", NoNumber),
            ("1.2.3s", NoNumber),
            ("-1s", NoNumber),
            ("fast", NoNumber),
            ("20", NoUnit),
            ("0", NoUnit),
            ("1e3s", UnknownUnit),
            ("20MS", UnknownUnit),
            ("1m30s", UnknownUnit),
            ("64KiB", UnknownUnit),
            ("0.5ns", TooPrecise),
            ("1.0000000001s", TooPrecise),
            ("99999999999999999999s", TooLarge),
            ("999999999999d", TooLarge),
        ] {
            assert_eq!(duration(text).unwrap_err().cause, cause, "{text:?}");
        }
        assert_eq!(
            duration("20").unwrap_err().to_string(),
            "`20` has no unit; write a number and a unit (ns, us, ms, s, m, h, d), \
             for example 20ms, 1.5s or 5m"
        );
    }

    #[test]
    fn duration_is_displayed_as_it_is_written() {
        for text in [
            "0s",
            "1ns",
            "1.5us",
            "500ms",
            "1s",
            "1.5s",
            "90s",
            "2m",
            "1h",
            "36h",
            "2d",
            "1.000000001s",
            "61s",
        ] {
            assert_eq!(display(duration(text).unwrap()), text);
        }
        assert_eq!(display(Duration::from_secs(5400)), "90m");
    }
}
