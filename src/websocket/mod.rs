//! WebSocket echo responder at `/ws` (RFC 6455). Every message is sent back unchanged, for agents, browsers
//! and scripts.

mod client;
mod connection_limit;
mod feed;
mod handshake;
mod rate_limit;
#[cfg(test)]
mod tests;
mod trace;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::header::{HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::debug;

use crate::config::{TraceMethod, TracedClients, WebSocketRules};
use crate::event_log::EventFeed;
use crate::http::AcceptedConnection;
use crate::http::server::Body;
use crate::identity::WouldAnswer;
use crate::metrics::websocket::{ClientTraceResult, CloseReason, WebSocketSeries};
use crate::tls::MaybeTls;
use client::{ClientRules, ClientStream};
use connection_limit::{ConnectionLimit, ConnectionPermit};
use handshake::HandshakeRefusal;
pub use handshake::is_requested;
use trace::ClientTrace;
pub use trace::{ClientMessage, ClientTraceRequest, TRACE_SUBPROTOCOL, TraceUpdate};

const TRACED: HeaderValue = HeaderValue::from_static(TRACE_SUBPROTOCOL);

/// Accepts WebSocket clients and echoes their messages. Each client is a task, which ends soon after it is
/// told to close.
#[derive(Debug)]
pub struct WebSocketResponder {
    rules: ArcSwap<WebSocketRules>,
    connections: Arc<ConnectionLimit>,
    series: Arc<WebSocketSeries>,
    /// Sends requests for traces to the daemon; `None`: clients are not traced.
    traces: Option<mpsc::Sender<ClientTraceRequest>>,
    /// Incremented to close all clients connected before.
    close_requests: watch::Sender<u64>,
    is_shutting_down: AtomicBool,
    /// Whether messages are no longer echoed.
    is_muted: Arc<AtomicBool>,
}

impl WebSocketResponder {
    /// Returns a responder without clients.
    #[must_use]
    pub fn new(rules: WebSocketRules, series: Arc<WebSocketSeries>) -> Self {
        Self {
            rules: ArcSwap::from_pointee(rules),
            connections: Arc::new(ConnectionLimit::new(Arc::clone(&series))),
            series,
            traces: None,
            close_requests: watch::Sender::new(0),
            is_shutting_down: AtomicBool::new(false),
            is_muted: Arc::default(),
        }
    }

    /// Lets clients be traced, as far as the rules say.
    #[must_use]
    pub fn with_traces(self, traces: mpsc::Sender<ClientTraceRequest>) -> Self {
        Self { traces: Some(traces), ..self }
    }

    /// Replaces the rules for new clients. Connected clients keep their rules and stay connected even above a
    /// lowered limit, unless WebSockets are disabled.
    pub fn set_rules(&self, rules: WebSocketRules) {
        let is_enabled = rules.enabled;
        self.rules.store(Arc::new(rules));
        if !is_enabled {
            self.close_all();
        }
    }

    /// Returns the number of clients that the limit of open files allows, if that is fewer than
    /// `clients_max`.
    #[must_use]
    pub fn descriptor_shortage(&self) -> Option<usize> {
        let rules = self.rules.load();
        Some(connection_limit::descriptor_limit()).filter(|limit| rules.enabled && *limit < rules.clients_max)
    }

    /// Returns the rules for new clients.
    #[must_use]
    pub fn rules(&self) -> Arc<WebSocketRules> {
        self.rules.load_full()
    }

    /// Answers a request for `/ws`, with 101 if the client is accepted. `admission` is called only if the
    /// handshake and the origin are valid.
    pub fn answer(
        &self,
        mut request: Request<Bytes>,
        peer: SocketAddr,
        admission: impl FnOnce(&Request<Bytes>) -> WouldAnswer,
    ) -> Response<Body> {
        // Subscribe before accepting, so that no close request is missed.
        let close_requests = self.close_requests.subscribe();
        match self.admit(&request, peer, admission) {
            Ok((mut response, permit)) => {
                let trace = self.trace_request(&request);
                if trace.as_ref().is_some_and(|trace| trace.is_asked) {
                    response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, TRACED);
                }
                self.spawn_client(&mut request, peer, permit, trace, close_requests);
                response
            }
            Err(refusal) => {
                debug!(%peer, ?refusal, "WebSocket client refused");
                if let Some(reason) = refusal.counted() {
                    self.series.refused(reason);
                }
                refusal.response()
            }
        }
    }

    /// Answers a request for events over a WebSocket, with 101 if the handshake and the origin are valid. The
    /// client is sent the items of the feed.
    pub fn feed(&self, request: &mut Request<Bytes>, peer: SocketAddr, feed: EventFeed) -> Response<Body> {
        let accepted = handshake::accept(request).and_then(|response| {
            handshake::check_origin(request, &self.rules.load().origins, peer.ip()).map(|()| response)
        });
        let response = match accepted {
            Ok(response) => response,
            Err(refusal) => return refusal.response(),
        };
        let upgrade = hyper::upgrade::on(request);
        tokio::spawn(async move {
            if let Ok(Ok(upgraded)) = timeout(client::STALL_TIMEOUT, upgrade).await {
                feed::serve(TokioIo::new(upgraded), feed).await;
            }
        });
        response
    }

