//! The paths that run: which there should be, by the configuration and the addresses, and which there are.

mod groups;
mod plan;
mod scene;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::grid::mix;
use pathmeter_proto::key::Keys;
use pathmeter_proto::mtu;
use pathmeter_proto::time::Timestamp;

use self::groups::Groups;
use self::plan::{Connected, Plan, Way, plan};
pub use self::scene::Scene;
use crate::api::status::PathStatus;
use crate::config::{EchoProbe, FamilyChoice, Level, Metrics, PATHS_MAX, PathMtu, Probe, Transport};
use crate::datagram::{Handle, NewPath, NewSearch, PathId};
use crate::metrics::PeerState;
use crate::metrics::echo::{EchoSeries, SERIES_PER_PATH};
use crate::metrics::group::{GroupSeries, SERIES_PER_GROUP};
use crate::metrics::path_mtu::{PathMtuSeries, SERIES_PER_PATH_MTU};
use crate::metrics::stream::{SERIES_PER_STREAM, StreamSeries};
use crate::settings::Settings;
use crate::stream::{self, Dial, NewStream};

/// What a path is: the same as long as these are the same, whatever else is changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathKey {
    /// The configured probe.
    pub probe: Arc<str>,
    /// The peer or target.
    pub peer: Arc<str>,
    /// `ipv4` or `ipv6`.
    pub family: &'static str,
}

/// What there should be of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    plan: Plan,
    path_mtu: Option<PathMtu>,
}

/// Where a path that is started counts.
struct NewSeries<'a> {
    series: &'a Arc<EchoSeries>,
    /// Of an earlier life.
    stream: Option<Arc<StreamSeries>>,
    search: Option<NewSearch>,
}

/// How the MTU of a path is looked for, and where that is counted.
#[derive(Debug, Clone)]
struct Discovery {
    choice: PathMtu,
    series: Arc<PathMtuSeries>,
}

/// A path that runs.
#[derive(Debug)]
struct Running {
    id: PathId,
    plan: Plan,
    series: Arc<EchoSeries>,
    path_mtu: Option<Discovery>,
    /// Of the connections that it is measured over, if it is.
    stream: Option<Arc<StreamSeries>>,
    sources: Vec<SocketAddr>,
    /// Why it has no connection.
    broken: Option<String>,
    /// Why it could not be started.
    trouble: Option<String>,
    /// Why it could not be started the time before.
    last_trouble: Option<String>,
}

/// Keys in force.
#[derive(Debug, Clone, Default)]
pub struct KeyRing {
    /// The mesh's.
    pub mesh: Option<Arc<Keys>>,
    /// Those of targets, by name.
    pub targets: BTreeMap<String, Arc<Keys>>,
    /// Grows whenever a file's content changes.
    pub generation: u64,
}

/// All paths.
#[derive(Debug)]
pub struct Fleet {
    running: BTreeMap<PathKey, Running>,
    /// By the names that the loop knows.
    ids: BTreeMap<PathId, PathKey>,
    unmeasured: Vec<(PathKey, String)>,
    groups: Groups,
    /// When each peer last said that it is leaving: a path that is replaced meanwhile must know.
    goodbyes: BTreeMap<String, Timestamp>,
    next_id: u64,
    seed: u64,
    transmit_stamps: bool,
}

/// The series that are exported.
#[derive(Debug, Default)]
pub struct Exported {
    /// Of groups of paths.
    pub groups: Vec<Arc<GroupSeries>>,
    /// Of paths.
    pub paths: Vec<Arc<EchoSeries>>,
    /// Of their MTUs.
    pub path_mtus: Vec<Arc<PathMtuSeries>>,
    /// Of their connections.
    pub streams: Vec<Arc<StreamSeries>>,
    /// Paths that are over the limit.
    pub dropped: usize,
}

/// The threads that measure.
#[derive(Debug)]
pub struct Loops {
    /// By datagrams.
    pub prober: Handle,
    /// Over connections.
    pub streams: stream::Handle,
}

