//! Routing and authorisation of HTTP requests.

use std::net::SocketAddr;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE,
};
use hyper::{Method, Request, Response, StatusCode};
use pathmeter_proto::time::nanos;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::bandwidth;
use super::endpoints::{
    BANDWIDTH_STOP, ENDPOINTS, ENUMERATIONS, EVENTS, PING, TRACES, TRACES_DIFF, WEBSOCKET, index_page,
};
use super::events;
use super::flow_routes::{self, Routes};
use super::renderer::Renderer;
use super::response::{json, json_or_problem, text, with_type};
use super::scrape::{Negotiated, wants_fresh};
use super::status::{PathView, ProviderStatus, SignatureStatus, StateDirStatus, Status};
use super::traces;
use crate::bulk::{LEASES, Leases};
use crate::event_log::{EventFeed, EventLog, FeedLimit, StoredEvent};
use crate::http::auth::{AuthError, Verifier};
use crate::http::basic::{self, is_basic};
use crate::http::server::{Body, Counters};
use crate::http::web_config::LoadedWebConfig;
use crate::identity::{self, CAPABILITIES, CallerAccess, Identity, Ports};
use crate::metrics::{Exporter, HttpCounts, TlsCounts};
use crate::route_record::RouteRecord;
use crate::trace_log::TraceLog;
use crate::websocket::{self, WebSocketResponder};

/// State shared by all request handlers.
#[derive(Debug)]
pub struct AppState {
    /// Latest snapshot of the daemon.
    pub status: ArcSwap<Status>,
    /// WebSocket responder at `/ws`.
    pub websocket: WebSocketResponder,
    /// Recent events.
    pub events: Arc<EventLog>,
    /// Recent traces.
    pub traces: Arc<TraceLog>,
    /// Verifies requests signed with the mesh key; `None` without a key.
    pub verifier: ArcSwap<Option<Verifier>>,
    /// Leases of bandwidth runs.
    pub leases: Arc<Leases>,
    /// Sends reload requests to the daemon.
    pub reloads: mpsc::Sender<ReloadRequest>,
    /// Sends requests for traces to the daemon.
    pub trace_requests: mpsc::Sender<TraceRequest>,
    /// TLS, users and headers of the HTTP port.
    pub web_config: Arc<ArcSwap<LoadedWebConfig>>,
    /// Runtime of the control plane. It answers requests that may take a while.
    pub control: Handle,
    /// Renders the metrics page.
    pub renderer: Renderer,
}

/// Returns a renderer of the metrics page of `exporter`, including the HTTP server's counters.
#[must_use]
pub fn metrics_renderer(
    exporter: Arc<Exporter>,
    counters: Arc<Counters>,
    web_config: Arc<ArcSwap<LoadedWebConfig>>,
) -> Renderer {
    Renderer::new(move |format| {
        let http = HttpCounts {
            connections: counters.connections(),
            accept_errors: counters.accept_errors(),
            responses: counters.responses(),
            tls: web_config.load().acceptor.as_ref().map(|acceptor| TlsCounts {
                handshake_errors: counters.handshake_errors(),
                certificate_expiry: acceptor.certificate_expiry(),
            }),
        };
        Box::new(exporter.page(&http, format))
    })
}

/// A request to reload the configuration, answered with the result.
pub type ReloadRequest = oneshot::Sender<Result<(), String>>;

/// A request to trace all traced paths to a peer or target.
#[derive(Debug)]
pub struct TraceRequest {
    /// The name of the peer or target.
    pub target: String,
    /// What is wanted of them.
    pub wanted: WantedTrace,
    /// Receives the number of these paths, or why they cannot be traced now.
    pub started: oneshot::Sender<Result<usize, String>>,
}

/// What a request wants of the traced paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedTrace {
    /// A trace of each flow.
    Burst,
    /// An enumeration of the equal-cost paths.
    Enumeration,
}

const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");

