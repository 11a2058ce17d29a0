//! Readers for single values: names, labels, addresses, quantities.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::prefix::Prefix;

use super::diagnostic::quoted;
use super::file::Node;
use super::reader::ValueReader;
use super::units::{self, UnitError};

/// Maximum characters of a name, which is a label value of every series.
const NAME_CHARS_MAX: usize = 64;

/// Maximum labels of an agent or target.
pub(super) const LABELS_MAX: usize = 32;

/// Maximum characters of a label value.
const LABEL_CHARS_MAX: usize = 128;

/// Maximum bytes of a host name, and of one label of it (RFC 1035 section 2.3.4).
const HOST_NAME_LEN_MAX: usize = 253;
const HOST_LABEL_LEN_MAX: usize = 63;

/// Whether `text` is a valid name of an agent, target or probe.
pub(super) fn is_name(text: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// The rule of [`is_name`] in words.
pub(super) const NAME_RULE: &str = "a name consists of 1 to 64 letters, digits, `_`, `.` and `-`";

pub(super) fn name<'a>(value: ValueReader<'a, '_>) -> Option<&'a str> {
    let text = value.text("a name")?;
    if is_name(text) {
        Some(text)
    } else {
        value.reject(format!("{} is not a valid name", quoted(text)), NAME_RULE)
    }
}

pub(super) fn labels(value: ValueReader<'_, '_>) -> Option<BTreeMap<String, String>> {
    if matches!(value.node(), Node::Null) {
        return Some(BTreeMap::new());
    }
    let whole = value.clone();
    let labels = value.entries("a mapping of label names to strings", label)?;
    if labels.len() > LABELS_MAX {
        return whole.reject(format!("{} labels", labels.len()), format!("at most {LABELS_MAX} are allowed"));
    }
    Some(labels.into_iter().collect())
}

/// A label of an agent or target.
pub(super) fn label(name: &str, value: ValueReader<'_, '_>) -> Option<(String, String)> {
    let text = value.text("a label value")?;
    label_of(name, text, &value)
}

/// Like [`label`], for a value that was already read as `text`.
pub(super) fn label_of(name: &str, text: &str, value: &ValueReader<'_, '_>) -> Option<(String, String)> {
    if !is_label_name(name) {
        return value.reject_key(format!("{} is not a valid label name", quoted(name)), LABEL_NAME_RULE);
    }
    match label_value_problem(text) {
        None => Some((name.to_owned(), text.to_owned())),
        Some((what, remedy)) => value.reject(what, remedy),
    }
}

/// The name of a label.
pub(super) fn label_name(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a label name")?;
    match is_label_name(text) {
        true => Some(text.to_owned()),
        false => value.reject(format!("{} is not a valid label name", quoted(text)), LABEL_NAME_RULE),
    }
}

/// Whether `name` is a label name of the Prometheus data model that is not reserved.
fn is_label_name(name: &str) -> bool {
    let has_valid_start = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    let has_valid_characters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    has_valid_start && has_valid_characters && !name.starts_with("__")
}

const LABEL_NAME_RULE: &str =
    "a label name consists of letters, digits and `_`, and begins neither with a digit nor with `__`";

/// Why a text is not a valid label value, and the remedy; `None` if it is valid.
fn label_value_problem(text: &str) -> Option<(&'static str, String)> {
    if text.chars().count() > LABEL_CHARS_MAX {
        let remedy = format!("at most {LABEL_CHARS_MAX} characters are allowed");
        return Some(("the label value is too long", remedy));
    }
    let has_control = text.chars().any(char::is_control);
    has_control.then(|| {
        ("the label value contains a control character", "write it on one line, without tabs".to_owned())
    })
}

/// Parses a label from the command line or the environment, such as `zone=a`. Returns `None` if its value is
/// empty, so that an environment can pass a label without a value.
///
/// # Errors
/// What is wrong with the label, and the remedy.
pub fn label_argument(text: &str) -> Result<Option<(String, String)>, String> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("{} is not a label: write NAME=VALUE, such as zone=a", quoted(text)));
    };
    if !is_label_name(name) {
        return Err(format!("{} is not a valid label name: {LABEL_NAME_RULE}", quoted(name)));
    }
    match label_value_problem(value) {
        Some((what, remedy)) => Err(format!("{what}: {remedy}")),
        None => Ok(Some((name.to_owned(), value.to_owned())).filter(|(_, value)| !value.is_empty())),
    }
}

/// An IP address or a host name.
pub(super) fn host(value: ValueReader<'_, '_>) -> Option<String> {
    let expected = "an IP address or a host name";
    let text = value.text(expected)?;
    if let Ok(address) = text.parse::<IpAddr>() {
        return if is_unicast(address) {
            Some(text.to_owned())
        } else {
            value.reject(format!("{address} is not a unicast address"), "write the address of a single host")
        };
    }
    let found = format!("{} is not {expected}", quoted(text));
    let has_port = text.parse::<SocketAddr>().is_ok()
        || text
            .rsplit_once(':')
            .is_some_and(|(host, port)| is_host_name(host) && port.parse::<u16>().is_ok());
    if has_port {
        return value.reject(found, "remove the port: ports have keys of their own");
    }
    if text.starts_with('[') {
        return value.reject(found, "write an IPv6 address without brackets, in quotes");
    }
    if is_host_name(text) {
        Some(text.to_owned())
    } else {
        value.reject(found, "for example 192.0.2.1, \"2001:db8::1\" or fra-1.example.net")
    }
}