impl Loops {
    fn remove(&self, running: &Running) {
        match running.plan.way {
            Way::Datagrams(_) => self.prober.remove(running.id),
            Way::Stream(_) => self.streams.remove(running.id),
        }
    }

    /// Stops sending, waits at most `grace` for what is undecided, and ends the threads.
    pub fn stop(&self, grace: Duration) {
        self.prober.stop(grace);
        self.streams.stop(grace);
    }

    /// Whether the threads have ended.
    #[must_use]
    pub fn are_finished(&self) -> bool {
        self.prober.is_finished() && self.streams.is_finished()
    }
}

/// What is known of the addresses of one peer or target.
pub type Addresses = BTreeMap<String, Result<Vec<IpAddr>, String>>;

impl Fleet {
    /// No paths yet. `seed` makes two agents differ in phase, jitter and session numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            running: BTreeMap::new(),
            ids: BTreeMap::new(),
            unmeasured: Vec::new(),
            groups: Groups::default(),
            goodbyes: BTreeMap::new(),
            next_id: 1,
            seed,
            transmit_stamps: true,
        }
    }

    /// Starts, changes and stops paths until there are those that there should be. Those that stay the same are not
    /// touched; those that change keep their counters. How their MTU is looked for is changed by itself.
    pub fn apply(&mut self, scene: &Scene<'_>, loops: &Loops) {
        let settings = scene.settings;
        let keys = &settings.keys;
        let (wanted, unmeasured) = self.wanted(scene);
        self.unmeasured = unmeasured;
        let gone: Vec<PathKey> =
            self.running.keys().filter(|key| !wanted.contains_key(key)).cloned().collect();
        for key in gone {
            if let Some(running) = self.running.remove(&key) {
                self.ids.remove(&running.id);
                loops.remove(&running);
            }
        }
        for (key, Wanted { plan, path_mtu }) in wanted {
            let known = self.running.get(&key).and_then(|running| running.path_mtu.as_ref());
            let path_mtu = path_mtu.map(|choice| Discovery::of(&key, choice, known));
            let search = path_mtu.as_ref().map(|discovery| self.search(&key, &plan, discovery, keys));
            let (series, stream, last_trouble) = match self.running.get_mut(&key) {
                Some(running) if running.plan == plan && running.trouble.is_none() => {
                    let choice = |discovery: &Option<Discovery>| discovery.as_ref().map(|d| d.choice);
                    if choice(&running.path_mtu) != choice(&path_mtu) {
                        loops.prober.search(running.id, search);
                        running.path_mtu = path_mtu;
                    }
                    continue;
                }
                Some(running) => {
                    self.ids.remove(&running.id);
                    loops.remove(running);
                    running.series.begin_again(plan.flows());
                    (Arc::clone(&running.series), running.stream.clone(), running.trouble.clone())
                }
                None => {
                    (Arc::new(EchoSeries::new(&key.probe, &key.peer, key.family, plan.flows())), None, None)
                }
            };
            let id = PathId(self.next_id);
            self.next_id += 1;
            let new = NewSeries { series: &series, stream, search };
            let stream = self.start(id, &key, &plan, settings, new, loops);
            let running = Running {
                id,
                plan,
                series,
                path_mtu,
                stream,
                sources: Vec::new(),
                broken: None,
                trouble: None,
                last_trouble,
            };
            self.ids.insert(id, key.clone());
            self.running.insert(key, running);
        }
        self.groups.arrange(scene, self.running.iter().map(|(key, running)| (key, &running.series)));
    }

    /// Looks at how the paths fare: the worst have series of their own where groups have.
    pub fn rank(&mut self) {
        self.groups.look();
    }

    /// Starts a path on the thread that measures its way; returns where its connections are counted, if it has any.
    fn start(
        &self,
        id: PathId,
        key: &PathKey,
        plan: &Plan,
        settings: &Settings,
        new: NewSeries<'_>,
        loops: &Loops,
    ) -> Option<Arc<StreamSeries>> {
        let keys = &settings.keys;
        let absent_since = self.goodbyes.get(&*key.peer).copied();
        let NewSeries { series, stream, search } = new;
        let (keys, seed) = (plan.secret.among(keys, &key.peer), self.seed_of(key));
        match &plan.way {
            Way::Datagrams(datagrams) => {
                loops.prober.add(NewPath {
                    id,
                    spec: plan.spec(datagrams, keys, self.transmit_stamps, seed),
                    from: datagrams.from,
                    absent_since,
                    series: Arc::clone(series),
                    path_mtu: search,
                    tap: None,
                });
                None
            }
            Way::Stream(connected) => {
                let Connected { source, host, fresh, over } = &**connected;
                let new = || Arc::new(StreamSeries::new(&key.probe, &key.peer, key.family));
                let stream = stream.unwrap_or_else(new);
                let over = over.with(keys.as_deref(), settings);
                loops.streams.add(NewStream {
                    id,
                    spec: plan.stream_spec(&over, seed),
                    dial: Dial { to: plan.to, host: host.clone(), source: *source, dscp: plan.dscp, over },
                    fresh: *fresh,
                    series: Arc::clone(series),
                    stream: Arc::clone(&stream),
                    absent_since,
                    tap: None,
                });
                Some(stream)
            }
        }
    }

    fn wanted(&self, scene: &Scene<'_>) -> (BTreeMap<PathKey, Wanted>, Vec<(PathKey, String)>) {
        let (mut wanted, mut unmeasured) = (BTreeMap::new(), Vec::new());
        let Settings { config, keys, .. } = scene.settings;
        for probe in &config.probes {
            let Probe::Echo(echo) = probe;
            let probe: Arc<str> = echo.name.as_str().into();
            for (name, remote) in scene.towards(echo) {
                let peer: Arc<str> = name.into();
                let of = |family| PathKey { probe: Arc::clone(&probe), peer: Arc::clone(&peer), family };
                let Some(remote) = remote else {
                    unmeasured.push((of("auto"), format!("no provider has found {name}")));
                    continue;
                };
                if let Err(reason) = remote.is_reached_by(&echo.transport) {
                    unmeasured.push((of("auto"), reason));
                    continue;
                }
                for (family, found) in self.choose(echo, name, scene.addresses, of) {
                    let key = of(family);
                    match found {
                        Ok(_) if wanted.len() >= PATHS_MAX => {
                            unmeasured.push((key, format!("it is one more than {PATHS_MAX} paths")));
                        }
                        Ok(address) => {
                            let plan = plan(echo, &remote, address, keys);
                            let path_mtu = match &echo.transport {
                                Transport::Udp(udp) => udp.path_mtu,
                                Transport::Icmp(_)
                                | Transport::Tcp(_)
                                | Transport::WebSocket(_)
                                | Transport::Http(_) => None,
                            };
                            wanted.insert(key, Wanted { plan, path_mtu });
                        }
                        Err(reason) => unmeasured.push((key, reason)),
                    }
                }
            }
        }
        (wanted, unmeasured)
    }

    /// The addresses to measure, one for each family that is asked for. An address that is in use stays in use as long as
    /// the name has it.
    fn choose(
        &self,
        echo: &EchoProbe,
        name: &str,
        addresses: &Addresses,
        key: impl Fn(&'static str) -> PathKey,
    ) -> Vec<(&'static str, Result<IpAddr, String>)> {
        let choice = match (echo.family, echo.source) {
            (FamilyChoice::Auto, Some(source)) if source.is_ipv4() => FamilyChoice::Ipv4,
            (FamilyChoice::Auto, Some(_)) => FamilyChoice::Ipv6,
            (choice, _) => choice,
        };
        let known = match addresses.get(name) {
            Some(Ok(known)) => known,
            Some(Err(reason)) => return vec![("auto", Err(reason.clone()))],
            None => return vec![("auto", Err("its name is being looked up".to_owned()))],
        };
        let in_use = |family: &'static str| {
            let running = self.running.get(&key(family)).map(|running| running.plan.to.ip());
            running.filter(|address| known.contains(address))
        };
        let of = |family: &'static str| {
            let first = || known.iter().copied().find(|address| family_of(*address) == family);
            let found = in_use(family).or_else(first);
            found.ok_or_else(|| format!("{name} has no {family} address"))
        };
        match choice {
            FamilyChoice::Ipv4 => vec![("ipv4", of("ipv4"))],
            FamilyChoice::Ipv6 => vec![("ipv6", of("ipv6"))],
            FamilyChoice::Both => vec![("ipv4", of("ipv4")), ("ipv6", of("ipv6"))],
            FamilyChoice::Auto => {
                let running = in_use("ipv4").or_else(|| in_use("ipv6"));
                let address = running.or_else(|| known.first().copied());
                let family = address.map_or("auto", family_of);
                vec![(family, address.ok_or_else(|| format!("{name} has no address")))]
            }
        }
    }

    fn search(&self, key: &PathKey, plan: &Plan, discovery: &Discovery, keys: &KeyRing) -> NewSearch {
        discovery.series.begin_again(discovery.choice.ceiling);
        let spec = mtu::Spec {
            to: plan.to,
            ssid: 0,
            interval: discovery.choice.interval,
            ceiling: discovery.choice.ceiling,
            dscp: plan.dscp,
            lost_after: plan.lost_after,
            keys: plan.secret.among(keys, &key.peer),
            known: discovery.series.bytes(),
            seed: mix(self.seed_of(key)),
        };
        NewSearch { spec, series: Arc::clone(&discovery.series) }
    }

    fn seed_of(&self, key: &PathKey) -> u64 {
        let text = format!("{}\0{}\0{}", key.probe, key.peer, key.family);
        text.bytes().fold(mix(self.seed ^ self.next_id), |seed, byte| mix(seed ^ u64::from(byte)))
    }

    /// Which path a loop means.
    #[must_use]
    pub fn key(&self, id: PathId) -> Option<&PathKey> {
        self.ids.get(&id)
    }

    /// A path sends from these addresses. Returns its key if it had had no connection.
    pub fn started(&mut self, id: PathId, sources: Vec<SocketAddr>) -> Option<PathKey> {
        let key = self.ids.get(&id)?;
        let running = self.running.get_mut(key)?;
        running.sources = sources;
        running.broken.take().map(|_| key.clone())
    }

    /// A path has no connection. Returns its key when it was news, and no news is that of a peer which said that it is leaving.
    pub fn broken(&mut self, id: PathId, reason: String) -> Option<PathKey> {
        let key = self.ids.get(&id)?;
        let running = self.running.get_mut(key)?;
        let is_news = running.broken.replace(reason).is_none() && !running.series.is_draining();
        is_news.then(|| key.clone())
    }

    /// A path could not be started. Returns its key when it was news.
    pub fn failed(&mut self, id: PathId, reason: String) -> Option<PathKey> {
        let key = self.ids.get(&id)?;
        let running = self.running.get_mut(key)?;
        let is_news = running.last_trouble.as_ref() != Some(&reason);
        running.trouble = Some(reason);
        is_news.then(|| key.clone())
    }

    /// Whether a path could not be started.
    #[must_use]
    pub fn has_trouble(&self) -> bool {
        self.running.values().any(|running| running.trouble.is_some())
    }

    /// Whether a peer has ever answered on any of its paths.
    #[must_use]
    pub fn has_heard(&self, peer: &str) -> bool {
        self.running.iter().any(|(key, running)| *key.peer == *peer && running.series.last_reply() > 0)
    }

    /// The paths towards a peer.
    #[must_use]
    pub fn towards(&self, peer: &str) -> Vec<PathId> {
        self.running.iter().filter(|(key, _)| *key.peer == *peer).map(|(_, running)| running.id).collect()
    }

    /// The series that are exported: groups if there are, and paths in their order, until one does not fit any more.
    #[must_use]
    pub fn exported(&self, metrics: &Metrics) -> Exported {
        let mut exported = Exported { groups: self.groups.series(), ..Exported::default() };
        let mut room = metrics.max_series;
        exported.groups.truncate(room / SERIES_PER_GROUP);
        room -= exported.groups.len() * SERIES_PER_GROUP;
        let worst = match metrics.level {
            Level::Pair => None,
            Level::Group { worst, .. } => Some(self.groups.worst(worst)),
        };
        let is_wanted = |key: &PathKey| worst.as_ref().is_none_or(|worst| worst.contains(key));
        let mut wanted = 0;
        for (_, Running { series, path_mtu, stream, .. }) in
            self.running.iter().filter(|(key, _)| is_wanted(key)).inspect(|_| wanted += 1)
        {
            let needs = SERIES_PER_PATH
                + path_mtu.as_ref().map_or(0, |_| SERIES_PER_PATH_MTU)
                + stream.as_ref().map_or(0, |_| SERIES_PER_STREAM);
            let Some(left) = room.checked_sub(needs) else {
                room = 0;
                continue;
            };
            room = left;
            exported.paths.push(Arc::clone(series));
            exported.path_mtus.extend(path_mtu.as_ref().map(|discovery| Arc::clone(&discovery.series)));
            exported.streams.extend(stream.clone());
        }
        exported.dropped = wanted - exported.paths.len();
        exported
    }

    /// All paths as they are shown. `refusals`: what peers say about answering us.
    #[must_use]
    pub fn status(&self, refusals: &BTreeMap<String, String>) -> Vec<PathStatus> {
        let running = self.running.iter().map(|(key, running)| PathStatus {
            probe: Arc::clone(&key.probe),
            peer: Arc::clone(&key.peer),
            family: key.family,
            to: Some(running.plan.to),
            sources: running.sources.clone(),
            series: running.trouble.is_none().then(|| Arc::clone(&running.series)),
            path_mtu: running.path_mtu.as_ref().map(|discovery| Arc::clone(&discovery.series)),
            // What a peer says to our HTTP address matters only where it does not answer our datagrams.
            reason: running.trouble.clone().or_else(|| running.broken.clone()).or_else(|| {
                match running.series.last_reply() {
                    0 => refusals.get(&*key.peer).cloned(),
                    _ => None,
                }
            }),
        });
        let unmeasured = self.unmeasured.iter().map(|(key, reason)| PathStatus {
            probe: Arc::clone(&key.probe),
            peer: Arc::clone(&key.peer),
            family: key.family,
            to: None,
            sources: Vec::new(),
            series: None,
            path_mtu: None,
            reason: Some(reason.clone()),
        });
        running.chain(unmeasured).collect()
    }

    /// The state of every peer and target that is measured. `now`: nanoseconds since 1970.
    #[must_use]
    pub fn states(&self, now: u64) -> BTreeMap<&str, PeerState> {
        let mut states: BTreeMap<&str, PeerState> = BTreeMap::new();
        for (key, _) in &self.unmeasured {
            states.insert(&key.peer, PeerState::Unresolved);
        }
        for (key, Running { series, plan, .. }) in &self.running {
            let patience = plan.lost_after + 2 * plan.interval;
            let age = Duration::from_nanos(now.saturating_sub(series.last_reply()));
            let state = match (series.is_draining(), series.last_reply() > 0 && age <= patience) {
                (true, _) => PeerState::Draining,
                (false, true) => PeerState::Up,
                (false, false) => PeerState::Down,
            };
            // One path that works shows that the peer is there.
            let known = states.entry(&key.peer).or_insert(state);
            *known = (*known).min(state);
        }
        states
    }

    /// The peer of these paths said that it is leaving.
    pub fn goodbye(&mut self, peer: &str, at: Timestamp, loops: &Loops) -> usize {
        let ids = self.towards(peer);
        let count = ids.len();
        if count > 0 {
            self.goodbyes.insert(peer.to_owned(), at);
        }
        // Each knows its own.
        loops.streams.goodbye(ids.clone(), at);
        loops.prober.goodbye(ids, at);
        count
    }
}

impl Discovery {
    /// Goes on with the series of an earlier one.
    fn of(key: &PathKey, choice: PathMtu, earlier: Option<&Self>) -> Self {
        let new = || Arc::new(PathMtuSeries::new(&key.probe, &key.peer, key.family));
        Self { choice, series: earlier.map_or_else(new, |earlier| Arc::clone(&earlier.series)) }
    }
}

fn family_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}
