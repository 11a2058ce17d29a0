//! Start, reload, stop.

mod farewell;
mod files;
mod listen;
mod news;
mod people;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::Request;
use pathmeter_proto::admission::Policy;
use pathmeter_proto::time::nanos;
use pathmeter_proto::wire::{Goodbye, stamp};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use self::listen::{bind_agent, bind_all, front, port_of};
use self::people::Experience;
use crate::answering;
use crate::api::routes::{AppState, Reload, metrics_renderer};
use crate::api::status::Status;
use crate::clock::Clock;
use crate::config::{Config, Host, Level, LogFormat, Probe};
use crate::datagram::{Answering, Duties, EVENTS, Event, Handle, StampNames};
use crate::discovery::{Finding, Introduced, Introductions, Scout, Stranger};
use crate::fleet::{Addresses, Exported, Fleet, Loops, Scene};
use crate::http::auth::Verifier;
use crate::http::server::{self, Counters, Limits};
use crate::identity::{self, Identity, Ports};
use crate::journal::Journal;
use crate::logging;
use crate::metrics::agent::LoopSeries;
use crate::metrics::{Directory, Exporter, PeerState, ProbeInfo, Responders};
use crate::peers::{Door, Inquirer, Told, authority};
use crate::resolver::{Resolved, Resolver};
use crate::roster::{Knowledge, Roster};
use crate::settings::{Settings, SettingsError};
use crate::stream::{self, responder::Terms};
use crate::systemd::Notifier;
use crate::websocket;

/// Where a running agent finds its configuration again.
#[derive(Debug, Clone)]
pub enum Source {
    /// In a file, read for this host.
    File {
        /// Which file.
        path: PathBuf,
        /// What it is read for.
        host: Host,
        /// Whether it is read again whenever it has changed.
        is_watched: bool,
    },
    /// Nowhere: it was made by the program.
    Fixed,
}

/// A running agent.
#[derive(Debug)]
pub struct Daemon {
    source: Source,
    settings: Settings,
    /// What was there when it was looked at last.
    seen: files::Contents,
    /// Whether all of it could be read.
    was_whole: bool,
    boot_id: u64,
    ports: Ports,
    fleet: Fleet,
    /// Who there is, and what it is made of besides the settings.
    roster: Roster,
    knowledge: Knowledge,
    experience: BTreeMap<String, Experience>,
    /// Why strangers have not told what they are called.
    reticent: BTreeMap<Stranger, String>,
    addresses: Addresses,
    identities: BTreeMap<String, Identity>,
    /// Why those who refused to say who they are did.
    refusals: BTreeMap<String, String>,
    /// The last goodbye of each peer.
    goodbyes: BTreeMap<String, Goodbye>,
    loops: Loops,
    responder: Handle,
    stream_responder: Arc<stream::responder::Responder>,
    resolver: Resolver,
    inquirer: Inquirer,
    scout: Scout,
    introductions: Introductions,
    exporter: Arc<Exporter>,
    site: Arc<AppState>,
    journal: Arc<Journal>,
    answering: answering::Handle,
    notifier: Notifier,
    log: Option<logging::Handle>,
    progress: Vec<u64>,
    overdue: Overdue,
    inbox: Inbox,
}

/// What news have made out of date, and when it is brought up to date: news come in thousands, and are dealt with
/// together.
#[derive(Debug, Default)]
struct Overdue {
    /// There are others than before.
    enroll: bool,
    /// Addresses changed: paths may have to.
    measure: bool,
    /// Something that is shown changed.
    publish: bool,
    by: Option<tokio::time::Instant>,
}

/// How long news are collected.
const COLLECT: Duration = Duration::from_millis(50);

impl Overdue {
    fn note(&mut self, what: impl FnOnce(&mut Self)) {
        self.note_within(COLLECT, what);
    }

    /// The same for news of which more may come for longer.
    fn note_within(&mut self, span: Duration, what: impl FnOnce(&mut Self)) {
        what(self);
        self.by.get_or_insert_with(|| tokio::time::Instant::now() + span);
    }
}

/// What the daemon hears.
#[derive(Debug)]
struct Inbox {
    events: mpsc::Receiver<Event>,
    resolved: mpsc::Receiver<Resolved>,
    told: mpsc::Receiver<Told>,
    found: mpsc::Receiver<Finding>,
    introduced: mpsc::Receiver<Introduced>,
    reloads: mpsc::Receiver<Reload>,
}

