//! TLS: [`Acceptor`] for incoming connections, [`Connector`] for outgoing ones.
//!
//! Both are created from files, read through [`WatchedFiles`], which stores their digests so that changes are
//! detected and a [`Reloadable`] can be reloaded. A client is configured by [`Trust`], a server by
//! [`WebTls`](crate::config::web::WebTls).
//!
//! A [`Connector`] is cheap to clone, and all clones share the current configuration:
//!
//! ```text
//! let connector = Connector::new(&trust)?;                         // reads the files
//! let stream = connector.connect(tcp, "ams-1.example.net").await?; // verified, or a TlsError with its Cause
//! stream.certificate_expiry();                                     // of the server's certificate
//! ```
//!
//! Errors can also occur after the handshake: with TLS 1.3 a server may reject the client certificate when
//! the client already sends data. [`Connector::explain`] finds the reason in the error of a later read.
//!
//! The crypto provider is ring, versions are 1.2 and 1.3, and ALPN negotiates HTTP/1.1. Certificates are
//! always verified, and clients do not resume sessions, so every connection is verified. A build without the
//! feature `tls` has the same types, but none of them can be created.

mod error;
mod stream;
mod watched_files;

#[cfg(feature = "tls")]
mod acceptor;
#[cfg(feature = "tls")]
mod certificate;
#[cfg(feature = "tls")]
mod connector;
#[cfg(not(feature = "tls"))]
mod disabled;
#[cfg(feature = "tls")]
mod pem;
#[cfg(test)]
#[cfg(feature = "tls")]
pub(crate) mod tests;

pub use crate::config::{KeyPair, Trust};
pub use error::{Cause, FileError, TlsError};
pub use stream::MaybeTls;
pub use watched_files::{Reloadable, WatchedFiles};

#[cfg(feature = "tls")]
pub use acceptor::Acceptor;
#[cfg(feature = "tls")]
pub use connector::Connector;
#[cfg(not(feature = "tls"))]
pub use disabled::{Acceptor, Connector, TlsStream};
#[cfg(feature = "tls")]
pub use stream::TlsStream;

/// Application protocol announced by both sides (ALPN).
#[cfg(feature = "tls")]
const ALPN: &[u8] = b"http/1.1";
