//! URLs of targets of HTTP and WebSocket probes, and of providers.

use hyper::Uri;

use super::reader::ValueReader;

/// An HTTP or WebSocket URL, without user name and fragment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Url {
    /// The scheme.
    pub scheme: Scheme,
    /// A host name or an IP address, without brackets.
    pub host: String,
    /// The port; by default that of the scheme.
    pub port: u16,
    /// The path and the query.
    pub path: String,
}

/// The scheme of a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// HTTP.
    Http,
    /// HTTP over TLS.
    Https,
    /// WebSocket.
    Ws,
    /// WebSocket over TLS.
    Wss,
}

const SCHEMES: [(&str, Scheme, u16); 4] = [
    ("http", Scheme::Http, 80),
    ("https", Scheme::Https, 443),
    ("ws", Scheme::Ws, 80),
    ("wss", Scheme::Wss, 443),
];

impl Scheme {
    /// Whether the scheme uses TLS.
    #[must_use]
    pub const fn is_secure(self) -> bool {
        match self {
            Self::Https | Self::Wss => true,
            Self::Http | Self::Ws => false,
        }
    }

    /// The default port.
    fn port(self) -> u16 {
        SCHEMES.iter().find(|(_, scheme, _)| *scheme == self).map_or(0, |(_, _, port)| *port)
    }
}

impl std::str::FromStr for Url {
    type Err = String;

    /// Reads `http://host`, `wss://host:port/path?query` and the like.
    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("{text:?} is not a URL: {error}"))?;
        let known = uri.scheme_str().and_then(|name| SCHEMES.iter().find(|(scheme, ..)| *scheme == name));
        let Some((_, scheme, port)) = known else {
            return Err(format!("{text:?} does not begin with http://, https://, ws:// or wss://"));
        };
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("the URL contains a user name or a password".to_owned());
        }
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(format!("{text:?} has no host"));
        }
        let given =
            uri.authority().and_then(|authority| authority.port()).map(|port| port.as_str().to_owned());
        let has_rest = uri
            .authority()
            .is_some_and(|authority| authority.as_str().len() > uri.host().map_or(0, str::len));
        let port = match given {
            None if has_rest => return Err(format!("{text:?} has an invalid port")),
            None => *port,
            Some(given) => match given.parse() {
                Ok(port) if port > 0 => port,
                Ok(_) | Err(_) => return Err(format!("{given} is not a port")),
            },
        };
        Ok(Self {
            scheme: *scheme,
            host: host.to_owned(),
            port,
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        })
    }
}

impl Url {
    /// The value of the `Host` header: the host, and the port unless it is the default of the scheme.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == self.scheme.port() { host } else { format!("{host}:{}", self.port) }
    }
}

pub(super) fn url(value: ValueReader<'_, '_>) -> Option<Url> {
    let text = value.text("a URL such as https://shop.example.net/health")?;
    match text.parse() {
        Ok(url) => Some(url),
        Err(what) => {
            value.reject(what, "for example https://shop.example.net/health or ws://192.0.2.1:8080/echo")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_has_a_scheme_a_host_a_port_and_a_path() {
        let url: Url = "wss://Shop.example.net/echo?x=1".parse().unwrap();
        assert_eq!((url.scheme, url.port, url.path.as_str()), (Scheme::Wss, 443, "/echo?x=1"));
        assert_eq!(url.authority(), "Shop.example.net");
        let url: Url = "http://[2001:db8::1]:8080".parse().unwrap();
        assert_eq!((url.host.as_str(), url.path.as_str()), ("2001:db8::1", "/"));
        assert_eq!(url.authority(), "[2001:db8::1]:8080");
        for wrong in ["ftp://a", "a", "/x", "http://", "http://u:p@a/", "http://a:99999/", "http://a:0/", ""]
        {
            assert!(wrong.parse::<Url>().is_err(), "{wrong}");
        }
    }
}
