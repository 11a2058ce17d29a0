//! What comes before HTTP: TLS, where it is spoken.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::{Counters, Front, Limits};
use crate::tls::MaybeTls;

/// A connection on which HTTP is spoken from here on.
pub(super) struct Entered {
    pub(super) stream: MaybeTls<TcpStream>,
    /// Whether it speaks plain HTTP where TLS is to be spoken.
    pub(super) is_astray: bool,
}

/// Takes a connection as the port is served; `None`: it did not get that far, and was counted if it said anything.
pub(super) async fn enter(
    front: &Front,
    limits: &Limits,
    counters: &Counters,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<Entered> {
    let Some(acceptor) = &front.acceptor else {
        return Some(Entered { stream: MaybeTls::Plain(stream), is_astray: false });
    };
    let shaking = async {
        let mut first = [0];
        match (stream.peek(&mut first).await?, first[0]) {
            // Whoever only looks whether the port is open made no mistake.
            (0, _) => Ok(None),
            // A method in capital letters: a person, or a scraper, that forgot the s.
            (_, b'A'..=b'Z') => Ok(Some(Entered { stream: MaybeTls::Plain(stream), is_astray: true })),
            _ => {
                let stream = acceptor.accept(stream).await?;
                Ok(Some(Entered { stream: MaybeTls::Tls(Box::new(stream)), is_astray: false }))
            }
        }
    };
    let failed: io::Error = match timeout(limits.handshake_timeout, shaking).await {
        Ok(Ok(entered)) => {
            if entered.as_ref().is_some_and(|entered| entered.is_astray) {
                counters.handshake_errors.fetch_add(1, Relaxed);
            }
            return entered;
        }
        Ok(Err(error)) => error,
        Err(late) => late.into(),
    };
    counters.handshake_errors.fetch_add(1, Relaxed);
    debug!(%peer, error = %failed, "a handshake failed");
    None
}
