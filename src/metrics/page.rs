//! The page that a scrape gets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use pathmeter_proto::time::nanos;
use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::agent::{
    LOOP_FAMILIES, LoopSeries, RESPONDER_FAMILIES, ResponderSeries, STREAM_RESPONDER_FAMILIES,
    StreamResponderSeries,
};
use super::echo::{ECHO_FAMILIES, EchoSeries};
use super::group::{GROUP_FAMILIES, GroupSeries};
use super::path_mtu::{PATH_MTU_FAMILIES, PathMtuSeries};
use super::process::{HttpCounts, ProcessMetrics};
use super::stream::{STREAM_FAMILIES, StreamSeries};
use super::text::{CLOSE, Family, Format, Kind, Suffix, Writer, label};
use super::websocket::{WEBSOCKET_FAMILIES, WebSocketSeries};

/// Everything that is exported.
#[derive(Debug)]
pub struct Exporter {
    /// Metrics of the process.
    pub process: ProcessMetrics,
    /// What `/ws` counts.
    pub websocket: Arc<WebSocketSeries>,
    directory: ArcSwap<Directory>,
    loops: Vec<Arc<LoopSeries>>,
    responders: Responders,
}

/// What those who answer count.
#[derive(Debug, Default, Clone)]
pub struct Responders {
    /// Over UDP.
    pub stamp: Arc<ResponderSeries>,
    /// Over TCP.
    pub stream: Arc<StreamResponderSeries>,
}

/// What is measured at the moment. Replaced as a whole: a path that leaves it leaves the page.
#[derive(Debug, Default)]
pub struct Directory {
    /// Paths that are exported.
    pub paths: Vec<Arc<EchoSeries>>,
    /// Groups of paths.
    pub groups: Vec<Arc<GroupSeries>>,
    /// Those whose MTU is looked for.
    pub path_mtus: Vec<Arc<PathMtuSeries>>,
    /// Those over connections.
    pub streams: Vec<Arc<StreamSeries>>,
    /// Configured probes.
    pub probes: Vec<ProbeInfo>,
    /// Attributes of peers and targets, by name.
    pub peers: BTreeMap<String, Vec<(String, String)>>,
}

/// Attributes of a configured probe.
#[derive(Debug, Clone)]
pub struct ProbeInfo {
    /// Its name.
    pub name: String,
    /// What it measures.
    pub kind: &'static str,
    /// Peers and targets that it chooses.
    pub targets: usize,
    /// Over which protocol.
    pub protocol: &'static str,
    /// With which class of service.
    pub dscp: String,
    /// How often, for each path.
    pub interval: Duration,
    /// After which round trip a reply is late.
    pub late_after: Duration,
    /// When a datagram is given up.
    pub lost_after: Duration,
}

/// One scrape's page, made in pieces as the client takes them: its memory does not grow with the paths.
#[derive(Debug)]
pub struct Page {
    exporter: Arc<Exporter>,
    directory: Arc<Directory>,
    registered: Vec<MetricFamily>,
    format: Format,
    /// Families in alphabetical order, the next one last.
    left: Vec<Section>,
    /// Paths of the current family that are written.
    paths: usize,
    has_ended: bool,
}

/// Where a family's lines come from.
#[derive(Debug, Clone, Copy)]
enum Section {
    Registered(usize),
    Loop(usize),
    Responder(usize),
    WebSocket(usize),
    Echo(usize),
    Group(usize),
    PathMtu(usize),
    Stream(usize),
    StreamResponder(usize),
    Limit(usize),
    ProbeInfo,
    ProbeTargets,
    PeerInfo,
}

impl Exporter {
    /// Exports these loops and these responders.
    #[must_use]
    pub fn new(loops: Vec<Arc<LoopSeries>>, responders: Responders) -> Self {
        Self {
            process: ProcessMetrics::new(),
            websocket: Arc::default(),
            directory: ArcSwap::default(),
            loops,
            responders,
        }
    }

    /// Changes what is exported.
    pub fn publish(&self, directory: Directory) {
        self.directory.store(Arc::new(directory));
    }

    /// What is exported.
    #[must_use]
    pub fn directory(&self) -> Arc<Directory> {
        self.directory.load_full()
    }

    /// The loops.
    #[must_use]
    pub fn loops(&self) -> &[Arc<LoopSeries>] {
        &self.loops
    }