/// How often the daemon looks after itself.
const TICK: Duration = Duration::from_secs(1);

/// A path that could not be started is tried again this often.
const TRY_AGAIN: u64 = 30;

/// Which paths are the worst is looked at this often, in ticks.
const RANK_EVERY: u64 = 30;

impl Daemon {
    /// Binds all sockets; nothing is measured yet. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// What could not be bound or started, with its address.
    pub fn start(
        settings: Settings,
        source: Source,
        log: Option<logging::Handle>,
        notifier: Notifier,
    ) -> anyhow::Result<Self> {
        let listen = &settings.config.listen;
        let stamps = StampNames::detect();
        let listeners = front(listen.http)?;
        let stamp_sockets = bind_all(listen.stamp, stamps)?;
        let (agent_sockets, agent_listeners) = bind_agent(listen.agent, stamps)?;
        let ports = Ports {
            http: listeners.first().and_then(|l| l.local_addr().ok()).unwrap_or(listen.http).port(),
            stamp: port_of(&stamp_sockets),
            agent: port_of(&agent_sockets),
        };
        let boot_id = random()?;
        let (event_sender, events) = mpsc::channel(EVENTS);
        let (resolved_sender, resolved) = mpsc::channel(64);
        let (told_sender, told) = mpsc::channel(64);
        let (found_sender, found) = mpsc::channel(64);
        let (introduced_sender, introduced) = mpsc::channel(64);
        let (reload_sender, reloads) = mpsc::channel(4);
        let responders = Responders::default();
        let policy = policy(&settings.config, ports, &Roster::default(), &Addresses::new());
        let terms = Terms::new(policy.clone(), settings.keys.mesh.as_deref());
        let stream_responder = Arc::new(stream::responder::Responder::new(
            terms,
            stream::responder::Limits::default(),
            Arc::clone(&responders.stream),
        ));
        let answering = Answering {
            sockets: stamp_sockets,
            policy,
            keys: settings.keys.mesh.clone(),
            sessions: settings.config.responder.sessions,
            series: Arc::clone(&responders.stamp),
        };
        let duties = Duties { answer: Some(answering), listen: agent_sockets };
        let responder = Handle::spawn("responder", duties, stamps, event_sender.clone())
            .context("starting the responder's thread")?;
        let prober = Handle::spawn("prober", Duties::default(), stamps, event_sender.clone())
            .context("starting the prober's thread")?;
        let streams = stream::Handle::spawn(event_sender).context("starting the thread of connections")?;
        let answering_stats = Arc::new(LoopSeries::new(answering::LOOP));
        let stats = [prober.stats(), responder.stats(), streams.stats(), &answering_stats].map(Arc::clone);
        let exporter = Arc::new(Exporter::new(stats.into(), responders));
        let counters = Arc::new(Counters::default());
        let journal = Arc::new(Journal::default());
        let web_config = Arc::new(ArcSwap::from_pointee(settings.web_config.value.clone()));
        let site = Arc::new(AppState {
            status: ArcSwap::default(),
            websocket: websocket::Responder::new(
                settings.config.websocket.clone(),
                Arc::clone(&exporter.websocket),
            ),
            journal: Arc::clone(&journal),
            verifier: ArcSwap::from_pointee(settings.keys.mesh.as_deref().map(Verifier::new)),
            reloads: reload_sender,
            control: tokio::runtime::Handle::current(),
            web_config: Arc::clone(&web_config),
            renderer: metrics_renderer(Arc::clone(&exporter), Arc::clone(&counters), Arc::clone(&web_config)),
        });
        let handler = {
            let site = Arc::clone(&site);
            Arc::new(move |request: Request<Bytes>, peer: SocketAddr| Arc::clone(&site).answer(request, peer))
        };
        let stream_answers = Arc::clone(&stream_responder);
        let answering = answering::Handle::spawn(answering_stats, |stopped| {
            let agent = stream_answers.serve(answering::register(agent_listeners)?, stopped.clone());
            let listeners = answering::register(listeners)?;
            let http = server::serve(listeners, Limits::default(), handler, counters, web_config, stopped);
            Ok(async {
                tokio::join!(http, agent);
            })
        })
        .context("starting the thread that answers over connections")?;
        Ok(Self {
            source,
            seen: files::Contents::of(&settings),
            was_whole: true,
            boot_id,
            ports,
            fleet: Fleet::new(boot_id),
            roster: Roster::default(),
            knowledge: Knowledge { own_boot_id: identity::shown(boot_id), ..Knowledge::default() },
            experience: BTreeMap::new(),
            reticent: BTreeMap::new(),
            addresses: Addresses::new(),
            identities: BTreeMap::new(),
            refusals: BTreeMap::new(),
            goodbyes: BTreeMap::new(),
            loops: Loops { prober, streams },
            responder,
            stream_responder,
            resolver: Resolver::new(resolved_sender),
            inquirer: Inquirer::new(told_sender),
            scout: Scout::new(found_sender),
            introductions: Introductions::new(introduced_sender),
            exporter,
            site,
            journal,
            answering,
            notifier,
            log,
            progress: Vec::new(),
            overdue: Overdue::default(),
            inbox: Inbox { events, resolved, told, found, introduced, reloads },
            settings,
        })
    }

