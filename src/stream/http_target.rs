//! The resource to request from a server, and the connection.

use tokio::net::TcpStream;

use crate::http::auth::Signer;
use crate::http::client::TlsClient;
use crate::tls::MaybeTls;

/// The resource to request from a server.
#[derive(Debug, Clone)]
pub struct HttpTarget {
    /// Value of the `Host` header.
    pub authority: String,
    /// Path and query.
    pub path: String,
    /// Signs requests; `None`: requests are not signed.
    pub signer: Option<Signer>,
    /// TLS parameters; `None`: no TLS.
    pub secure: Option<TlsClient>,
}

/// A TCP connection, with or without TLS, before the application protocol starts.
pub(super) type RawConnection = MaybeTls<TcpStream>;

/// Value of the `User-Agent` header.
pub(super) const USER_AGENT_VALUE: &str = concat!("pathmeter/", env!("CARGO_PKG_VERSION"));
