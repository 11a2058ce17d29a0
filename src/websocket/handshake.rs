//! Whether a request begins a WebSocket connection (RFC 6455 section 4.2), and whether its page may.

use std::net::IpAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::connection_limit::LimitReached;
use crate::config::{Origin, Origins};
use crate::http::server::Body;
use crate::metrics::websocket::ClientRefusal;

/// Why a client is not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HandshakeRefusal {
    /// It is switched off.
    Off,
    /// An ordinary request: somebody looks what is here.
    NoUpgrade,
    /// Another version of the protocol than 13.
    Version,
    /// No proper `Sec-WebSocketRules-Key`.
    Key,
    /// The page that connects may not.
    Origin {
        /// As the header has it.
        origin: String,
    },
    /// Nothing admits the client; why, and what to do.
    Unlisted(String),
    /// As many clients are connected as may be.
    LimitReached(LimitReached),
    /// We stop.
    Leaving,
}

/// When to come again, in seconds, if a limit is reached.
const RETRY: HeaderValue = HeaderValue::from_static("10");

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADES: HeaderValue = HeaderValue::from_static("Upgrade");
const VERSION: HeaderValue = HeaderValue::from_static("13");

impl HandshakeRefusal {
    /// As it is counted; `None`: not at all.
    pub(super) fn counted(&self) -> Option<ClientRefusal> {
        match self {
            Self::Off | Self::Leaving => None,
            Self::NoUpgrade | Self::Version | Self::Key => Some(ClientRefusal::BadRequest),
            Self::Origin { .. } => Some(ClientRefusal::Origin),
            Self::Unlisted(_) => Some(ClientRefusal::Admission),
            Self::LimitReached(_) => Some(ClientRefusal::Limit),
        }
    }

    /// What the client is told.
    pub(super) fn response(&self) -> Response<Body> {
        let (status, headers, words): (_, &[(HeaderName, HeaderValue)], _) = match self {
            Self::Off => (StatusCode::NOT_FOUND, &[], "websocket.enabled is false here".to_owned()),
            Self::NoUpgrade => (
                StatusCode::UPGRADE_REQUIRED,
                &[(CONNECTION, UPGRADES), (UPGRADE, WEBSOCKET), (SEC_WEBSOCKET_VERSION, VERSION)],
                "/ws speaks WebSocket: what connects to it gets every message back as it was".to_owned(),
            ),
            Self::Version => (
                StatusCode::UPGRADE_REQUIRED,
                &[(CONNECTION, UPGRADES), (UPGRADE, WEBSOCKET), (SEC_WEBSOCKET_VERSION, VERSION)],
                "/ws speaks version 13 of WebSocket, RFC 6455".to_owned(),
            ),
            Self::Key => (
                StatusCode::BAD_REQUEST,
                &[],
                "Sec-WebSocket-Key must be there once, with 16 bytes in base64".to_owned(),
            ),
            Self::Origin { origin } => (
                StatusCode::FORBIDDEN,
                &[],
                format!("pages of {origin} may not connect: add it to websocket.origins here"),
            ),
            Self::Unlisted(why) => (StatusCode::FORBIDDEN, &[], why.clone()),
            Self::LimitReached(LimitReached::Total(most)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                &[(RETRY_AFTER, RETRY)],
                format!("{most} clients are connected, as many as websocket.clients_max allows here"),
            ),
            Self::LimitReached(LimitReached::Descriptors(most)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                &[(RETRY_AFTER, RETRY)],
                format!("{most} clients are connected, as many as this host's limit of open files allows"),
            ),
            Self::LimitReached(LimitReached::Source(most)) => (
                StatusCode::TOO_MANY_REQUESTS,
                &[(RETRY_AFTER, RETRY)],
                format!(
                    "{most} clients of your address are connected, as many as websocket.clients_per_source allows here"
                ),
            ),
            Self::Leaving => {
                (StatusCode::SERVICE_UNAVAILABLE, &[(RETRY_AFTER, RETRY)], "stopping".to_owned())
            }
        };
        let mut response = Response::new(Full::from(words + "\n").boxed_unsync());
        *response.status_mut() = status;
        response.headers_mut().extend(headers.iter().cloned());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

/// The answer that begins the connection.
///
/// # Errors
/// [`HandshakeRefusal::NoUpgrade`], [`HandshakeRefusal::Version`] and [`HandshakeRefusal::Key`].
pub(super) fn accept(request: &Request<Bytes>) -> Result<Response<Body>, HandshakeRefusal> {
    let is_upgrade = request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && lists(request, &CONNECTION, "upgrade")
        && lists(request, &UPGRADE, "websocket");
    if !is_upgrade {
        return Err(HandshakeRefusal::NoUpgrade);
    }
    if only(request, &SEC_WEBSOCKET_VERSION) != Some(&VERSION) {
        return Err(HandshakeRefusal::Version);
    }
    let key = only(request, &SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).filter(|key| is_key(key));
    let accepted = derive_accept_key(key.ok_or(HandshakeRefusal::Key)?);
    let mut response = Response::new(Full::default().boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, UPGRADES);
    headers.insert(UPGRADE, WEBSOCKET);
    headers
        .insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(accepted).expect("base64 is a header's value"));
    Ok(response)
}

/// Whether the page that connects may; what is no browser names no page, and may.
///
/// # Errors
/// [`HandshakeRefusal::Origin`].
pub(super) fn page(
    request: &Request<Bytes>,
    allowed: &Origins,
    peer: IpAddr,
) -> Result<(), HandshakeRefusal> {
    let listed: &[Origin] = match allowed {
        Origins::Any => return Ok(()),
        Origins::Same => &[],
        Origins::These(listed) => listed,
    };
    let mut named = request.headers().get_all(ORIGIN).iter();
    let Some(named_first) = named.next() else { return Ok(()) };
    let text = named_first.to_str().unwrap_or("unreadable");
    let host = only(request, &HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let origin = text.parse::<Origin>().ok().filter(|_| named.next().is_none());
    let may = origin.is_some_and(|origin| {
        listed.contains(&origin)
            || origin.is_served_by(host)
            || origin.is_loopback() && peer.to_canonical().is_loopback()
    });
    let shown = || text.chars().take(SHOWN_CHARS_MAX).collect();
    if may { Ok(()) } else { Err(HandshakeRefusal::Origin { origin: shown() }) }
}

/// Characters of an origin that are shown.
const SHOWN_CHARS_MAX: usize = 128;

/// Whether a header's list has this word.
fn lists(request: &Request<Bytes>, header: &HeaderName, word: &str) -> bool {
    let values = request.headers().get_all(header).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
}

/// The value of a header that is there once.
fn only<'a>(request: &'a Request<Bytes>, header: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = request.headers().get_all(header).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Whether these are 16 bytes in base64: 22 characters and the padding.
fn is_key(key: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    key.len() == 24 && key[..22].iter().all(is_digit) && key.ends_with(b"==")
}
