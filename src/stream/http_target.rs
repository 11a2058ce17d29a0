//! What is requested of a server, and over what.

use tokio::net::TcpStream;

use crate::http::auth::Signer;
use crate::http::client::TlsClient;
use crate::tls::MaybeTls;

/// What is asked for at a server.
#[derive(Debug, Clone)]
pub struct HttpTarget {
    /// What the `Host` header says.
    pub authority: String,
    /// The path and the query.
    pub path: String,
    /// Signs requests; `None`: they are not signed.
    pub signer: Option<Signer>,
    /// How TLS is spoken; `None`: it is not.
    pub secure: Option<TlsClient>,
}

/// A connection before anything is spoken over it, TLS apart.
pub(super) type RawConnection = MaybeTls<TcpStream>;

/// What we call ourselves to servers.
pub(super) const USER_AGENT_VALUE: &str = concat!("pathmeter/", env!("CARGO_PKG_VERSION"));
