//! The fleet: starts and stops paths, so that the running ones are those of the configuration and the
//! addresses.

mod inputs;
mod kinds;
mod liveness;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pathmeter_proto::prefix::Prefix;
use pathmeter_proto::schedule::mix;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::Trigger;

pub use self::inputs::PlanInputs;
use self::kinds::kind;
pub use self::status::PathStatus;
use crate::config::{FamilyChoice, Metrics, PATHS_MAX, Probe, SeriesLevel};
use crate::datagram::Control;
use crate::metrics::{AnySeries, Blocks};
use crate::paths::{PathId, PathKey};
use crate::probe::{Followed, Groups, Loops, Path, Plan, StartContext};

/// A path that is running or could not be started.
#[derive(Debug)]
struct RunningPath {
    id: PathId,
    path: Box<dyn Path>,
    sources: Vec<SocketAddr>,
    /// Why the path has no connection; `None`: it has one, or needs none.
    disconnected: Option<String>,
    /// Why the path could not be started; `None`: it could.
    failure: Option<String>,
    /// Why the previous attempt to start the path failed.
    last_failure: Option<String>,
    /// The link to the path that follows it, or that it follows.
    followed: Arc<Followed>,
}

/// All paths.
#[derive(Debug)]
pub struct Fleet {
    running: BTreeMap<PathKey, RunningPath>,
    keys: BTreeMap<PathId, PathKey>,
    unmeasured: Vec<(PathKey, String)>,
    /// Groups of paths, by kind of probe; empty unless metrics are exported by group.
    groups: BTreeMap<&'static str, Box<dyn Groups>>,
    /// The time of the last goodbye of each peer, for paths that are replaced while the peer is away.
    leaving: BTreeMap<String, Timestamp>,
    next_id: u64,
    seed: u64,
}

/// The plans of the desired paths.
type DesiredPaths = BTreeMap<PathKey, Box<dyn Plan>>;

/// The series that are exported.
#[derive(Debug, Default)]
pub struct ExportedSeries {
    /// The series of groups and paths.
    pub blocks: Blocks,
    /// The number of paths that are not exported because of the limit.
    pub dropped: usize,
}

/// The addresses of peers and targets, or why there are none, by name.
pub type Addresses = BTreeMap<String, Result<Vec<IpAddr>, String>>;