    /// Measures until `stop` holds true or its sender is gone, then says goodbye and stops within the grace period.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        self.begin();
        let watchdog = self.notifier.watchdog_interval();
        let mut ticker = tokio::time::interval(watchdog.unwrap_or(TICK).min(TICK));
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut ticks = 0_u64;
        let mut files = tokio::time::interval(files::LOOK_EVERY);
        files.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(event) = self.inbox.events.recv() => self.heard(event),
                Some(resolved) = self.inbox.resolved.recv() => self.resolved(resolved),
                Some(told) = self.inbox.told.recv() => self.told(told),
                Some(finding) = self.inbox.found.recv() => self.found(finding),
                Some(introduced) = self.inbox.introduced.recv() => self.introduced(introduced),
                Some(reload) = self.inbox.reloads.recv() => {
                    let outcome = self.reload().map_err(|error| error.to_string());
                    // Whoever asked may have gone.
                    let _ = reload.send(outcome);
                }
                () = tokio::time::sleep_until(self.overdue.by.unwrap_or_else(tokio::time::Instant::now)),
                    if self.overdue.by.is_some() => self.catch_up(),
                _ = ticker.tick() => {
                    ticks += 1;
                    self.look_after(ticks);
                }
                _ = files.tick() => self.look_at_files(),
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        self.leave().await;
    }

    fn begin(&mut self) {
        self.put_in_force();
        self.inquire(true);
        self.notifier.ready();
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

    /// Where reloads are asked for.
    #[must_use]
    pub fn reloads(&self) -> mpsc::Sender<Reload> {
        self.site.reloads.clone()
    }

    /// The ports that it really listens on.
    #[must_use]
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// What it exports.
    #[must_use]
    pub fn exporter(&self) -> Arc<Exporter> {
        Arc::clone(&self.exporter)
    }

    /// What it shows of itself.
    #[must_use]
    pub fn site(&self) -> Arc<AppState> {
        Arc::clone(&self.site)
    }

    /// Reads the configuration again and puts it in force; on any problem nothing changes.
    fn reload(&mut self) -> Result<(), SettingsError> {
        let Source::File { path, host, .. } = &self.source else { return Ok(()) };
        let micros = Clock::now().as_nanos() / 1_000;
        self.notifier.reloading(micros);
        let read = Settings::read(path, host).and_then(|new| new.can_replace(&self.settings).map(|()| new));
        let outcome = match read {
            Ok(mut settings) => {
                let level = &settings.config.log.level;
                let log = self.log.as_ref().filter(|_| *level != self.settings.config.log.level);
                if let Some(Err(error)) = log.map(|log| log.set_level(level)) {
                    error!(%error, "changing the log level");
                }
                let renew = settings.keys.generation != self.settings.keys.generation;
                settings.succeed(&self.settings);
                self.settings = settings;
                self.put_in_force();
                self.inquire(renew);
                info!(hash = self.settings.hash, "configuration reloaded");
                Ok(())
            }
            Err(error) => {
                self.exporter.process.reloaded(None);
                error!(%error, "the configuration was not reloaded; the old one stays in force");
                Err(error)
            }
        };
        self.notifier.ready();
        outcome
    }

    /// Makes everything agree with the settings.
    fn put_in_force(&mut self) {
        for warning in &self.settings.warnings {
            warn!("{warning}");
        }
        self.look_around();
        self.enroll();
        let config = &self.settings.config;
        // A verifier goes on remembering which requests it has seen.
        match (self.settings.keys.mesh.as_deref(), self.site.verifier.load().as_ref()) {
            (Some(keys), Some(verifier)) => verifier.set_keys(keys),
            (keys, _) => self.site.verifier.store(Arc::new(keys.map(Verifier::new))),
        }
        self.site.websocket.set_rules(config.websocket.clone());
        if let Some(clients) = self.site.websocket.shortage() {
            warn!(
                clients,
                "the limit of open files allows fewer WebSocket clients than websocket.clients_max"
            );
        }
        self.seen = files::Contents::of(&self.settings);
        self.exporter.process.reloaded(Some(&self.settings.hash));
        self.serve();
        self.measure();
    }

    /// Makes paths and policy agree with settings and addresses.
    fn measure(&mut self) {
        let Self { settings, roster, addresses, identities, fleet, loops, .. } = self;
        fleet.apply(&Scene { settings, roster, addresses, identities }, loops);
        let keys = &settings.keys;
        let policy = policy(&settings.config, self.ports, roster, addresses);
        self.stream_responder.change(Terms::new(policy.clone(), keys.mesh.as_deref()));
        self.responder.answer(policy, keys.mesh.clone());
        self.publish();
    }

    /// Deals with the news that were collected.
    fn catch_up(&mut self) {
        let Overdue { enroll, measure, publish, .. } = std::mem::take(&mut self.overdue);
        if enroll {
            self.enroll();
            self.forget_reasons();
        }
        if enroll || measure {
            self.measure();
            self.inquire(false);
        } else if publish {
            self.publish();
        }
    }

    fn publish(&self) {
        let config = &self.settings.config;
        let Exported { groups, paths, path_mtus, streams, dropped } = self.fleet.exported(&config.metrics);
        self.exporter.process.set_series_dropped(dropped);
        let Self { settings, roster, addresses, identities, .. } = self;
        let counts = Scene { settings, roster, addresses, identities }.counts();
        let probes =
            config.probes.iter().zip(counts).map(|(probe, targets)| probe_info(probe, targets)).collect();
        let attributes = |name: &str, address: &str, labels: &BTreeMap<String, String>| {
            let identity = self.identities.get(name);
            // What a peer says of itself goes above what the file says of it.
            let mut labels = labels.clone();
            labels.extend(identity.map(|identity| identity.labels.clone()).unwrap_or_default());
            let mut attributes = vec![("address".to_owned(), address.to_owned())];
            let said = |what: fn(&Identity) -> &String| identity.map(what).cloned().unwrap_or_default();
            attributes.push(("agent".to_owned(), said(|identity| &identity.name)));
            attributes.push(("version".to_owned(), said(|identity| &identity.version)));
            attributes.extend(labels.iter().map(|(key, value)| (format!("label_{key}"), value.clone())));
            (name.to_owned(), attributes)
        };
        let peers = roster.peers.values().map(|peer| attributes(&peer.name, &peer.address, &peer.labels));
        let targets = roster.targets.values();
        let targets = targets.map(|target| attributes(&target.name, &target.address, &target.labels));
        self.exporter.publish(Directory {
            groups,
            paths,
            path_mtus,
            streams,
            probes,
            peers: peers.chain(targets).collect(),
        });
        self.show(false);
    }

    fn show(&self, is_stopping: bool) {
        let config = &self.settings.config;
        let refusal = |(name, identity): (&String, &Identity)| {
            identity.you.stamp.reason.clone().map(|reason| (name.clone(), reason))
        };
        let refusals = self.identities.iter().filter_map(refusal).collect();
        self.site.status.store(Arc::new(Status {
            name: config.agent.name.clone(),
            labels: config.agent.labels.clone(),
            boot_id: self.boot_id,
            ports: Some(self.ports),
            policy: policy(config, self.ports, &self.roster, &self.addresses),
            has_key: self.settings.keys.mesh.is_some(),
            paths: self.fleet.status(&refusals),
            providers: self.providers(),
            is_stopping,
        }));
    }

    /// Asks the peers that have an address who they are.
    fn inquire(&mut self, renew: bool) {
        let address_of = |name: &str| self.addresses.get(name)?.as_ref().ok()?.first().copied();
        let peers = self.roster.peers.values();
        let known = peers.filter_map(|peer| {
            let address = SocketAddr::new(address_of(&peer.name)?, peer.http_port);
            let secure = peer.https.as_ref().map(|https| self.settings.secure(https));
            Some((
                peer.name.clone(),
                Door { address, host: authority(&peer.address, peer.http_port), secure },
            ))
        });
        let client = self.client();
        self.inquirer.follow(&known.collect(), &client, renew);
        self.introduce(&client, renew);
    }

    /// Once a second: the watchdog; now and then states, and what may be tried again.
    fn look_after(&mut self, ticks: u64) {
        if ticks % 5 == 1 {
            self.count_states();
        }
        let progress: Vec<u64> = self.exporter.loops().iter().map(|series| series.progress.get()).collect();
        // A loop that stands still measures nothing: let the supervisor restart us.
        let is_alive = progress.iter().zip(&self.progress).all(|(now, before)| now != before);
        if is_alive && self.notifier.watchdog_interval().is_some() {
            self.notifier.watchdog();
        }
        self.progress = progress;
        if ticks.is_multiple_of(TRY_AGAIN) && self.fleet.has_trouble() {
            self.measure();
        }
        if ticks.is_multiple_of(RANK_EVERY) && self.settings.config.metrics.level != Level::Pair {
            self.fleet.rank();
            self.publish();
        }
    }

    fn count_states(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let states = self.fleet.states(nanos(now));
        let count = |state: PeerState| states.values().filter(|known| **known == state).count();
        self.exporter.process.set_peers(count);
        let (up, all) = (count(PeerState::Up), states.len());
        self.notifier.status(&format!("measuring {all} peers and targets, {up} of them up"));
    }

    /// Tells the peers, drains, and stops; the last scrape works until the end.
    async fn leave(mut self) {
        info!("stopping");
        self.notifier.stopping();
        self.show(true);
        // Whoever waits for a reload, or asks for one from now on, is told that we are stopping.
        self.inbox.reloads.close();
        while self.inbox.reloads.try_recv().is_ok() {}
        let grace = self.settings.config.agent.grace;
        let deadline = tokio::time::Instant::now() + grace;
        if self.settings.keys.mesh.is_some() {
            // First of all: an answer after the goodbye would take it back.
            self.responder.fall_silent();
            self.stream_responder.fall_silent();
            self.site.websocket.fall_silent();
            self.say_goodbye().await;
        }
        self.loops.stop(deadline.saturating_duration_since(tokio::time::Instant::now()));
        let (longest, site) = (grace + Duration::from_secs(1), self.site());
        let drained = tokio::time::timeout(longest, self.drain());
        let (drained, ()) = tokio::join!(drained, site.websocket.leave(longest));
        if drained.is_err() {
            error!("the prober did not stop in time");
        }
        self.responder.stop(Duration::ZERO);
        self.answering.stop().await;
        info!("stopped");
    }

    /// Waits for the prober to end; peers that leave at the same time are still heard.
    async fn drain(&mut self) {
        let mut ticker = tokio::time::interval(Duration::from_millis(5));
        while !self.loops.are_finished() {
            tokio::select! {
                Some(event) = self.inbox.events.recv() => self.heard(event),
                _ = ticker.tick() => {}
            }
        }
    }
}

