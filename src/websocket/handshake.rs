//! Server side of the WebSocket handshake (RFC 6455 section 4.2), and the check of the `Origin`.

use std::net::IpAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::connection_limit::LimitReached;
use crate::config::{Origin, Origins};
use crate::http::server::Body;
use crate::metrics::websocket::ClientRefusal;

/// Why a handshake is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HandshakeRefusal {
    /// WebSockets are disabled.
    Disabled,
    /// The request is not a WebSocket upgrade.
    NoUpgrade,
    /// The protocol version is not 13.
    Version,
    /// `Sec-WebSocket-Key` is missing or invalid.
    Key,
    /// The origin of the page is not allowed.
    Origin {
        /// Value of the `Origin` header.
        origin: String,
    },
    /// The client is not authorised; the reason and remedy.
    Unlisted(String),
    /// A limit on the number of clients was reached.
    LimitReached(LimitReached),
    /// The agent is shutting down.
    ShuttingDown,
}

/// `Retry-After` in seconds when a limit is reached or the agent is shutting down.
const RETRY: HeaderValue = HeaderValue::from_static("10");

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADES: HeaderValue = HeaderValue::from_static("Upgrade");
const VERSION: HeaderValue = HeaderValue::from_static("13");

impl HandshakeRefusal {
    /// Returns the reason under which the refusal is counted; `None` if it is not counted.
    pub(super) fn counted(&self) -> Option<ClientRefusal> {
        match self {
            Self::Disabled | Self::ShuttingDown => None,
            Self::NoUpgrade | Self::Version | Self::Key => Some(ClientRefusal::BadRequest),
            Self::Origin { .. } => Some(ClientRefusal::Origin),
            Self::Unlisted(_) => Some(ClientRefusal::Admission),
            Self::LimitReached(_) => Some(ClientRefusal::Limit),
        }
    }

    /// Returns the HTTP response to the client.
    pub(super) fn response(&self) -> Response<Body> {
        let (status, headers, text): (_, &[(HeaderName, HeaderValue)], _) = match self {
            Self::Disabled => {
                (StatusCode::NOT_FOUND, &[], "websocket.enabled is false on this agent".to_owned())
            }
            Self::NoUpgrade => (
                StatusCode::UPGRADE_REQUIRED,
                &[(CONNECTION, UPGRADES), (UPGRADE, WEBSOCKET), (SEC_WEBSOCKET_VERSION, VERSION)],
                "this is a WebSocket endpoint; connect with a WebSocket client".to_owned(),
            ),
            Self::Version => (
                StatusCode::UPGRADE_REQUIRED,
                &[(CONNECTION, UPGRADES), (UPGRADE, WEBSOCKET), (SEC_WEBSOCKET_VERSION, VERSION)],
                "only version 13 of WebSocket (RFC 6455) is supported".to_owned(),
            ),
            Self::Key => (
                StatusCode::BAD_REQUEST,
                &[],
                "header Sec-WebSocket-Key must occur once, with 16 bytes in base64".to_owned(),
            ),
            Self::Origin { origin } => (
                StatusCode::FORBIDDEN,
                &[],
                format!("origin {origin} is not allowed; add it to websocket.origins on this agent"),
            ),
            Self::Unlisted(reason) => (StatusCode::FORBIDDEN, &[], reason.clone()),
            Self::LimitReached(LimitReached::Total(limit)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                &[(RETRY_AFTER, RETRY)],
                format!("limit of {limit} clients reached (websocket.clients_max of this agent)"),
            ),
            Self::LimitReached(LimitReached::Descriptors(limit)) => (
                StatusCode::SERVICE_UNAVAILABLE,
                &[(RETRY_AFTER, RETRY)],
                format!("limit of {limit} clients reached (open files of this host)"),
            ),
            Self::LimitReached(LimitReached::Source(limit)) => (
                StatusCode::TOO_MANY_REQUESTS,
                &[(RETRY_AFTER, RETRY)],
                format!(
                    "limit of {limit} clients from your address reached (websocket.clients_per_source of this agent)"
                ),
            ),
            Self::ShuttingDown => {
                (StatusCode::SERVICE_UNAVAILABLE, &[(RETRY_AFTER, RETRY)], "stopping".to_owned())
            }
        };
        let mut response = Response::new(Full::from(text + "\n").boxed_unsync());
        *response.status_mut() = status;
        response.headers_mut().extend(headers.iter().cloned());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

/// Whether the request asks for a WebSocket.
#[must_use]
pub fn is_requested<B>(request: &Request<B>) -> bool {
    lists(request, &UPGRADE, "websocket")
}

/// Returns the response that accepts the handshake.
///
/// # Errors
/// [`HandshakeRefusal::NoUpgrade`], [`HandshakeRefusal::Version`] and [`HandshakeRefusal::Key`].
pub(super) fn accept(request: &Request<Bytes>) -> Result<Response<Body>, HandshakeRefusal> {
    let is_upgrade = request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && lists(request, &CONNECTION, "upgrade")
        && is_requested(request);
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
    headers.insert(
        SEC_WEBSOCKET_ACCEPT,
        HeaderValue::try_from(accepted).expect("base64 is a valid header value"),
    );
    Ok(response)
}

/// Checks that the origin of the page is allowed. Clients other than browsers send no `Origin` and are
/// allowed.
///
/// # Errors
/// [`HandshakeRefusal::Origin`].
pub(super) fn check_origin(
    request: &Request<Bytes>,
    allowed: &Origins,
    peer: IpAddr,
) -> Result<(), HandshakeRefusal> {
    let listed: &[Origin] = match allowed {
        Origins::Any => return Ok(()),
        Origins::Same => &[],
        Origins::These(listed) => listed,
    };
    let mut origins = request.headers().get_all(ORIGIN).iter();
    let Some(first) = origins.next() else { return Ok(()) };
    let text = first.to_str().unwrap_or("unreadable");
    let host = only(request, &HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let origin = text.parse::<Origin>().ok().filter(|_| origins.next().is_none());
    let is_allowed = origin.is_some_and(|origin| {
        listed.contains(&origin)
            || origin.is_served_by(host)
            || origin.is_loopback() && peer.to_canonical().is_loopback()
    });
    let shown = || text.chars().take(SHOWN_CHARS_MAX).collect();
    if is_allowed { Ok(()) } else { Err(HandshakeRefusal::Origin { origin: shown() }) }
}

/// Maximum number of characters of an origin in messages.
const SHOWN_CHARS_MAX: usize = 128;

/// Whether the client offers a subprotocol (RFC 6455 section 1.9).
pub(super) fn offers(request: &Request<Bytes>, subprotocol: &str) -> bool {
    lists(request, &SEC_WEBSOCKET_PROTOCOL, subprotocol)
}

/// Returns whether a comma-separated header contains this word.
fn lists<B>(request: &Request<B>, header: &HeaderName, word: &str) -> bool {
    let values = request.headers().get_all(header).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
}

/// Returns the value of a header that occurs exactly once.
fn only<'a>(request: &'a Request<Bytes>, header: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = request.headers().get_all(header).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Returns whether `key` is 16 bytes in base64: 22 characters and the padding.
fn is_key(key: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    key.len() == 24 && key[..22].iter().all(is_digit) && key.ends_with(b"==")
}