impl Fleet {
    /// A fleet without paths. `seed` makes agents differ in phase, jitter and session numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            running: BTreeMap::new(),
            keys: BTreeMap::new(),
            unmeasured: Vec::new(),
            groups: BTreeMap::new(),
            leaving: BTreeMap::new(),
            next_id: 1,
            seed,
        }
    }

    /// Starts, changes and stops paths, so that exactly the desired ones run. A path whose plan is unchanged
    /// is not touched; one whose plan changed keeps its counters.
    pub fn apply(&mut self, inputs: &PlanInputs<'_>, loops: &Loops) {
        let (desired, unmeasured) = self.desired(inputs);
        self.unmeasured = unmeasured;
        let removed: Vec<PathKey> =
            self.running.keys().filter(|key| !desired.contains_key(key)).cloned().collect();
        for key in removed {
            if let Some(running) = self.running.remove(&key) {
                self.keys.remove(&running.id);
                running.path.stop(loops);
                running.followed.unfollow(running.id);
            }
        }
        let follows = followed_probes(inputs);
        let (following, measuring): (DesiredPaths, DesiredPaths) =
            desired.into_iter().partition(|(key, _)| follows.contains_key(&*key.probe));
        for (key, plan) in measuring.into_iter().chain(following) {
            let id = PathId(self.next_id);
            let followed = self.running.get(&followed_key(&follows, &key));
            let followed = followed.map(|running| Arc::clone(&running.followed)).unwrap_or_default();
            let start = StartContext {
                id,
                key: &key,
                settings: inputs.settings,
                loops,
                peer_left_at: self.leaving.get(&*key.peer).copied(),
                seed: self.seed_of(&key),
                followed: Arc::clone(&followed),
            };
            let (earlier, last_failure) = match self.running.remove(&key) {
                Some(mut running)
                    if running.failure.is_none()
                        && Arc::ptr_eq(&running.followed, &followed)
                        && plan.can_continue(running.path.plan()) =>
                {
                    running.path.adjust(plan, &StartContext { id: running.id, ..start });
                    self.running.insert(key, running);
                    continue;
                }
                Some(running) => {
                    self.keys.remove(&running.id);
                    running.path.stop(loops);
                    (Some(running.path), running.failure)
                }
                None => (None, None),
            };
            let path = plan.start(&start, earlier);
            self.next_id += 1;
            let sources = Vec::new();
            let (disconnected, failure) = (None, None);
            let running = RunningPath { id, path, sources, disconnected, failure, last_failure, followed };
            self.keys.insert(id, key.clone());
            self.running.insert(key, running);
        }
        self.arrange_groups(inputs);
    }

    /// Assigns the paths to groups, if metrics are exported by group.
    fn arrange_groups(&mut self, inputs: &PlanInputs<'_>) {
        let config = &inputs.settings.config;
        let SeriesLevel::Group { label, .. } = &config.metrics.level else {
            return self.groups.clear();
        };
        for probe in &config.probes {
            let name = probe.kind.as_kind_config().name();
            if !self.groups.contains_key(name)
                && let Some(groups) = kind(&probe.kind).groups()
            {
                self.groups.insert(name, groups);
            }
        }
        let paths: Vec<(&PathKey, &dyn Path)> =
            self.running.iter().map(|(key, running)| (key, &*running.path)).collect();
        for groups in self.groups.values_mut() {
            groups.arrange(&|peer| inputs.label(peer, label).to_owned(), &paths);
        }
    }

    /// Ranks the paths by their results since the last call. The worst ones have series of their own if
    /// metrics are exported by group.
    pub fn rank(&mut self) {
        for groups in self.groups.values_mut() {
            groups.refresh();
        }
    }

    /// The plans of the desired paths, and the paths that cannot be measured, with the reason.
    fn desired(&self, inputs: &PlanInputs<'_>) -> (DesiredPaths, Vec<(PathKey, String)>) {
        let (mut desired, mut unmeasured) = (DesiredPaths::new(), Vec::new());
        for probe in &inputs.settings.config.probes {
            let probe_name: Arc<str> = probe.name.as_str().into();
            for (name, remote) in inputs.selected(probe) {
                let peer: Arc<str> = name.into();
                let key_for =
                    |family| PathKey { probe: Arc::clone(&probe_name), peer: Arc::clone(&peer), family };
                let Some(remote) = remote else {
                    unmeasured.push((key_for("auto"), format!("no provider lists {name}")));
                    continue;
                };
                if let Err(reason) = remote.check_kind(&probe.kind) {
                    unmeasured.push((key_for("auto"), reason));
                    continue;
                }
                for (family, address) in self.choose_addresses(probe, name, inputs.addresses, key_for) {
                    let key = key_for(family);
                    match address {
                        Ok(_) if desired.len() >= PATHS_MAX => {
                            unmeasured.push((key, format!("the limit of {PATHS_MAX} paths is reached")));
                        }
                        Ok(address) => {
                            let plan = kind(&probe.kind).plan(probe, &remote, address, inputs.settings);
                            desired.insert(key, plan);
                        }
                        Err(reason) => unmeasured.push((key, reason)),
                    }
                }
            }
        }
        (desired, unmeasured)
    }

    /// The addresses to measure, one for each requested family. An address in use is kept as long as the name
    /// resolves to it.
    fn choose_addresses(
        &self,
        probe: &Probe,
        name: &str,
        addresses: &Addresses,
        key: impl Fn(&'static str) -> PathKey,
    ) -> Vec<(&'static str, Result<IpAddr, String>)> {
        let choice = match (probe.family, probe.source) {
            (FamilyChoice::Auto, Some(source)) if source.is_ipv4() => FamilyChoice::Ipv4,
            (FamilyChoice::Auto, Some(_)) => FamilyChoice::Ipv6,
            (choice, _) => choice,
        };
        let known = match addresses.get(name) {
            Some(Ok(known)) => known,
            Some(Err(reason)) => return vec![("auto", Err(reason.clone()))],
            None => return vec![("auto", Err("name resolution is in progress".to_owned()))],
        };
        let in_use = |family: &'static str| {
            let running = self.running.get(&key(family)).map(|running| running.path.plan().to().ip());
            running.filter(|address| known.contains(address))
        };
        let address_of = |family: &'static str| {
            let first = || known.iter().copied().find(|address| family_of(*address) == family);
            let address = in_use(family).or_else(first);
            address.ok_or_else(|| format!("{name} has no {family} address"))
        };
        match choice {
            FamilyChoice::Ipv4 => vec![("ipv4", address_of("ipv4"))],
            FamilyChoice::Ipv6 => vec![("ipv6", address_of("ipv6"))],
            FamilyChoice::Both => vec![("ipv4", address_of("ipv4")), ("ipv6", address_of("ipv6"))],
            FamilyChoice::Auto => {
                let running = in_use("ipv4").or_else(|| in_use("ipv6"));
                let address = running.or_else(|| known.first().copied());
                let family = address.map_or("auto", family_of);
                vec![(family, address.ok_or_else(|| format!("{name} has no address")))]
            }
        }
    }

    fn seed_of(&self, key: &PathKey) -> u64 {
        let text = format!("{}\0{}\0{}", key.probe, key.peer, key.family);
        text.bytes().fold(mix(self.seed ^ self.next_id), |seed, byte| mix(seed ^ u64::from(byte)))
    }

    /// The key of the path with this identifier.
    #[must_use]
    pub fn key(&self, id: PathId) -> Option<&PathKey> {
        self.keys.get(&id)
    }

    /// Handles that a path was started, with its source addresses. Returns its key if it had no connection
    /// before.
    pub fn started(&mut self, id: PathId, sources: Vec<SocketAddr>) -> Option<PathKey> {
        let key = self.keys.get(&id)?;
        let running = self.running.get_mut(key)?;
        running.path.started(&sources);
        running.sources = sources;
        running.disconnected.take().map(|_| key.clone())
    }

    /// Handles that a path has no connection. Returns its key if it had one before, unless its peer is
    /// leaving.
    pub fn disconnected(&mut self, id: PathId, reason: String) -> Option<PathKey> {
        let key = self.keys.get(&id)?;
        let running = self.running.get_mut(key)?;
        let had_one = running.disconnected.replace(reason).is_none();
        (had_one && !running.path.measured().is_draining()).then(|| key.clone())
    }

    /// Handles that a path could not be started. Returns its key if the reason differs from that of the
    /// previous attempt.
    pub fn not_started(&mut self, id: PathId, reason: String) -> Option<PathKey> {
        let key = self.keys.get(&id)?;
        let running = self.running.get_mut(key)?;
        let is_new = running.last_failure.as_ref() != Some(&reason);
        running.failure = Some(reason);
        is_new.then(|| key.clone())
    }

    /// Whether any path could not be started.
    #[must_use]
    pub fn has_failures(&self) -> bool {
        self.running.values().any(|running| running.failure.is_some())
    }

    /// Whether a peer has ever answered on any of its paths.
    #[must_use]
    pub fn has_answered(&self, peer: &str) -> bool {
        let mut towards = self.running.iter().filter(|(key, _)| *key.peer == *peer);
        towards.any(|(_, running)| running.path.measured().last_reply() > 0)
    }

    /// The series that are exported: those of groups, then those of paths in the order of their keys, up to
    /// the limit.
    #[must_use]
    pub fn exported(&self, metrics: &Metrics) -> ExportedSeries {
        let mut blocks = Blocks::default();
        let mut capacity = metrics.series_max;
        let mut export = |members: Vec<Arc<dyn AnySeries>>, capacity: &mut usize| {
            let needs = members.iter().map(|member| member.lines()).sum();
            let Some(remaining) = capacity.checked_sub(needs) else {
                *capacity = 0;
                return false;
            };
            *capacity = remaining;
            for member in members {
                member.add_to(&mut blocks);
            }
            true
        };
        for group in self.groups.values().flat_map(|groups| groups.series()) {
            export(vec![group], &mut capacity);
        }
        let hidden = self.hidden(metrics);
        let mut dropped = 0;
        for (_, running) in self.running.iter().filter(|(key, _)| !hidden.contains(*key)) {
            dropped += usize::from(!export(running.path.series(), &mut capacity));
        }
        ExportedSeries { blocks, dropped }
    }

    /// The paths without series of their own: they are exported only as part of their group.
    fn hidden(&self, metrics: &Metrics) -> BTreeSet<PathKey> {
        let SeriesLevel::Group { worst, .. } = metrics.level else { return BTreeSet::new() };
        let ranked = self.groups.values().map(|groups| groups.worst(worst));
        ranked.flat_map(|(all, worst)| all.difference(&worst).cloned().collect::<Vec<_>>()).collect()
    }

    /// The metrics of the configured probes themselves.
    #[must_use]
    pub fn probe_series(probes: &[Probe]) -> Vec<Arc<dyn AnySeries>> {
        probes.iter().flat_map(|probe| kind(&probe.kind).probe_series(probe)).collect()
    }

    /// The status of all paths. `refusals` has the reasons of peers that do not answer this agent.
    #[must_use]
    pub fn status(&self, refusals: &BTreeMap<String, String>) -> Vec<PathStatus> {
        let running = self.running.iter().map(|(key, running)| {
            let measured = running.path.measured();
            // What a peer reports over HTTP is relevant only if it does not answer probes.
            let refusal = || refusals.get(&*key.peer).filter(|_| measured.last_reply() == 0).cloned();
            let known = running.failure.clone().or_else(|| running.disconnected.clone());
            PathStatus {
                reason: known.or_else(refusal),
                key: key.clone(),
                to: Some(running.path.plan().to()),
                sources: running.sources.clone(),
                measured: running.failure.is_none().then_some(measured),
            }
        });
        let unmeasured = self.unmeasured.iter().map(|(key, reason)| PathStatus {
            key: key.clone(),
            to: None,
            sources: Vec::new(),
            measured: None,
            reason: Some(reason.clone()),
        });
        running.chain(unmeasured).collect()
    }

    /// Handles the goodbye of a peer, received at `at`. Returns the number of paths to it.
    pub fn peer_leaving(&mut self, peer: &str, at: Timestamp, loops: &Loops) -> usize {
        let towards = self.running.iter().filter(|(key, _)| *key.peer == *peer);
        let ids: Vec<PathId> = towards.map(|(_, running)| running.id).collect();
        if !ids.is_empty() {
            self.leaving.insert(peer.to_owned(), at);
            loops.peer_leaving(&ids, at);
        }
        ids.len()
    }

    /// The paths to a peer or target, with their plans.
    pub fn paths_to(&self, target: &str) -> impl Iterator<Item = (&PathKey, &dyn Plan)> {
        let to_target = self.running.iter().filter(move |(key, _)| *key.peer == *target);
        to_target.map(|(key, running)| (key, running.path.plan()))
    }

    /// The plan of a path; `None` if the path is not running.
    #[must_use]
    pub fn plan(&self, key: &PathKey) -> Option<&dyn Plan> {
        Some(self.running.get(key)?.path.plan())
    }

    /// Requests a trace of each path to a peer or target that a traced path follows. Returns their number.
    pub fn request_traces(&self, target: &str, loops: &Loops) -> usize {
        self.trace_to(target, Trigger::Request, loops)
    }

    /// Requests a trace of each traced path to a peer, because the peer reports that a route of its own has
    /// changed. Returns their number.
    pub fn peer_routes_changed(&self, peer: &str, loops: &Loops) -> usize {
        self.trace_to(peer, Trigger::Peer, loops)
    }

    fn trace_to(&self, target: &str, trigger: Trigger, loops: &Loops) -> usize {
        let to_target = self.running.iter().filter(|(key, _)| *key.peer == *target);
        Self::trigger(to_target.map(|(_, running)| running), trigger, loops)
    }

    /// Requests a trace of each traced path to these destinations, because this host's routes have changed.
    pub fn local_routes_changed(&self, destinations: &[Prefix], loops: &Loops) -> usize {
        let is_meant = |running: &&RunningPath| {
            let to = running.path.plan().to().ip();
            destinations.iter().any(|destination| destination.contains(to))
        };
        Self::trigger(self.running.values().filter(is_meant), Trigger::LocalRoute, loops)
    }

    /// Triggers the paths that follow these. Returns their number.
    fn trigger<'a>(paths: impl Iterator<Item = &'a RunningPath>, trigger: Trigger, loops: &Loops) -> usize {
        // Each link belongs to two paths.
        let followers: BTreeSet<PathId> =
            paths.filter_map(|running| running.followed.trigger(trigger)).collect();
        followers.iter().for_each(|id| loops.prober.control(Control::Wake(*id)));
        followers.len()
    }
}

/// The names of the probes that follow another, with the name of the other.
fn followed_probes<'a>(inputs: &PlanInputs<'a>) -> BTreeMap<&'a str, &'a str> {
    let probes = inputs.settings.config.probes.iter();
    probes.filter_map(|probe| Some((&*probe.name, probe.kind.as_kind_config().follows()?))).collect()
}

/// The key of the path that a path follows; its own if it follows none.
fn followed_key(follows: &BTreeMap<&str, &str>, key: &PathKey) -> PathKey {
    match follows.get(&*key.probe) {
        Some(followed) => PathKey { probe: (*followed).into(), ..key.clone() },
        None => key.clone(),
    }
}

fn family_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}