/// Whether `text` is a host name (RFC 1123 section 2.1). `_` is allowed too, because it is in use. A name
/// whose last label is a number is rejected as a mistyped address (10.0.0.256): no top-level domain is
/// numeric (RFC 3696 section 2).
pub(super) fn is_host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=HOST_LABEL_LEN_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_numeric = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    text.len() <= HOST_NAME_LEN_MAX
        && text.split('.').all(is_label)
        && text.rsplit('.').next().is_some_and(|last| !is_numeric(last))
}

/// Whether an address can be that of a single host: not unspecified, multicast or broadcast.
pub(super) fn is_unicast(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let is_broadcast = match address {
        IpAddr::V4(address) => address.is_broadcast(),
        IpAddr::V6(_) => false,
    };
    !address.is_unspecified() && !address.is_multicast() && !is_broadcast
}

/// An address of this host to send from.
pub(super) fn source(value: ValueReader<'_, '_>) -> Option<IpAddr> {
    let text = value.text("an IP address")?;
    match text.parse::<IpAddr>() {
        Ok(address) if is_unicast(address) => Some(address.to_canonical()),
        Ok(_) | Err(_) => {
            value.reject(format!("{} is not a unicast IP address", quoted(text)), "for example 192.0.2.1")
        }
    }
}

/// An address and a port to listen on. With port 0 the kernel chooses the port.
pub(super) fn listen_address(value: ValueReader<'_, '_>) -> Option<SocketAddr> {
    let text = value.text("an address and a port such as [::]:9862")?;
    match text.parse() {
        Ok(address) => Some(address),
        Err(_) => value.reject(
            format!("{} is not an address and a port", quoted(text)),
            "for example \"[::]:9862\" for all addresses, or \"192.0.2.1:9862\"",
        ),
    }
}

pub(super) fn port(value: ValueReader<'_, '_>) -> Option<u16> {
    value.number(&(1..=65_535))
}

pub(super) fn path(value: ValueReader<'_, '_>) -> Option<PathBuf> {
    let text = value.text("a file path")?;
    if text.is_empty() || text.contains('\0') {
        return value.reject("not a file path", "for example /etc/pathmeter/mesh.key");
    }
    Some(PathBuf::from(text))
}

pub(super) fn prefix(value: ValueReader<'_, '_>) -> Option<Prefix> {
    let text = value.text("a network")?;
    text.parse().map_or_else(
        |error| {
            value.reject(
                format!("{} {error}", quoted(text)),
                "write a network such as 10.0.0.0/8 or \"2001:db8::/32\", or a single address",
            )
        },
        Some,
    )
}

pub(super) fn dscp(value: ValueReader<'_, '_>) -> Option<Dscp> {
    let text = match value.node() {
        Node::Int(number) => number.to_string(),
        Node::Null | Node::Bool(_) | Node::Float(_) | Node::Text(_) | Node::List(_) | Node::Mapping(_) => {
            value.text("a DSCP")?.to_owned()
        }
    };
    text.parse().map_or_else(
        |error| {
            value.reject(
                format!("{} {error}", quoted(&text)),
                "write 0 to 63, or default, le, cs1 to cs7, af11 to af43, va or ef",
            )
        },
        Some,
    )
}

pub(super) fn duration(value: ValueReader<'_, '_>, allowed: &RangeInclusive<Duration>) -> Option<Duration> {
    quantity(value, "a duration such as 20ms", units::duration, allowed, |duration| units::display(*duration))
}

pub(super) fn size(value: ValueReader<'_, '_>, allowed: &RangeInclusive<u64>) -> Option<u64> {
    quantity(value, "a size such as 128B", units::size, allowed, |bytes| format!("{bytes}B"))
}

/// Bits per second.
pub(super) fn bit_rate(value: ValueReader<'_, '_>, allowed: &RangeInclusive<u64>) -> Option<u64> {
    let expected = "a bit rate such as 50Mbit/s";
    quantity(value, expected, units::bit_rate, allowed, |rate| units::display_bit_rate(*rate))
}

pub(super) fn packet_rate(value: ValueReader<'_, '_>, allowed: &RangeInclusive<u64>) -> Option<u64> {
    let expected = "a packet rate such as 100kpps";
    quantity(value, expected, units::packet_rate, allowed, |rate| format!("{rate}pps"))
}

/// Packets per second in thousandths.
pub(super) fn slow_packet_rate(value: ValueReader<'_, '_>, allowed: &RangeInclusive<u64>) -> Option<u64> {
    let expected = "a packet rate such as 0.8pps";
    quantity(value, expected, units::slow_packet_rate, allowed, |rate| units::display_slow_packet_rate(*rate))
}

fn quantity<T: PartialOrd, D: fmt::Display>(
    value: ValueReader<'_, '_>,
    expected: &str,
    read: impl Fn(&str) -> Result<T, UnitError>,
    allowed: &RangeInclusive<T>,
    display: impl Fn(&T) -> D,
) -> Option<T> {
    let text = match value.node() {
        Node::Text(text) => text.clone(),
        Node::Int(number) => number.to_string(),
        Node::Float(number) => number.to_string(),
        Node::Null | Node::Bool(_) | Node::List(_) | Node::Mapping(_) => return value.reject_type(expected),
    };
    match read(&text) {
        Ok(quantity) if allowed.contains(&quantity) => Some(quantity),
        Ok(quantity) => value.reject(
            format!("{} is out of range", display(&quantity)),
            format!("write {} to {}", display(allowed.start()), display(allowed.end())),
        ),
        Err(error) => value.reject(error.what(), error.remedy()),
    }
}
