//! TLS, both ways: [`Acceptor`] for connections that come, [`Connector`] for those that we make.
//!
//! Both are made of files, read through a [`WatchedFiles`] that remembers what was in them, so that a change can be noticed and
//! they can be [`Reloadable`] again. What stands in a configuration is [`Trust`]; what a server does is said by
//! [`WebTls`](crate::config::web::WebTls).
//!
//! A [`Connector`] is cheap to clone, and all clones connect by what is in force:
//!
//! ```text
//! let connector = Connector::new(&trust)?;                        // reads the files
//! let stream = connector.connect(tcp, "ams-1.example.net").await?;    // verified, or a TlsError with its Cause
//! stream.certificate_expiry();                                    // of the server's certificate
//! ```
//!
//! Errors may also come later: with TLS 1.3 a server refuses a client's certificate when the client has long begun to
//! write. [`Connector::explain`] finds the reason in the error of whoever reads.
//!
//! The provider is ring, versions are 1.2 and 1.3, HTTP/1.1 is what is negotiated (ALPN). Nothing here skips verification, and
//! sessions are not resumed by our clients: each connection verifies. A build without the feature `tls` has the same
//! names; nothing can be made of them there.

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

/// What both sides say that they speak inside.
#[cfg(feature = "tls")]
const ALPN: &[u8] = b"http/1.1";
