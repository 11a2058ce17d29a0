//! The running agent: start, event loop, reload, and shutdown.

mod client_traces;
mod discovery;
mod enumerations;
mod events;
mod file_watch;
mod goodbye;
mod listen;
mod measuring;
mod membership;
mod observability;
mod pending;
mod quotations;
mod servers;
mod shutdown;
mod stored_state;
mod supervision;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::Request;
use pathmeter_proto::admission::Policy;
use pathmeter_proto::wire::AgentKind;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use self::client_traces::ClientTraces;
use self::enumerations::Enumerations;
use self::file_watch::ConfigWatch;
use self::listen::{bind_agent, bind_all, bind_http, port_of};
use self::measuring::Measuring;
use self::membership::{Membership, PollResults};
use self::observability::Observability;
use self::pending::PendingWork;
use self::quotations::Quotations;
use self::servers::{Servers, policy};
use self::stored_state::StoredState;
use self::supervision::Supervision;
use crate::answering;
use crate::api::routes::{AppState, ReloadRequest, TraceRequest, WantedTrace, metrics_renderer};
use crate::api::status::Status;
use crate::bulk::{Bulk, Leases, RunResponder};
use crate::clock::Clock;
use crate::config::{LoadContext, LogFormat, SeriesLevel};
use crate::datagram::{self, Access, Service, ServiceTasks, TimestampMatching};
use crate::echo;
use crate::event_log::EventLog;
use crate::fleet::Fleet;
use crate::http::auth::Verifier;
use crate::http::server::{self, Counters, ServerLimits};
use crate::identity::{Identity, Ports};
use crate::local_routes::LocalRoutes;
use crate::logging;
use crate::loops::{EVENTS_PENDING_MAX, LoopEvent};
use crate::metrics::{Exporter, Responders};
use crate::probe::{Loops, OwnFlowPermission};
use crate::quoted_headers::QuotedHeaders;
use crate::route_record::PeerRoutes;
use crate::settings::{Settings, SettingsError};
use crate::stream::{self, responder::StreamAccess};
use crate::systemd::Notifier;
use crate::trace_log::TraceLog;
use crate::websocket::{self, ClientTraceRequest};

/// The source from which a running agent reloads its configuration.
#[derive(Debug, Clone)]
pub enum ConfigSource {
    /// A file.
    File {
        /// The path of the file.
        path: PathBuf,
        /// The properties of this host that it is read with.
        host: LoadContext,
        /// Whether the file is reloaded when it changes.
        is_watched: bool,
    },
    /// None: the program created the configuration, which cannot be reloaded.
    Fixed,
}

/// A running agent.
#[derive(Debug)]
pub struct Daemon {
    settings: Settings,
    config_watch: ConfigWatch,
    boot_id: u64,
    ports: Ports,
    membership: Membership,
    measuring: Measuring,
    client_traces: ClientTraces,
    enumerations: Enumerations,
    quotations: Quotations,
    servers: Servers,
    observability: Observability,
    stored_state: StoredState,
    supervision: Supervision,
    pending: PendingWork,
    channels: Channels,
}

/// The receivers of the event loop.
#[derive(Debug)]
struct Channels {
    events: mpsc::Receiver<LoopEvent>,
    polls: PollResults,
    reloads: mpsc::Receiver<ReloadRequest>,
    trace_requests: mpsc::Receiver<TraceRequest>,
    client_traces: mpsc::Receiver<ClientTraceRequest>,
    /// `None` if the kernel does not report changes of routes.
    local_routes: Option<LocalRoutes>,
}

/// Reload requests that wait for the daemon; further ones wait in their HTTP requests.
const RELOADS_PENDING_MAX: usize = 4;

/// Requests for traces that wait for the daemon; further ones wait in their HTTP requests.
const TRACE_REQUESTS_PENDING_MAX: usize = 16;

/// Clients that wait for a trace; further ones receive an error that asks them to connect again.
const CLIENT_TRACES_PENDING_MAX: usize = 64;

/// The maximum interval of the tick, at which the watchdog and retries are handled.
const TICK: Duration = Duration::from_secs(1);

/// Ticks between two attempts to start a path that could not be started.
const RETRY_EVERY: u64 = 30;

/// Ticks between two writes of events, traces and budgets.
const STORE_EVERY: u64 = 2;

