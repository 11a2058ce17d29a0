//! The page that a scrape gets.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::agent::{LoopSeries, ResponderSeries, StreamResponderSeries};
use super::block::{Blocks, FamilyIndex};
use super::process::{HttpCounts, ProcessMetrics};
use super::text::{ExpositionFormat, FamilyType, Writer};
use super::websocket::WebSocketSeries;

/// Everything that is exported.
#[derive(Debug)]
pub struct Exporter {
    /// Metrics of the process.
    pub process: ProcessMetrics,
    /// What `/ws` counts.
    pub websocket: Arc<WebSocketSeries>,
    loops: Vec<Arc<LoopSeries>>,
    /// What exists as long as the agent runs.
    fixed: Blocks,
    /// What is measured at the moment.
    published: ArcSwap<Blocks>,
}

/// What those who answer count.
#[derive(Debug, Default, Clone)]
pub struct Responders {
    /// Over UDP.
    pub stamp: Arc<ResponderSeries>,
    /// Over TCP.
    pub stream: Arc<StreamResponderSeries>,
}

/// One scrape's page, made in pieces as the client takes them: its memory does not grow with the paths.
#[derive(Debug)]
pub struct Page {
    exporter: Arc<Exporter>,
    published: Arc<Blocks>,
    registered: Vec<MetricFamily>,
    format: ExpositionFormat,
    /// Families in alphabetical order, the next one last.
    left: Vec<FamilySource>,
    /// Members of the current family that are written.
    written: usize,
    has_ended: bool,
}

/// Where a family's lines come from.
#[derive(Debug, Clone, Copy)]
enum FamilySource {
    Registered(usize),
    Fixed(FamilyIndex),
    Published(FamilyIndex),
}

impl Exporter {
    /// Exports these loops and these responders.
    #[must_use]
    pub fn new(loops: Vec<Arc<LoopSeries>>, responders: Responders) -> Self {
        let websocket = Arc::<WebSocketSeries>::default();
        let mut fixed = Blocks::default();
        for series in &loops {
            fixed.add(Arc::clone(series));
        }
        fixed.add(responders.stamp);
        fixed.add(responders.stream);
        fixed.add(Arc::clone(&websocket));
        Self { process: ProcessMetrics::new(), websocket, loops, fixed, published: ArcSwap::default() }
    }

    /// Replaces what is measured at the moment: whatever is not in it leaves the page.
    pub fn publish(&self, blocks: Blocks) {
        self.published.store(Arc::new(blocks));
    }

    /// The loops.
    #[must_use]
    pub fn loops(&self) -> &[Arc<LoopSeries>] {
        &self.loops
    }

    /// The page, families in alphabetical order, each once.
    #[must_use]
    pub fn page(self: &Arc<Self>, http: &HttpCounts, format: ExpositionFormat) -> Page {
        let published = self.published.load_full();
        let registered = self.process.gather(http);
        let mut families: BTreeMap<&str, FamilySource> = BTreeMap::new();
        families.extend(
            registered.iter().enumerate().map(|(at, family)| (family.name(), FamilySource::Registered(at))),
        );
        families.extend(self.fixed.families().map(|(name, place)| (name, FamilySource::Fixed(place))));
        families.extend(published.families().map(|(name, place)| (name, FamilySource::Published(place))));
        let left = families.into_values().rev().collect();
        let exporter = Arc::clone(self);
        Page { exporter, published, registered, format, left, written: 0, has_ended: false }
    }
}

impl Page {
    /// Bytes after which a piece ends. Chosen: 64 KiB, what a socket takes at once.
    pub const PIECE: usize = 64 << 10;

    /// Appends the next piece, at most a family's few lines longer than [`Page::PIECE`]; false at the end.
    pub fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        let start = piece.len();
        while let Some(section) = self.left.last().copied() {
            match self.write(section, piece) {
                Some(written) => self.written = written,
                None => {
                    self.left.pop();
                    self.written = 0;
                }
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

    /// Writes a family, or some of its members; how many are written then, or `None` for all.
    fn write(&self, section: FamilySource, piece: &mut Vec<u8>) -> Option<usize> {
        match section {
            FamilySource::Registered(at) => {
                write_registered(&self.registered[at], self.format, piece);
                None
            }
            FamilySource::Fixed(place) => self.exporter.fixed.write(place, self.written, self.format, piece),
            FamilySource::Published(place) => self.published.write(place, self.written, self.format, piece),
        }
    }
}

/// Writes a family of the process.
fn write_registered(family: &MetricFamily, format: ExpositionFormat, piece: &mut Vec<u8>) {
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

fn kind_of(family: &MetricFamily) -> FamilyType {
    match family.get_field_type() {
        MetricType::COUNTER => FamilyType::Counter,
        MetricType::GAUGE | MetricType::UNTYPED => FamilyType::Gauge,
        MetricType::HISTOGRAM => FamilyType::Histogram,
        MetricType::SUMMARY => FamilyType::Summary,
    }
}
