//! What comes before HTTP: TLS, where it is spoken.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::{Counters, LoadedWebConfig, ServerLimits};
use crate::tls::MaybeTls;

/// A connection on which HTTP is spoken from here on.
pub(super) struct Accepted {
    pub(super) stream: MaybeTls<TcpStream>,
    /// Whether it speaks plain HTTP where TLS is to be spoken.
    pub(super) is_plaintext: bool,
}

/// Takes a connection as the port is served; `None`: it did not get that far, and was counted if it said anything.
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
    let shaking = async {
        let mut first = [0];
        match (stream.peek(&mut first).await?, first[0]) {
            // Whoever only looks whether the port is open made no mistake.
            (0, _) => Ok(None),
            // A method in capital letters: a person, or a scraper, that forgot the s.
            (_, b'A'..=b'Z') => Ok(Some(Accepted { stream: MaybeTls::Plain(stream), is_plaintext: true })),
            _ => {
                let stream = acceptor.accept(stream).await?;
                Ok(Some(Accepted { stream: MaybeTls::Tls(Box::new(stream)), is_plaintext: false }))
            }
        }
    };
    let failed: io::Error = match timeout(limits.handshake_timeout, shaking).await {
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
    debug!(%peer, error = %failed, "a handshake failed");
    None
}
