//! `/ws`: every WebSocket message (RFC 6455) comes back at once and as it was. For other agents, browsers and scripts.

mod client;
mod connection_limit;
mod handshake;
mod rate_limit;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use crate::config::WebSocketRules;
use crate::http::server::Body;
use crate::identity::WouldAnswer;
use crate::metrics::websocket::{CloseReason, WebSocketSeries};
use client::ClientRules;
use connection_limit::{ConnectionLimit, ConnectionPermit};
use handshake::HandshakeRefusal;

/// Sends messages back. Every client is a task, which ends by itself soon after it is dismissed.
#[derive(Debug)]
pub struct WebSocketResponder {
    rules: ArcSwap<WebSocketRules>,
    connections: Arc<ConnectionLimit>,
    series: Arc<WebSocketSeries>,
    /// Counts up: whoever was connected before is to go.
    dismissals: watch::Sender<u64>,
    is_leaving: AtomicBool,
    /// True from when nobody is answered any more.
    silent: Arc<AtomicBool>,
}

impl WebSocketResponder {
    /// A responder without clients.
    #[must_use]
    pub fn new(rules: WebSocketRules, series: Arc<WebSocketSeries>) -> Self {
        Self {
            rules: ArcSwap::from_pointee(rules),
            connections: Arc::new(ConnectionLimit::new(Arc::clone(&series))),
            series,
            dismissals: watch::Sender::new(0),
            is_leaving: AtomicBool::new(false),
            silent: Arc::default(),
        }
    }

    /// Changes the rules. Clients that are connected keep theirs, and stay even beyond a limit; only if nobody is to be
    /// connected they go.
    pub fn set_rules(&self, rules: WebSocketRules) {
        let is_enabled = rules.enabled;
        self.rules.store(Arc::new(rules));
        if !is_enabled {
            self.dismiss();
        }
    }

    /// Clients for which there is room, where that is fewer than the rules allow: the limit of open files is too low.
    #[must_use]
    pub fn shortage(&self) -> Option<usize> {
        let rules = self.rules.load();
        Some(connection_limit::room()).filter(|room| rules.enabled && *room < rules.clients_max)
    }

    /// The rules for new clients.
    #[must_use]
    pub fn rules(&self) -> Arc<WebSocketRules> {
        self.rules.load_full()
    }

    /// Answers a request for `/ws`; with 101 it begins a connection. `admission` is asked only where it decides.
    pub fn answer(
        &self,
        mut request: Request<Bytes>,
        peer: SocketAddr,
        admission: impl FnOnce(&Request<Bytes>) -> WouldAnswer,
    ) -> Response<Body> {
        // Before it is let in, so that whoever we leave hears of it.
        let dismissals = self.dismissals.subscribe();
        match self.let_in(&request, peer, admission) {
            Ok((response, permit)) => {
                self.begin(&mut request, peer, permit, dismissals);
                response
            }
            Err(refusal) => {
                debug!(%peer, ?refusal, "a WebSocket client is not let in");
                if let Some(reason) = refusal.counted() {
                    self.series.refused(reason);
                }
                refusal.response()
            }
        }
    }

    fn let_in(
        &self,
        request: &Request<Bytes>,
        peer: SocketAddr,
        admission: impl FnOnce(&Request<Bytes>) -> WouldAnswer,
    ) -> Result<(Response<Body>, ConnectionPermit), HandshakeRefusal> {
        let rules = self.rules.load();
        if !rules.enabled {
            return Err(HandshakeRefusal::Off);
        }
        let response = handshake::accept(request)?;
        handshake::page(request, &rules.origins, peer.ip())?;
        let admitted = admission(request);
        if !admitted.answers {
            return Err(HandshakeRefusal::Unlisted(admitted.reason.unwrap_or_default()));
        }
        if self.is_leaving.load(Ordering::Acquire) {
            return Err(HandshakeRefusal::Leaving);
        }
        let permit = self.connections.take(peer.ip(), &rules).map_err(HandshakeRefusal::LimitReached)?;
        Ok((response, permit))
    }

    fn begin(
        &self,
        request: &mut Request<Bytes>,
        peer: SocketAddr,
        permit: ConnectionPermit,
        mut dismissals: watch::Receiver<u64>,
    ) {
        let upgrade = hyper::upgrade::on(request);
        let terms = ClientRules::of(&self.rules.load(), &self.silent);
        let series = Arc::clone(&self.series);
        series.accepted.inc();
        tokio::spawn(async move {
            let ending = match timeout(client::STALL, upgrade).await {
                Ok(Ok(upgraded)) => {
                    // A sender that is gone cannot dismiss us later: the same as a dismissal.
                    let dismissed = async { drop(dismissals.changed().await) };
                    client::serve(TokioIo::new(upgraded), terms, &series, dismissed).await
                }
                Ok(Err(_)) | Err(_) => CloseReason::Error,
            };
            debug!(%peer, ?ending, "a WebSocket client ended");
            series.closed(ending);
            drop(permit);
        });
    }

    /// Sends nothing back any more: an answer after the agent's goodbye would take it back. Connections stay.
    pub fn stop_replying(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Says to all that we go, lets nobody in from now on, and returns when all have ended, or after `grace`.
    pub async fn leave(&self, grace: Duration) {
        self.is_leaving.store(true, Ordering::Release);
        self.dismiss();
        if timeout(grace, self.connections.emptied()).await.is_err() {
            debug!(clients = self.series.clients.get(), ?grace, "leaving WebSocket clients behind");
        }
    }

    fn dismiss(&self) {
        self.dismissals.send_modify(|count| *count += 1);
    }
}