impl AppState {
    /// Answers a request. Requests that peers time, and connections that stay open, run on the caller's
    /// thread, all others on the control plane.
    ///
    /// Dropping the future also aborts the work there. A panic there is propagated.
    pub async fn answer(self: Arc<Self>, request: Request<Bytes>, peer: SocketAddr) -> Response<Body> {
        let received = ReceivedAt { at: Instant::now(), wall: SystemTime::now() };
        let path = request.uri().path();
        let is_feed = path == EVENTS && websocket::is_requested(&request);
        if is_feed || [PING, WEBSOCKET].contains(&path) {
            return self.authorized(request, peer, &received).await;
        }
        let control = self.control.clone();
        let mut task = JoinSet::new();
        task.spawn_on(async move { self.authorized(request, peer, &received).await }, &control);
        match task.join_next().await {
            Some(Ok(response)) => response,
            Some(Err(error)) if error.is_panic() => resume_unwind(error.into_panic()),
            // The control plane has shut down.
            Some(Err(_)) | None => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
        }
    }

    /// Answers if the client is authorised: agents sign with the mesh key, others need a password if users
    /// are configured.
    async fn authorized(
        &self,
        request: Request<Bytes>,
        peer: SocketAddr,
        received: &ReceivedAt,
    ) -> Response<Body> {
        let web_config = self.web_config.load_full();
        // Verify only once: a second verification would fail as a replay.
        let proof = self.proof(&request);
        let is_admitted = match &web_config.users {
            Some(users) => proof == SignatureStatus::Valid || users.admits(request.headers()).await,
            None => true,
        };
        let mut response = if is_admitted {
            self.routed(request, peer, proof, received).await
        } else {
            let mut response = text(
                StatusCode::UNAUTHORIZED,
                "user and password, or a signature with the mesh key, required\n",
            );
            response.headers_mut().insert(WWW_AUTHENTICATE, basic::CHALLENGE);
            response
        };
        response.headers_mut().extend(web_config.headers.clone());
        response
    }