/// Ticks between two rankings of the worst paths.
const RANK_EVERY: u64 = 30;

impl Daemon {
    /// Binds all sockets and starts the threads. Measurements start with [`run`](Self::run). Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// If a socket cannot be bound or a thread cannot be started; with the address of the socket.
    pub fn start(
        settings: Settings,
        source: ConfigSource,
        log: Option<logging::LogHandle>,
        notifier: Notifier,
    ) -> anyhow::Result<Self> {
        let listen = &settings.config.listen;
        let timestamps = TimestampMatching::detect();
        let listeners = bind_http(listen.http)?;
        let stamp_sockets = bind_all(listen.stamp, true, timestamps)?;
        let (agent_sockets, agent_listeners) = bind_agent(listen.agent, timestamps)?;
        let ports = Ports {
            http: listeners.first().and_then(|l| l.local_addr().ok()).unwrap_or(listen.http).port(),
            stamp: port_of(&stamp_sockets),
            agent: port_of(&agent_sockets),
        };
        let boot_id = random()?;
        let (event_sender, events) = mpsc::channel(EVENTS_PENDING_MAX);
        let (mut membership, polls) = Membership::new(boot_id);
        // Peers with literal addresses are answered from the first datagram on.
        membership.rebuild_roster(&settings);
        let (reload_sender, reloads) = mpsc::channel(RELOADS_PENDING_MAX);
        let (trace_sender, trace_requests) = mpsc::channel(TRACE_REQUESTS_PENDING_MAX);
        let (client_trace_sender, client_traces) = mpsc::channel(CLIENT_TRACES_PENDING_MAX);
        let local_routes = LocalRoutes::open()
            .inspect_err(|error| warn!(%error, "changes of this host's routes are not noticed"))
            .ok();
        let responders = Responders::default();
        let policy = policy(&settings.config, ports, &membership.roster, &membership.addresses);
        let stream_access = StreamAccess::new(policy.clone(), settings.keys.mesh.as_deref());
        let leases = Arc::new(Leases::new(settings.config.bandwidth.clone(), ports.agent));
        let bulk = Bulk { leases: Arc::clone(&leases), ..Bulk::default() };
        let stream_responder = stream::responder::StreamResponder::new(
            stream_access,
            stream::responder::ResponderLimits::default(),
            Arc::clone(&responders.stream),
        );
        for socket in &agent_sockets {
            bulk.port.add(socket.as_fd()).context("sharing the agent port with bandwidth runs")?;
        }
        let runs = RunResponder::new(&bulk).context("preparing bandwidth runs")?;
        let stream_responder = Arc::new(stream_responder.with_bulk(runs.connections()));
        let access = Access { policy, keys: settings.keys.mesh.clone() };
        let agent_port = Service {
            sockets: agent_sockets,
            tasks: ServiceTasks::AgentPort {
                tasks: vec![
                    (
                        AgentKind::Goodbye,
                        goodbye::listener(access.keys.as_deref(), Arc::clone(&responders.stamp)),
                    ),
                    (AgentKind::Bandwidth, runs.handshakes()),
                ],
                rejected: Arc::clone(&responders.stamp.agent_port_rejected),
            },
            answers_probes: false,
        };
        let sessions = settings.config.responder.sessions;
        let probe_budget = Arc::default();
        let traces = Arc::<TraceLog>::default();
        let quoted_headers = Arc::<QuotedHeaders>::default();
        let stamp = echo::responder(
            stamp_sockets,
            access,
            sessions,
            Arc::clone(&probe_budget),
            Arc::clone(&responders.stamp),
        );
        let services = vec![stamp, agent_port];
        let responder = datagram::spawn("responder", services, timestamps, event_sender.clone())
            .context("starting the responder thread")?;
        let prober = datagram::spawn("prober", Vec::new(), timestamps, event_sender.clone())
            .context("starting the prober thread")?;
        let streams = stream::spawn(event_sender).context("starting the stream thread")?;
        let loops = [prober.series(), responder.series(), streams.series()];
        let exporter = Arc::new(Exporter::new(loops.map(Arc::clone).into(), responders));
        let counters = Arc::new(Counters::default());
        let event_log = Arc::new(EventLog::default());
        let state_dir = settings.config.state_dir.as_deref();
        let (events_kept, traces_kept) = (Arc::clone(&event_log), Arc::clone(&traces));
        let stored_state = StoredState::restore(
            state_dir,
            events_kept,
            traces_kept,
            Arc::clone(&leases),
            Arc::clone(&exporter),
        );
        let web_config = Arc::new(ArcSwap::from_pointee(settings.web_config.value.clone()));
        let app_state = Arc::new(AppState {
            status: ArcSwap::default(),
            websocket: websocket::WebSocketResponder::new(
                settings.config.websocket.clone(),
                Arc::clone(&exporter.websocket),
            )
            .with_traces(client_trace_sender),
            events: Arc::clone(&event_log),
            traces: Arc::clone(&traces),
            verifier: ArcSwap::from_pointee(settings.keys.mesh.as_deref().map(Verifier::new)),
            leases,
            reloads: reload_sender,
            trace_requests: trace_sender,
            control: tokio::runtime::Handle::current(),
            web_config: Arc::clone(&web_config),
            renderer: metrics_renderer(Arc::clone(&exporter), Arc::clone(&counters), Arc::clone(&web_config)),
        });
        let handler = {
            let app_state = Arc::clone(&app_state);
            Arc::new(move |request: Request<Bytes>, peer: SocketAddr| {
                Arc::clone(&app_state).answer(request, peer)
            })
        };
        let stream_answers = Arc::clone(&stream_responder);
        let answering = answering::AnsweringHandle::spawn(|stopped| {
            let agent = stream_answers.serve(answering::register(agent_listeners)?, stopped.clone());
            let listeners = answering::register(listeners)?;
            let http =
                server::serve(listeners, ServerLimits::default(), handler, counters, web_config, stopped);
            Ok(async {
                tokio::join!(http, agent);
            })
        })
        .context("starting the answering thread")?;
        Ok(Self {
            config_watch: ConfigWatch::new(source, &settings),
            boot_id,
            ports,
            membership,
            measuring: Measuring {
                fleet: Fleet::new(random()?),
                loops: Loops {
                    prober,
                    streams,
                    probe_budget,
                    traces: Arc::clone(&traces),
                    quoted_headers: Arc::clone(&quoted_headers),
                    own_flow: OwnFlowPermission::default(),
                    bulk,
                },
            },
            client_traces: ClientTraces::new(random()?),
            enumerations: Enumerations::new(random()?),
            quotations: Quotations::new(quoted_headers),
            servers: Servers { responder, stream_responder, app_state, answering },
            observability: Observability { exporter, events: event_log },
            stored_state,
            supervision: Supervision::new(notifier, log),
            pending: PendingWork::default(),
            channels: Channels { events, polls, reloads, trace_requests, client_traces, local_routes },
            settings,
        })
    }

