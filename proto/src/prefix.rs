//! IP networks, for lists of allowed sources.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// An IP network: an address whose bits beyond the prefix length are zero.
///
/// An IPv4-mapped IPv6 network (`::ffff:10.0.0.0/104`) is treated as the IPv4 network, here and in
/// [`Prefix::contains`], because a dual-stack socket reports IPv4 sources in that form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix(IpNet);

impl Prefix {
    /// The network of `len` bits that begins at `network`.
    ///
    /// # Errors
    /// [`PrefixError::TooLong`], or [`PrefixError::HostBits`] if bits beyond `len` are set.
    pub fn new(network: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let bits_max = if network.is_ipv4() { 32 } else { 128 };
        let found = IpNet::new(network, len).map_err(|_| PrefixError::TooLong { len, bits_max })?;
        if found.trunc() != found {
            return Err(PrefixError::HostBits { right: Self(found.trunc()) });
        }
        // An IPv6 network that is shorter than the mapped addresses' own holds more than IPv4.
        let mapped = len.checked_sub(MAPPED_BITS).filter(|_| network.is_ipv6());
        match (network.to_canonical(), mapped) {
            (network @ IpAddr::V4(_), Some(len)) => Self::new(network, len),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => Ok(Self(found)),
        }
    }

    /// The network that contains only this address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self(address.to_canonical().into())
    }

    /// Whether the network contains the address. `::/0` contains no IPv4 address, mapped or not.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    /// Reads `10.0.0.0/8`, `2001:db8::/32`, or a single address, which is the network of that host.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let address = |text: &str| text.parse::<IpAddr>().map_err(|_| PrefixError::Address);
        let Some((network, len)) = text.split_once('/') else {
            return Ok(Self::host(address(text)?));
        };
        let network = address(network)?;
        // `parse` would accept a sign.
        if len.is_empty() || !len.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(PrefixError::Length);
        }
        Self::new(network, len.parse().unwrap_or(u8::MAX))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is not an IP network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// There is no IP address before the slash.
    #[error("does not begin with an IP address")]
    Address,
    /// There is no number after the slash.
    #[error("has no prefix length after the slash")]
    Length,
    /// The prefix is longer than the address.
    #[error("has a prefix length greater than {bits_max}")]
    TooLong {
        /// Requested length; 255 if it was larger than that.
        len: u8,
        /// Length of the address in bits.
        bits_max: u8,
    },
    /// Host bits are set. Guessing whether the network or the host was meant could allow the wrong sources.
    #[error("has host bits set (the network is {right})")]
    HostBits {
        /// The network of that length that contains the address.
        right: Prefix,
    },
}

/// Bits of `::ffff:0:0/96`, the IPv4-mapped addresses (RFC 4291 section 2.5.5.2).
const MAPPED_BITS: u8 = 96;

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn network_contains_its_first_and_last_address_and_not_their_neighbours() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", ["10.0.0.0", "10.255.255.255"], ["9.255.255.255", "11.0.0.0"]),
            ("10.1.2.4/31", ["10.1.2.4", "10.1.2.5"], ["10.1.2.3", "10.1.2.6"]),
            ("192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.0", "192.0.2.2"]),
            ("2001:db8::/32", ["2001:db8::", "2001:db8:ffff::1"], ["2001:db7:ffff::", "2001:db9::"]),
            ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255"], ["::1", "2001:db8::1"]),
            ("::/0", ["::1", "2001:db8::1"], ["10.0.0.1", "::ffff:10.0.0.1"]),
        ] {
            for address in inside {
                assert!(prefix(network).contains(address.parse().unwrap()), "{address} in {network}");
            }
            for address in outside {
                assert!(!prefix(network).contains(address.parse().unwrap()), "{address} not in {network}");
            }
        }
    }

    #[test]
    fn mapped_ipv4_network_equals_the_ipv4_network() {
        assert_eq!(prefix("::ffff:10.0.0.0/104"), prefix("10.0.0.0/8"));
        assert_eq!(prefix("::ffff:10.0.0.1"), prefix("10.0.0.1/32"));
        assert!(prefix("10.0.0.0/8").contains("::ffff:10.1.2.3".parse().unwrap()));
    }

    #[test]
    fn displayed_network_parses_to_itself() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.1/32", "2001:db8::/32", "::/0", "::1/128"] {
            assert_eq!(prefix(text).to_string(), text);
        }
    }

    #[test]
    fn invalid_network_is_rejected_with_its_cause() {
        for (text, error) in [
            ("", "does not begin with an IP address"),
            ("example.net/8", "does not begin with an IP address"),
            ("10.0.0.0/", "has no prefix length after the slash"),
            ("10.0.0.0/+8", "has no prefix length after the slash"),
            ("10.0.0.0/33", "has a prefix length greater than 32"),
            ("2001:db8::/129", "has a prefix length greater than 128"),
            ("10.0.0.0/999", "has a prefix length greater than 32"),
            ("10.1.2.3/8", "has host bits set (the network is 10.0.0.0/8)"),
            ("2001:db8::1/64", "has host bits set (the network is 2001:db8::/64)"),
        ] {
            assert_eq!(text.parse::<Prefix>().unwrap_err().to_string(), error, "{text:?}");
        }
    }
}