    /// The page, families in alphabetical order, each once.
    #[must_use]
    pub fn page(self: &Arc<Self>, http: &HttpCounts, format: Format) -> Page {
        let directory = self.directory.load_full();
        let registered = self.process.gather(http);
        let mut families: BTreeMap<&str, Section> = BTreeMap::new();
        families.extend(
            registered.iter().enumerate().map(|(at, family)| (family.name(), Section::Registered(at))),
        );
        families
            .extend(LOOP_FAMILIES.iter().enumerate().map(|(at, family)| (family.name, Section::Loop(at))));
        let responder = RESPONDER_FAMILIES.iter().enumerate();
        families.extend(responder.map(|(at, family)| (family.name, Section::Responder(at))));
        let responder = STREAM_RESPONDER_FAMILIES.iter().enumerate();
        families.extend(responder.map(|(at, family)| (family.name, Section::StreamResponder(at))));
        let websocket = WEBSOCKET_FAMILIES.iter().enumerate();
        families.extend(websocket.map(|(at, family)| (family.name, Section::WebSocket(at))));
        if !directory.paths.is_empty() {
            families.extend(
                ECHO_FAMILIES.iter().enumerate().map(|(at, family)| (family.name, Section::Echo(at))),
            );
        }
        if !directory.groups.is_empty() {
            let group = GROUP_FAMILIES.iter().enumerate();
            families.extend(group.map(|(at, family)| (family.name, Section::Group(at))));
        }
        if !directory.path_mtus.is_empty() {
            let path_mtu = PATH_MTU_FAMILIES.iter().enumerate();
            families.extend(path_mtu.map(|(at, family)| (family.name, Section::PathMtu(at))));
        }
        if !directory.streams.is_empty() {
            let stream = STREAM_FAMILIES.iter().enumerate();
            families.extend(stream.map(|(at, family)| (family.name, Section::Stream(at))));
        }
        if !directory.probes.is_empty() {
            families.insert(PROBE_INFO, Section::ProbeInfo);
            families.insert(PROBE_TARGETS, Section::ProbeTargets);
            families.extend(LIMITS.iter().enumerate().map(|(at, (name, _, _))| (*name, Section::Limit(at))));
        }
        if !directory.peers.is_empty() {
            families.insert(PEER_INFO, Section::PeerInfo);
        }
        let left = families.into_values().rev().collect();
        Page { exporter: Arc::clone(self), directory, registered, format, left, paths: 0, has_ended: false }
    }
}

impl Page {
    /// Bytes after which a piece ends. Chosen: 64 KiB, what a socket takes at once.
    pub const PIECE: usize = 64 << 10;

    /// Appends the next piece, at most a family's few lines longer than [`Page::PIECE`]; false at the end.
    pub fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        let start = piece.len();
        while let Some(section) = self.left.last().copied() {
            if self.write(section, piece) {
                self.left.pop();
                self.paths = 0;
            }
            if piece.len() - start >= Self::PIECE {
                return true;
            }
        }
        if !std::mem::replace(&mut self.has_ended, true) {
            piece.extend_from_slice(self.format.end());
        }
        piece.len() > start
    }

    /// Writes some paths of a family, those behind the ones that are written; true when it is complete.
    fn write_paths<S>(
        &mut self,
        family: &Family<S>,
        paths: impl FnOnce(&Directory) -> &Vec<Arc<S>>,
        piece: &mut Vec<u8>,
    ) -> bool {
        const PATHS_AT_ONCE: usize = 64;
        let (paths, written) = (paths(&self.directory), self.paths);
        if written == 0 {
            family.begin(piece, self.format);
        }
        let end = paths.len().min(written + PATHS_AT_ONCE);
        family.write(piece, paths[written..end].iter().map(Arc::as_ref));
        self.paths = end;
        end == paths.len()
    }

    /// Writes a family, or some of its paths; true when it is complete.
    fn write(&mut self, section: Section, piece: &mut Vec<u8>) -> bool {
        match section {
            Section::Registered(at) => {
                write_registered(&self.registered[at], self.format, piece);
            }
            Section::Loop(at) => {
                LOOP_FAMILIES[at].begin(piece, self.format);
                LOOP_FAMILIES[at].write(piece, self.exporter.loops.iter().map(Arc::as_ref));
            }
            Section::Responder(at) => {
                RESPONDER_FAMILIES[at].begin(piece, self.format);
                RESPONDER_FAMILIES[at].write(piece, std::iter::once(self.exporter.responders.stamp.as_ref()));
            }
            Section::StreamResponder(at) => {
                STREAM_RESPONDER_FAMILIES[at].begin(piece, self.format);
                let series = self.exporter.responders.stream.as_ref();
                STREAM_RESPONDER_FAMILIES[at].write(piece, std::iter::once(series));
            }
            Section::WebSocket(at) => {
                WEBSOCKET_FAMILIES[at].begin(piece, self.format);
                WEBSOCKET_FAMILIES[at].write(piece, std::iter::once(self.exporter.websocket.as_ref()));
            }
            Section::Echo(at) => {
                return self.write_paths(&ECHO_FAMILIES[at], |directory| &directory.paths, piece);
            }
            Section::Group(at) => {
                return self.write_paths(&GROUP_FAMILIES[at], |directory| &directory.groups, piece);
            }
            Section::PathMtu(at) => {
                return self.write_paths(&PATH_MTU_FAMILIES[at], |directory| &directory.path_mtus, piece);
            }
            Section::Stream(at) => {
                return self.write_paths(&STREAM_FAMILIES[at], |directory| &directory.streams, piece);
            }
            Section::Limit(at) => self.directory.limit(&LIMITS[at], self.format, piece),
            Section::ProbeInfo => self.directory.probe_info(self.format, piece),
            Section::ProbeTargets => self.directory.probe_targets(self.format, piece),
            Section::PeerInfo => self.directory.peer_info(self.format, piece),
        }
        true
    }
}