    fn admit(
        &self,
        request: &Request<Bytes>,
        peer: SocketAddr,
        admission: impl FnOnce(&Request<Bytes>) -> WouldAnswer,
    ) -> Result<(Response<Body>, ConnectionPermit), HandshakeRefusal> {
        let rules = self.rules.load();
        if !rules.enabled {
            return Err(HandshakeRefusal::Disabled);
        }
        let response = handshake::accept(request)?;
        handshake::check_origin(request, &rules.origins, peer.ip())?;
        let admitted = admission(request);
        if !admitted.answers {
            return Err(HandshakeRefusal::Unlisted(admitted.reason.unwrap_or_default()));
        }
        if self.is_shutting_down.load(Ordering::Acquire) {
            return Err(HandshakeRefusal::ShuttingDown);
        }
        let permit = self.connections.take(peer.ip(), &rules).map_err(HandshakeRefusal::LimitReached)?;
        Ok((response, permit))
    }

    /// Whether a client is traced, and if so, how.
    fn trace_request(&self, request: &Request<Bytes>) -> Option<TraceRequestSender> {
        let requests = self.traces.as_ref()?;
        let is_asked = handshake::offers(request, TRACE_SUBPROTOCOL);
        let rules = self.rules.load();
        match rules.trace {
            TracedClients::Off => return None,
            TracedClients::Asked if !is_asked => return None,
            TracedClients::Asked | TracedClients::All => {}
        }
        let is_on_connection = rules.trace_method == TraceMethod::OwnFlow;
        let series = Arc::clone(&self.series);
        Some(TraceRequestSender { requests: requests.clone(), is_asked, is_on_connection, series })
    }

    fn spawn_client(
        &self,
        request: &mut Request<Bytes>,
        peer: SocketAddr,
        permit: ConnectionPermit,
        trace: Option<TraceRequestSender>,
        mut close_requests: watch::Receiver<u64>,
    ) {
        let upgrade = hyper::upgrade::on(request);
        let client_rules = ClientRules::of(&self.rules.load(), &self.is_muted);
        let series = Arc::clone(&self.series);
        series.accepted.inc();
        tokio::spawn(async move {
            let reason = match timeout(client::STALL_TIMEOUT, upgrade).await {
                Ok(Ok(upgraded)) => {
                    // A dropped sender counts as a close request, since it cannot send one later.
                    let close_requested = async { drop(close_requests.changed().await) };
                    match upgraded.downcast::<TokioIo<MaybeTls<TcpStream>>>() {
                        Ok(parts) => {
                            let stream = parts.io.into_inner();
                            let trace = trace.map(|trace| trace.send(peer, Some(stream.get_ref())));
                            let stream = ClientStream { stream, read: parts.read_buf };
                            client::serve(stream, client_rules, &series, trace, close_requested).await
                        }
                        Err(upgraded) => {
                            let trace = trace.map(|trace| trace.send(peer, None));
                            let stream = ClientStream { stream: TokioIo::new(upgraded), read: Bytes::new() };
                            client::serve(stream, client_rules, &series, trace, close_requested).await
                        }
                    }
                }
                Ok(Err(_)) | Err(_) => CloseReason::Error,
            };
            debug!(%peer, ?reason, "WebSocket client disconnected");
            series.closed(reason);
            drop(permit);
        });
    }

    /// Stops echoing messages but keeps connections open: a reply after the agent's goodbye would revoke it.
    pub fn stop_answering(&self) {
        self.is_muted.store(true, Ordering::Relaxed);
    }

    /// Refuses new clients, closes all connections, and returns when all clients are disconnected, or after
    /// `grace`.
    pub async fn leave(&self, grace: Duration) {
        self.is_shutting_down.store(true, Ordering::Release);
        self.close_all();
        if timeout(grace, self.connections.all_disconnected()).await.is_err() {
            debug!(
                clients = self.series.clients.get(),
                ?grace,
                "WebSocket clients still connected after the grace period"
            );
        }
    }

    fn close_all(&self) {
        self.close_requests.send_modify(|count| *count += 1);
    }
}

/// Requests the trace to a client when its connection is a WebSocket.
struct TraceRequestSender {
    requests: mpsc::Sender<ClientTraceRequest>,
    is_asked: bool,
    /// Whether the client's own connection may be used.
    is_on_connection: bool,
    series: Arc<WebSocketSeries>,
}

impl TraceRequestSender {
    fn send(self, peer: SocketAddr, stream: Option<&TcpStream>) -> ClientTrace {
        let (sender, messages) = mpsc::channel(trace::MESSAGES_MAX);
        let error_sender = sender.clone();
        let stream = stream.filter(|_| self.is_on_connection);
        let connection = stream.and_then(|stream| AcceptedConnection::of(stream, peer).ok());
        let request = ClientTraceRequest { client: peer.ip(), connection, messages: sender };
        if self.requests.try_send(request).is_err() {
            self.series.traced(ClientTraceResult::Busy);
            let reason = "too many clients ask for a trace; connect again later".to_owned();
            // The receiver is in this function.
            let _ = error_sender.try_send(ClientMessage::Update(TraceUpdate::Error { reason }));
        }
        ClientTrace { messages, is_asked: self.is_asked }
    }
}