    /// Measures until `stop` is true or its sender is dropped, then sends goodbyes and stops within the grace
    /// period.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        self.start_measuring();
        let watchdog = self.supervision.notifier.watchdog_interval();
        let mut ticker = tokio::time::interval(watchdog.unwrap_or(TICK).min(TICK));
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut ticks = 0_u64;
        let mut files = tokio::time::interval(file_watch::CHECK_INTERVAL);
        files.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(event) = self.channels.events.recv() => self.on_event(event),
                Some((name, resolution)) = self.channels.polls.resolved.recv() => {
                    let exporter = &self.observability.exporter;
                    self.membership.on_resolved(name, resolution, exporter, &mut self.pending);
                }
                Some((name, result)) = self.channels.polls.reports.recv() => {
                    let own_name = &self.settings.config.agent.name;
                    let measuring = &self.measuring;
                    self.membership.on_report(name, result, own_name, measuring, &mut self.pending);
                }
                Some((provider, update)) = self.channels.polls.provider_updates.recv() => {
                    self.membership.on_provider_update(provider, update, &mut self.pending);
                }
                Some((agent, result)) = self.channels.polls.identified.recv() => {
                    let own_name = &self.settings.config.agent.name;
                    self.membership.on_identified(agent, result, own_name, &mut self.pending);
                }
                Some(reload) = self.channels.reloads.recv() => {
                    let outcome = self.reload().map_err(|error| error.to_string());
                    // The requester may not wait for the outcome.
                    let _ = reload.send(outcome);
                }
                Some(request) = self.channels.trace_requests.recv() => self.on_trace_request(request),
                Some(request) = self.channels.client_traces.recv() => {
                    let loops = &self.measuring.loops;
                    self.client_traces.start(request, &self.settings, loops, &self.observability);
                }
                received = receive_routes(&mut self.channels.local_routes) => {
                    if let Err(error) = received {
                        warn!(%error, "changes of this host's routes are no longer noticed");
                        self.channels.local_routes = None;
                    }
                }
                () = self.quotations.receive() => {}
                Some(ended) = self.client_traces.next_ended() => {
                    self.client_traces.on_ended(ended, &self.settings, &self.measuring.loops);
                }
                Some(result) = self.enumerations.next_ended() => {
                    let (Measuring { fleet, loops }, events) = (&self.measuring, &self.observability.events);
                    self.enumerations.ended(result, fleet, &self.settings, loops, events);
                }
                () = tokio::time::sleep_until(
                    self.pending.deadline.unwrap_or_else(tokio::time::Instant::now)
                ),
                    if self.pending.deadline.is_some() => self.do_pending_work(),
                _ = ticker.tick() => {
                    ticks += 1;
                    self.on_tick(ticks);
                    if ticks.is_multiple_of(STORE_EVERY) && self.stored_state.store() {
                        self.publish_status(false);
                    }
                }
                _ = files.tick() => self.check_files(),
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        self.shutdown().await;
    }

    fn start_measuring(&mut self) {
        self.apply_settings();
        self.membership.poll_identities(&self.settings, true);
        self.supervision.notifier.ready();
        let config = &self.settings.config;
        info!(
            name = config.agent.name,
            http = %config.listen.http,
            stamp = %config.listen.stamp,
            peers = config.peers.len(),
            targets = config.targets.len(),
            providers = config.providers.len(),
            probes = config.probes.len(),
            "measuring"
        );
    }

    /// The sender for requests to reload the configuration.
    #[must_use]
    pub fn reloads(&self) -> mpsc::Sender<ReloadRequest> {
        self.servers.app_state.reloads.clone()
    }

    /// The ports that the agent listens on; those chosen by the kernel are included.
    #[must_use]
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The exporter of the metrics.
    #[must_use]
    pub fn exporter(&self) -> Arc<Exporter> {
        Arc::clone(&self.observability.exporter)
    }

    /// The state that the HTTP API shows.
    #[must_use]
    pub fn app_state(&self) -> Arc<AppState> {
        Arc::clone(&self.servers.app_state)
    }

    fn on_trace_request(&mut self, request: TraceRequest) {
        let TraceRequest { target, wanted, started } = request;
        let count = match wanted {
            WantedTrace::Burst => Ok(self.measuring.request_traces(&target)),
            WantedTrace::Enumeration => {
                let (Measuring { fleet, loops }, events) = (&self.measuring, &self.observability.events);
                self.enumerations.request(&target, fleet, &self.settings, loops, events)
            }
        };
        // The requester may not wait for the outcome.
        let _ = started.send(count);
    }

    /// Reads the configuration again and applies it. If there is a problem, nothing is applied.
    fn reload(&mut self) -> Result<(), SettingsError> {
        let ConfigSource::File { path, host, .. } = &self.config_watch.source else { return Ok(()) };
        let micros = Clock::now().as_nanos() / 1_000;
        self.supervision.notifier.reloading(micros);
        let read = Settings::read(path, host).and_then(|new| new.can_replace(&self.settings).map(|()| new));
        let outcome = match read {
            Ok(mut settings) => {
                self.supervision.set_log_level(&self.settings, &settings);
                let renew = settings.keys.generation != self.settings.keys.generation;
                settings.inherit_connectors(&self.settings);
                self.settings = settings;
                self.apply_settings();
                self.membership.poll_identities(&self.settings, renew);
                info!(hash = self.settings.hash, "configuration reloaded");
                Ok(())
            }
            Err(error) => {
                self.observability.exporter.process.reloaded(None);
                error!(%error, "configuration not reloaded; the previous one stays in use");
                Err(error)
            }
        };
        self.supervision.notifier.ready();
        outcome
    }

    /// Applies the settings to all parts of the agent.
    fn apply_settings(&mut self) {
        for warning in &self.settings.warnings {
            warn!("{warning}");
        }
        self.membership.update_providers(&self.settings);
        self.membership.rebuild_roster(&self.settings);
        self.servers.apply_settings(&self.settings);
        self.client_traces.apply(&self.settings.config.websocket);
        self.measuring.set_trace_limits(self.settings.config.trace);
        self.quotations.apply(self.settings.config.trace.quoted_headers);
        self.config_watch.set_seen(&self.settings);
        self.observability.exporter.process.reloaded(Some(&self.settings.hash));
        self.export_tls_files();
        self.update_paths();
    }

    /// Updates the paths and the policy of the responders from settings, roster and addresses.
    fn update_paths(&mut self) {
        self.measuring.apply(&self.membership.plan_inputs(&self.settings));
        self.enumerations.paths_changed(&self.measuring.fleet);
        self.servers.set_policy(self.policy(), &self.settings);
        self.publish();
    }

    fn policy(&self) -> Policy {
        policy(&self.settings.config, self.ports, &self.membership.roster, &self.membership.addresses)
    }

    /// Does the work that changes have made necessary.
    fn do_pending_work(&mut self) {
        let PendingWork { rebuild_roster, update_paths, publish, .. } = std::mem::take(&mut self.pending);
        if rebuild_roster {
            self.membership.rebuild_roster(&self.settings);
        }
        if rebuild_roster || update_paths {
            self.update_paths();
            self.membership.poll_identities(&self.settings, false);
        } else if publish {
            self.publish();
        }
    }

    fn publish(&self) {
        self.observability.publish(&self.membership, &self.settings, &self.measuring.fleet);
        self.publish_status(false);
    }

    fn publish_status(&self, is_stopping: bool) {
        let config = &self.settings.config;
        let refusal = |(name, identity): (&String, &Identity)| {
            identity.you.stamp.reason.clone().map(|reason| (name.clone(), reason))
        };
        let refusals = self.membership.identities.iter().filter_map(refusal).collect();
        self.servers.app_state.status.store(Arc::new(Status {
            name: config.agent.name.clone(),
            labels: config.agent.labels.clone(),
            boot_id: self.boot_id,
            ports: Some(self.ports),
            policy: self.policy(),
            has_key: self.settings.keys.mesh.is_some(),
            paths: self.measuring.fleet.status(&refusals),
            reported_routes: self.membership.reported_routes.values().map(PeerRoutes::latest).collect(),
            providers: self.membership.providers(config),
            state_dir: self.stored_state.status(),
            is_stopping,
        }));
    }

    /// Triggers the watchdog, and at longer intervals reports the states of peers, retries paths and ranks
    /// paths.
    fn on_tick(&mut self, ticks: u64) {
        let changed = self.channels.local_routes.as_mut().map(LocalRoutes::take).unwrap_or_default();
        if !changed.is_empty() {
            self.measuring.local_routes_changed(&changed);
        }
        if ticks % 5 == 1 {
            let (up, total) =
                self.observability.count_states(&self.measuring.fleet, &self.membership.identified);
            let status = format!("measuring {total} peers and targets, {up} of them up");
            self.supervision.notifier.status(&status);
        }
        self.supervision.trigger_watchdog(&self.observability.exporter, self.servers.answering.heartbeats());
        if ticks.is_multiple_of(RETRY_EVERY) && self.measuring.fleet.has_failures() {
            self.update_paths();
        }
        if ticks.is_multiple_of(RANK_EVERY) && self.settings.config.metrics.level != SeriesLevel::Pair {
            self.measuring.fleet.rank();
            self.publish();
        }
    }
}

/// Converts the log format of the configuration.
#[must_use]
pub fn log_format(format: LogFormat) -> logging::Format {
    match format {
        LogFormat::Text => logging::Format::Text,
        LogFormat::Json => logging::Format::Json,
    }
}

/// Waits for a change of this host's routes, without end if they are not reported.
async fn receive_routes(local_routes: &mut Option<LocalRoutes>) -> io::Result<()> {
    match local_routes {
        Some(local_routes) => local_routes.receive().await,
        None => std::future::pending().await,
    }
}

fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("reading random bytes: {error}"))?;
    Ok(u64::from_ne_bytes(bytes))
}
