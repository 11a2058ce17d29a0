//! The page that a scrape gets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use pathmeter_proto::time::nanos;
use prometheus::{Encoder, TextEncoder};
use prometheus::proto::MetricFamily;

use super::agent::{LOOP_FAMILIES, LoopSeries, RESPONDER_FAMILIES, ResponderSeries};
use super::echo::{ECHO_FAMILIES, EchoSeries};
use super::process::{HttpCounts, ProcessMetrics};
use super::text::{Kind, Writer, label};

/// Everything that is exported.
#[derive(Debug)]
pub struct Exporter {
    /// Metrics of the process.
    pub process: ProcessMetrics,
    directory: ArcSwap<Directory>,
    loops: Vec<Arc<LoopSeries>>,
    responder: Arc<ResponderSeries>,
}

/// What is measured at the moment. Replaced as a whole: a path that leaves it leaves the page.
#[derive(Debug, Default)]
pub struct Directory {
    /// Paths that are exported.
    pub paths: Vec<Arc<EchoSeries>>,
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

/// One family, ready to be written.
enum Section<'a> {
    Registered(&'a MetricFamily),
    Own(Box<dyn Fn(&mut Vec<u8>) + 'a>),
}

impl Exporter {
    /// Exports these loops and this responder.
    #[must_use]
    pub fn new(loops: Vec<Arc<LoopSeries>>, responder: Arc<ResponderSeries>) -> Self {
        Self { process: ProcessMetrics::new(), directory: ArcSwap::default(), loops, responder }
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

    /// Appends the page in the text format 0.0.4, families in alphabetical order.
    pub fn write(&self, http: &HttpCounts, page: &mut Vec<u8>) {
        let directory = self.directory.load_full();
        let registered = self.process.gather(http);
        let mut sections: BTreeMap<&str, Section<'_>> = BTreeMap::new();
        for family in &registered {
            sections.insert(family.name(), Section::Registered(family));
        }
        for family in &LOOP_FAMILIES {
            let lines = |page: &mut Vec<u8>| {
                let mut writer = Writer::new(page);
                writer.family(family.name, family.kind, family.help);
                for series in &self.loops {
                    (family.write)(&mut writer, family.name, series);
                }
            };
            sections.insert(family.name, Section::Own(Box::new(lines)));
        }
        for family in &RESPONDER_FAMILIES {
            let lines = |page: &mut Vec<u8>| {
                let mut writer = Writer::new(page);
                writer.family(family.name, family.kind, family.help);
                (family.write)(&mut writer, family.name, &self.responder);
            };
            sections.insert(family.name, Section::Own(Box::new(lines)));
        }
        for family in ECHO_FAMILIES.iter().filter(|_| !directory.paths.is_empty()) {
            let paths = &directory.paths;
            let lines = |page: &mut Vec<u8>| {
                let mut writer = Writer::new(page);
                writer.family(family.name, family.kind, family.help);
                for series in paths {
                    (family.write)(&mut writer, family.name, series);
                }
            };
            sections.insert(family.name, Section::Own(Box::new(lines)));
        }
        for (name, lines) in directory.sections() {
            sections.insert(name, lines);
        }
        for section in sections.into_values() {
            match section {
                Section::Registered(family) => {
                    // Writing text into memory cannot fail; a family without samples is refused, and left out.
                    let _ = TextEncoder::new().encode(std::slice::from_ref(family), page);
                }
                Section::Own(lines) => lines(page),
            }
        }
    }
}

impl Directory {
    fn sections(&self) -> Vec<(&'static str, Section<'_>)> {
        let mut sections: Vec<(&'static str, Section<'_>)> = Vec::new();
        if !self.probes.is_empty() {
            sections.push((PROBE_INFO, Section::Own(Box::new(|page| self.probe_info(page)))));
            for (name, help, pick) in LIMITS {
                let lines = move |page: &mut Vec<u8>| {
                    let mut writer = Writer::new(page);
                    writer.family(name, Kind::Gauge, help);
                    for probe in &self.probes {
                        writer.seconds(name, "", &label("probe", &probe.name), "", nanos(pick(probe)));
                    }
                };
                sections.push((name, Section::Own(Box::new(lines))));
            }
        }
        if !self.peers.is_empty() {
            sections.push((PEER_INFO, Section::Own(Box::new(|page| self.peer_info(page)))));
        }
        sections
    }

    fn probe_info(&self, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(PROBE_INFO, Kind::Gauge, "Attributes of configured probes.");
        for probe in &self.probes {
            let interval = probe.interval.as_secs_f64().to_string();
            let labels = [
                label("probe", &probe.name),
                label("kind", probe.kind),
                label("protocol", probe.protocol),
                label("dscp", &probe.dscp),
                label("interval_seconds", &interval),
            ];
            writer.count(PROBE_INFO, "", &labels.join(","), "", 1);
        }
    }

    fn peer_info(&self, page: &mut Vec<u8>) {
        let mut writer = Writer::new(page);
        writer.family(PEER_INFO, Kind::Gauge, "Attributes of peers and targets; labels of theirs begin with label_.");
        for (name, attributes) in &self.peers {
            let mut labels = label("peer", name);
            for (key, value) in attributes {
                labels.push(',');
                labels.push_str(&label(key, value));
            }
            writer.count(PEER_INFO, "", &labels, "", 1);
        }
    }
}

const PROBE_INFO: &str = "pathmeter_probe_info";
const PEER_INFO: &str = "pathmeter_peer_info";

/// A name, its help text, and which limit of a probe it tells.
type Limit = (&'static str, &'static str, fn(&ProbeInfo) -> Duration);

const LIMITS: [Limit; 2] = [
    (
        "pathmeter_echo_late_after_seconds",
        "A reply after a longer round trip is late.",
        |probe| probe.late_after,
    ),
    (
        "pathmeter_echo_lost_after_seconds",
        "A datagram without a reply by then is lost.",
        |probe| probe.lost_after,
    ),
];