    async fn routed(
        &self,
        request: Request<Bytes>,
        peer: SocketAddr,
        proof: SignatureStatus,
        received: &ReceivedAt,
    ) -> Response<Body> {
        let asked = request.uri().path();
        let methods: Vec<&Method> =
            ENDPOINTS.iter().filter(|(path, _, _)| *path == asked).map(|(_, method, _)| method).collect();
        let wanted = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
        if methods.is_empty() {
            // The only path with a variable part.
            let trace = asked.strip_prefix(TRACES).and_then(|rest| rest.strip_prefix('/'));
            return match trace.and_then(|number| traces::one(&self.traces, number)) {
                Some(trace) if wanted == Method::GET => json(&trace),
                Some(_) | None => text(StatusCode::NOT_FOUND, "not found; see / for a list of paths\n"),
            };
        }
        if !methods.contains(&wanted) {
            let methods = methods.iter().map(|method| method.as_str()).collect::<Vec<_>>().join(", ");
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, &format!("{asked} takes {methods}\n"));
            if let Ok(allowed) = HeaderValue::from_str(&methods) {
                response.headers_mut().insert(ALLOW, allowed);
            }
            return response;
        }
        let query = request.uri().query();
        match asked {
            "/metrics" => self.metrics(request.headers()).await,
            "/api/v1/agent" => self.agent(peer, &proof, query),
            "/api/v1/paths" => self.paths(),
            "/api/v1/discovery" => self.discovery(),
            "/api/v1/routes" => json(&Routes::of(&self.status.load())),
            EVENTS => self.events(request, peer),
            TRACES if wanted == Method::POST => {
                self.request_traces(peer, &proof, query, WantedTrace::Burst).await
            }
            ENUMERATIONS => self.request_traces(peer, &proof, query, WantedTrace::Enumeration).await,
            TRACES => json_or_problem(traces::list(&self.traces, query)),
            TRACES_DIFF => json_or_problem(traces::difference(&self.traces, query)),
            LEASES => {
                let status = self.status.load();
                bandwidth::lease(&self.leases, &status, peer.ip(), &proof, request.body())
            }
            BANDWIDTH_STOP => bandwidth::stop(&self.leases, peer.ip(), &proof),
            PING => self.ping(received).await,
            WEBSOCKET => {
                let (status, rules) = (self.status.load(), self.websocket.rules());
                self.websocket.answer(request, peer, |_| status.answers_websocket(&rules, peer.ip(), &proof))
            }
            "/-/healthy" => text(StatusCode::OK, "healthy\n"),
            "/-/ready" => self.ready(),
            "/-/reload" => self.reload(peer, &proof).await,
            _ => with_type(HTML, Full::from(index_page(&self.status.load().name))),
        }
    }

    async fn metrics(&self, headers: &HeaderMap) -> Response<Body> {
        let negotiated = Negotiated::of(headers);
        negotiated.response(self.renderer.page(negotiated, wants_fresh(headers)).await)
    }

    fn agent(&self, peer: SocketAddr, proof: &SignatureStatus, query: Option<&str>) -> Response<Body> {
        #[derive(Serialize)]
        struct Agent<'a> {
            #[serde(flatten)]
            identity: Identity,
            state: &'a StateDirStatus,
            #[serde(skip_serializing_if = "Option::is_none")]
            routes: Option<Vec<RouteRecord>>,
        }
        let status = self.status.load();
        let routes_to = traces::pairs(query).find(|(key, _)| *key == "routes_to").map(|(_, peer)| peer);
        let identity = Identity {
            name: status.name.clone(),
            labels: status.labels.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: identity::format_boot_id(status.boot_id),
            ports: status.ports.unwrap_or(Ports { http: 0, stamp: 0, agent: 0 }),
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            you: CallerAccess {
                address: peer.ip().to_string(),
                stamp: status.answers(peer.ip(), proof),
                websocket: Some(status.answers_websocket(&self.websocket.rules(), peer.ip(), proof)),
            },
        };
        let routes = routes_to.map(|peer| flow_routes::to_peer(&status, peer));
        json(&Agent { identity, state: &status.state_dir, routes })
    }

    fn paths(&self) -> Response<Body> {
        #[derive(Serialize)]
        struct Paths {
            paths: Vec<PathView>,
        }
        let status = self.status.load();
        json(&Paths { paths: status.paths.iter().map(PathView::from).collect() })
    }

    fn discovery(&self) -> Response<Body> {
        #[derive(Serialize)]
        struct Discovery<'a> {
            providers: &'a [ProviderStatus],
        }
        json(&Discovery { providers: &self.status.load().providers })
    }

    fn events(&self, mut request: Request<Bytes>, peer: SocketAddr) -> Response<Body> {
        #[derive(Serialize)]
        struct Events {
            /// Another one after each restart.
            boot_id: String,
            events: Vec<StoredEvent>,
        }
        let after = match events::requested_after(request.headers(), request.uri().query()) {
            Ok(after) => after,
            Err(problem) => return text(StatusCode::BAD_REQUEST, &problem),
        };
        let is_upgrade = websocket::is_requested(&request);
        if !is_upgrade && !events::wants_stream(request.headers()) {
            let boot_id = identity::format_boot_id(self.status.load().boot_id);
            return json(&Events { boot_id, events: self.events.after(after.unwrap_or(0)) });
        }
        let feed = match EventFeed::new(&self.events, after, peer.ip()) {
            Ok(feed) => feed,
            Err(FeedLimit::Total(limit)) => {
                let problem = format!("limit of {limit} clients that follow events reached\n");
                return text(StatusCode::SERVICE_UNAVAILABLE, &problem);
            }
            Err(FeedLimit::Source(limit)) => {
                let problem = format!("limit of {limit} clients of one address that follow events reached\n");
                return text(StatusCode::TOO_MANY_REQUESTS, &problem);
            }
        };
        if is_upgrade {
            return self.websocket.feed(&mut request, peer, feed);
        }
        let mut response = Response::new(events::stream_of(feed));
        response.headers_mut().insert(CONTENT_TYPE, EVENT_STREAM);
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    async fn ping(&self, received: &ReceivedAt) -> Response<Body> {
        if self.status.load().is_stopping {
            tokio::time::sleep(PING_REFUSAL_DELAY).await;
            return text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        }
        ping_response(received)
    }

    fn ready(&self) -> Response<Body> {
        let status = self.status.load();
        match (status.ports.is_some(), status.is_stopping) {
            (true, false) => text(StatusCode::OK, "ready\n"),
            (_, true) => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
            (false, false) => text(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        }
    }

    async fn reload(&self, peer: SocketAddr, proof: &SignatureStatus) -> Response<Body> {
        if !peer.ip().is_loopback() && *proof != SignatureStatus::Valid {
            let reason = "reload is allowed only from loopback, or signed with the mesh key\n";
            return text(StatusCode::FORBIDDEN, reason);
        }
        let (done, outcome) = oneshot::channel();
        if self.reloads.send(done).await.is_err() {
            return text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        }
        match outcome.await {
            Ok(Ok(())) => text(StatusCode::OK, "reloaded\n"),
            Ok(Err(problem)) => {
                text(StatusCode::BAD_REQUEST, &format!("{problem}\nthe old configuration stays in use\n"))
            }
            Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
        }
    }

    async fn request_traces(
        &self,
        peer: SocketAddr,
        proof: &SignatureStatus,
        query: Option<&str>,
        wanted: WantedTrace,
    ) -> Response<Body> {
        if !peer.ip().is_loopback() && *proof != SignatureStatus::Valid {
            let reason = match wanted {
                WantedTrace::Burst => "traces are allowed only from loopback, or signed with the mesh key\n",
                WantedTrace::Enumeration => {
                    "enumerations are allowed only from loopback, or signed with the mesh key\n"
                }
            };
            return text(StatusCode::FORBIDDEN, reason);
        }
        let Some(target) = traces::requested_target(query) else {
            let problem = "the query must be target=NAME, where NAME is a peer or target\n";
            return text(StatusCode::BAD_REQUEST, problem);
        };
        let (started, count) = oneshot::channel();
        let request = TraceRequest { target: target.to_owned(), wanted, started };
        if self.trace_requests.send(request).await.is_err() {
            return text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        }
        match count.await {
            Ok(Ok(0)) => {
                let traced = match wanted {
                    WantedTrace::Burst => "traced path",
                    WantedTrace::Enumeration => "path that is traced over UDP",
                };
                let problem = format!("no {traced} leads to {target}; see /api/v1/paths for the names\n");
                text(StatusCode::NOT_FOUND, &problem)
            }
            Ok(Ok(count)) => json(&serde_json::json!({"paths": count})),
            Ok(Err(reason)) => text(StatusCode::SERVICE_UNAVAILABLE, &(reason + "\n")),
            Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
        }
    }

    fn proof(&self, request: &Request<Bytes>) -> SignatureStatus {
        // Basic authentication is for users, not for agents.
        if is_basic(request.headers()) {
            return SignatureStatus::None;
        }
        let verifier = self.verifier.load();
        let Some(verifier) = verifier.as_ref() else {
            return if request.headers().contains_key(AUTHORIZATION) {
                SignatureStatus::NoLocalKey
            } else {
                SignatureStatus::None
            };
        };
        // A replayed ping is harmless: it changes nothing.
        let verified = match request.uri().path() {
            PING => verifier.recognise(request, SystemTime::now()),
            _ => verifier.verify(request, SystemTime::now()),
        };
        match verified {
            Ok(()) => SignatureStatus::Valid,
            Err(AuthError::Missing) => SignatureStatus::None,
            Err(AuthError::WrongKey) => SignatureStatus::WrongKey,
            // The key may still be right, and STAMP needs no synchronised clock.
            Err(refusal) => SignatureStatus::Unverifiable(refusal.to_string()),
        }
    }
}

/// When a request was received, as seen by this process.
struct ReceivedAt {
    at: Instant,
    wall: SystemTime,
}

/// Response to a ping. Fields may be added but not changed, for compatibility between versions.
#[derive(Serialize)]
struct PingResponse {
    received_timestamp_seconds: f64,
    sent_timestamp_seconds: f64,
    /// Measured with the monotonic clock; the client subtracts it from the RTT.
    turnaround_nanoseconds: u64,
}

/// Delay before a ping is refused during shutdown, so that peers receive the goodbye first. Chosen: the
/// goodbye takes 60 ms.
const PING_REFUSAL_DELAY: Duration = Duration::from_millis(500);

fn ping_response(received: &ReceivedAt) -> Response<Body> {
    let seconds =
        |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    json(&PingResponse {
        received_timestamp_seconds: seconds(received.wall),
        sent_timestamp_seconds: seconds(SystemTime::now()),
        turnaround_nanoseconds: nanos(received.at.elapsed()),
    })
}
