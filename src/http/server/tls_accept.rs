//! TLS handshake of accepted connections, where TLS is configured.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::{Counters, LoadedWebConfig, ServerLimits};
use crate::tls::MaybeTls;

/// A connection that is ready for HTTP.
pub(super) struct Accepted {
    pub(super) stream: MaybeTls<TcpStream>,
    /// Whether the client uses plain HTTP on a TLS port.
    pub(super) is_plaintext: bool,
}

/// Prepares a connection for HTTP. Returns `None` if the handshake failed, which is counted, or if the client
/// closed the connection without sending anything.
pub(super) async fn accept(
    web_config: &LoadedWebConfig,
    limits: &ServerLimits,
    counters: &Counters,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<Accepted> {
    let Some(acceptor) = &web_config.acceptor else {
        return Some(Accepted { stream: MaybeTls::Plain(stream), is_plaintext: false });
    };
    let handshake = async {
        let mut first = [0];
        match (stream.peek(&mut first).await?, first[0]) {
            // A client that only checks whether the port is open is not an error.
            (0, _) => Ok(None),
            // An upper-case letter is an HTTP method: the client used http instead of https.
            (_, b'A'..=b'Z') => Ok(Some(Accepted { stream: MaybeTls::Plain(stream), is_plaintext: true })),
            _ => {
                let stream = acceptor.accept(stream).await?;
                Ok(Some(Accepted { stream: MaybeTls::Tls(Box::new(stream)), is_plaintext: false }))
            }
        }
    };
    let failed: io::Error = match timeout(limits.handshake_timeout, handshake).await {
        Ok(Ok(accepted)) => {
            if accepted.as_ref().is_some_and(|accepted| accepted.is_plaintext) {
                counters.handshake_errors.fetch_add(1, Relaxed);
            }
            return accepted;
        }
        Ok(Err(error)) => error,
        Err(late) => late.into(),
    };
    counters.handshake_errors.fetch_add(1, Relaxed);
    debug!(%peer, error = %failed, "TLS handshake failed");
    None
}