/// Writes a family of the process.
fn write_registered(family: &MetricFamily, format: Format, piece: &mut Vec<u8>) {
    let start = piece.len();
    // Writing text into memory cannot fail; a family without samples is refused, and left out.
    let _ = TextEncoder::new().encode(std::slice::from_ref(family), piece);
    let (classic, name) = (family.name(), format.family(kind_of(family), family.name()));
    if piece.len() > start && name != classic {
        // The library writes one format: the two lines in front of the samples are written anew.
        let lines = piece[start..].split_inclusive(|byte| *byte == b'\n');
        let head: usize = lines.take(2).map(<[u8]>::len).sum();
        let samples = piece.split_off(start + head);
        piece.truncate(start);
        Writer::new(piece).family(classic, kind_of(family), family.help(), format);
        piece.extend_from_slice(&samples);
    }
}

fn kind_of(family: &MetricFamily) -> Kind {
    match family.get_field_type() {
        MetricType::COUNTER => Kind::Counter,
        MetricType::GAUGE | MetricType::UNTYPED => Kind::Gauge,
        MetricType::HISTOGRAM => Kind::Histogram,
        MetricType::SUMMARY => Kind::Summary,
    }
}

impl Directory {
    fn limit(&self, (name, help, pick): &Limit, format: Format, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(name, Kind::Gauge, help, format);
        for probe in &self.probes {
            writer.seconds(name, Suffix::None, &label("probe", &probe.name), CLOSE, nanos(pick(probe)));
        }
    }

    fn probe_info(&self, format: Format, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(PROBE_INFO, Kind::Gauge, "Attributes of configured probes.", format);
        for probe in &self.probes {
            let interval = probe.interval.as_secs_f64().to_string();
            let labels = [
                label("probe", &probe.name),
                label("kind", probe.kind),
                label("protocol", probe.protocol),
                label("dscp", &probe.dscp),
                label("interval_seconds", &interval),
            ];
            writer.count(PROBE_INFO, Suffix::None, &labels.join(","), CLOSE, 1);
        }
    }

    fn probe_targets(&self, format: Format, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(PROBE_TARGETS, Kind::Gauge, "Peers and targets that a probe chooses.", format);
        for probe in &self.probes {
            let labels = label("probe", &probe.name);
            writer.count(PROBE_TARGETS, Suffix::None, &labels, CLOSE, probe.targets as u64);
        }
    }

    fn peer_info(&self, format: Format, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(
            PEER_INFO,
            Kind::Gauge,
            "Attributes of peers and targets; labels of theirs begin with label_.",
            format,
        );
        for (name, attributes) in &self.peers {
            let mut labels = label("peer", name);
            for (key, value) in attributes {
                labels.push(',');
                labels.push_str(&label(key, value));
            }
            writer.count(PEER_INFO, Suffix::None, &labels, CLOSE, 1);
        }
    }
}

const PROBE_INFO: &str = "pathmeter_probe_info";
const PROBE_TARGETS: &str = "pathmeter_probe_targets";
const PEER_INFO: &str = "pathmeter_peer_info";

/// A name, its help text, and which limit of a probe it tells.
type Limit = (&'static str, &'static str, fn(&ProbeInfo) -> Duration);

const LIMITS: [Limit; 2] = [
    ("pathmeter_echo_late_after_seconds", "A reply after a longer round trip is late.", |probe| {
        probe.late_after
    }),
    ("pathmeter_echo_lost_after_seconds", "A datagram without a reply by then is lost.", |probe| {
        probe.lost_after
    }),
];