fn policy(config: &Config, ports: Ports, roster: &Roster, addresses: &Addresses) -> Policy {
    let of = |name: &String| addresses.get(name).and_then(|found| found.as_ref().ok()).into_iter().flatten();
    // One that has not told its name yet wants to know ours.
    let strangers = roster.strangers.keys().filter_map(|stranger| stranger.host.parse::<IpAddr>().ok());
    let peers = roster.peers.keys().flat_map(|name| of(name).copied()).chain(strangers).collect();
    let others = roster.peers.values().map(|peer| peer.stamp_port);
    let targets = roster.targets.values().map(|target| target.port);
    let own = [ports.stamp, ports.agent, stamp::PORT];
    Policy {
        open: config.responder.open,
        peers,
        prefixes: config.responder.allow.clone(),
        reflector_ports: own.into_iter().chain(others).chain(targets).collect(),
        rate: config.responder.rate,
        rate_per_source: config.responder.rate_per_source,
    }
}

fn probe_info(probe: &Probe, targets: usize) -> ProbeInfo {
    let Probe::Echo(echo) = probe;
    ProbeInfo {
        name: echo.name.clone(),
        kind: "echo",
        targets,
        protocol: echo.transport.name(),
        dscp: echo.dscp.to_string(),
        interval: echo.interval,
        late_after: echo.late_after,
        lost_after: echo.lost_after,
    }
}

/// How the configuration calls a log format.
#[must_use]
pub fn log_format(format: LogFormat) -> logging::Format {
    match format {
        LogFormat::Text => logging::Format::Text,
        LogFormat::Json => logging::Format::Json,
    }
}

fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("drawing a random number: {error}"))?;
    Ok(u64::from_ne_bytes(bytes))
}
