//! The origin of a web page.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// The origin of a web page (RFC 6454): scheme, host and port, as browsers send it in `Origin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: OriginScheme,
    /// In lower case; an IPv6 address has brackets.
    host: String,
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OriginScheme {
    Http,
    Https,
}

impl OriginScheme {
    const fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    const fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

impl Origin {
    /// Whether `host`, the value of a `Host` header, denotes the host and port of this origin. A header
    /// without a port stands for the default port of the origin's scheme: the request does not show whether a
    /// reverse proxy terminated TLS.
    #[must_use]
    pub fn is_served_by(&self, host: &str) -> bool {
        host_and_port(host).is_some_and(|(host, port)| {
            host == self.host && port.unwrap_or_else(|| self.scheme.port()) == self.port
        })
    }

    /// Whether the page was served by the host that the browser runs on.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse::<IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            // RFC 6761 section 6.3.
            Err(_) => bare == "localhost" || bare.ends_with(".localhost"),
        }
    }
}

impl FromStr for Origin {
    type Err = NotAnOrigin;

    /// Parses `https://page.example.net` or `http://[2001:db8::1]:8080`, without a path.
    fn from_str(text: &str) -> Result<Self, NotAnOrigin> {
        let (scheme, rest) = text.split_once("://").ok_or(NotAnOrigin)?;
        let known = [OriginScheme::Http, OriginScheme::Https];
        let scheme = known.into_iter().find(|known| scheme.eq_ignore_ascii_case(known.name()));
        let scheme = scheme.ok_or(NotAnOrigin)?;
        let (host, port) = host_and_port(rest).ok_or(NotAnOrigin)?;
        Ok(Self { scheme, host, port: port.unwrap_or_else(|| scheme.port()) })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.name(), self.host)?;
        if self.port == self.scheme.port() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// The text is not an origin: it has another scheme or a path, or is `null`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is not an origin")]
pub struct NotAnOrigin;

/// The host in lower case, and the port if there is one; `None` if the text is invalid.
fn host_and_port(text: &str) -> Option<(String, Option<u16>)> {
    let (host, rest) = if let Some(inside) = text.strip_prefix('[') {
        let (address, rest) = inside.split_once(']')?;
        (format!("[{}]", address.parse::<Ipv6Addr>().ok()?), rest)
    } else {
        let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if host.is_empty() || !host.bytes().all(is_plain) {
            return None;
        }
        (host.to_ascii_lowercase(), rest)
    };
    let Some(port) = rest.strip_prefix(':') else { return rest.is_empty().then_some((host, None)) };
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = is_number.then(|| port.parse().ok()).flatten().filter(|port| *port > 0)?;
    Some((host, Some(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        text.parse().unwrap()
    }

    #[test]
    fn origin_is_a_scheme_a_host_and_a_port() {
        for (text, shown) in [
            ("https://page.example.net", "https://page.example.net"),
            ("HTTPS://Page.Example.NET:443", "https://page.example.net"),
            ("http://192.0.2.1:8080", "http://192.0.2.1:8080"),
            ("http://[2001:DB8:0::1]:80", "http://[2001:db8::1]"),
            ("https://a:80", "https://a:80"),
        ] {
            assert_eq!(origin(text).to_string(), shown);
        }
        for text in [
            "null",
            "",
            "page.example.net",
            "https://",
            "https://a/",
            "https://a:0",
            "https://a:",
            "https://a:+1",
            "https://a:65536",
            "https://a:1:2",
            "https://user@a",
            "https://[::1",
            "https://[::1]x",
            "https://*.example.net",
            "file://a",
            "ws://a",
        ] {
            assert_eq!(text.parse::<Origin>(), Err(NotAnOrigin), "{text}");
        }
    }

    #[test]
    fn page_is_served_by_the_host_and_port_of_its_origin() {
        for (page, host, is_same) in [
            ("http://fra-1:9862", "fra-1:9862", true),
            ("http://FRA-1:9862", "fra-1:9862", true),
            ("http://fra-1:9862", "fra-1", false),
            ("http://fra-1", "fra-1", true),
            ("http://fra-1", "fra-1:80", true),
            ("https://fra-1", "fra-1", true),
            ("https://fra-1", "fra-1:443", true),
            ("https://fra-1", "fra-1:80", false),
            ("http://fra-1.evil.example:9862", "fra-1:9862", false),
            ("http://[::1]:9862", "[0::1]:9862", true),
            ("http://fra-1", "", false),
        ] {
            assert_eq!(origin(page).is_served_by(host), is_same, "{page} by {host}");
        }
    }

    #[test]
    fn loopback_is_recognised_by_address_and_by_name() {
        for page in ["http://localhost:3000", "http://a.localhost", "http://127.0.0.9", "http://[::1]:1"] {
            assert!(origin(page).is_loopback(), "{page}");
        }
        for page in
            ["http://localhost.example.net", "http://192.0.2.1", "http://notlocalhost", "http://[::2]"]
        {
            assert!(!origin(page).is_loopback(), "{page}");
        }
    }
}
