//! The metrics page that a scrape receives.

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

/// All exported metrics.
#[derive(Debug)]
pub struct Exporter {
    /// Metrics of the process.
    pub process: ProcessMetrics,
    /// Metrics of the WebSocket responder at `/ws`.
    pub websocket: Arc<WebSocketSeries>,
    loops: Vec<Arc<LoopSeries>>,
    /// Series that exist as long as the agent runs.
    fixed: Blocks,
    /// Series of current paths, probes and peers.
    published: ArcSwap<Blocks>,
}

/// Metrics of the responders.
#[derive(Debug, Default, Clone)]
pub struct Responders {
    /// Over UDP.
    pub stamp: Arc<ResponderSeries>,
    /// Over TCP.
    pub stream: Arc<StreamResponderSeries>,
}

/// The page of one scrape, rendered in pieces as the client reads them, so that its memory does not grow with
/// the number of paths.
#[derive(Debug)]
pub struct Page {
    exporter: Arc<Exporter>,
    published: Arc<Blocks>,
    registered: Vec<MetricFamily>,
    format: ExpositionFormat,
    /// Families to be written, in reverse alphabetical order: the next one is last.
    pending: Vec<FamilySource>,
    /// Members of the current family already written.
    written: usize,
    has_ended: bool,
}

/// Source of a family's lines.
#[derive(Debug, Clone, Copy)]
enum FamilySource {
    Registered(usize),
    Fixed(FamilyIndex),
    Published(FamilyIndex),
}

impl Exporter {
    /// Returns an exporter of these loops and responders, with no paths.
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

    /// Replaces the series of paths, probes and peers. Series not in `blocks` disappear from the page.
    pub fn publish(&self, blocks: Blocks) {
        self.published.store(Arc::new(blocks));
    }

    /// Returns the series of the datagram loops.
    #[must_use]
    pub fn loops(&self) -> &[Arc<LoopSeries>] {
        &self.loops
    }

    /// Begins a page with all families in alphabetical order, each once.
    #[must_use]
    pub fn page(self: &Arc<Self>, http: &HttpCounts, format: ExpositionFormat) -> Page {
        let published = self.published.load_full();
        let registered = self.process.gather(http);
        let mut families: BTreeMap<&str, FamilySource> = BTreeMap::new();
        families.extend(
            registered.iter().enumerate().map(|(at, family)| (family.name(), FamilySource::Registered(at))),
        );
        families.extend(self.fixed.families().map(|(name, index)| (name, FamilySource::Fixed(index))));
        families.extend(published.families().map(|(name, index)| (name, FamilySource::Published(index))));
        let pending = families.into_values().rev().collect();
        let exporter = Arc::clone(self);
        Page { exporter, published, registered, format, pending, written: 0, has_ended: false }
    }
}

impl Page {
    /// Bytes after which a piece ends. Chosen: 64 KiB, what a socket accepts at once.
    pub const PIECE: usize = 64 << 10;

    /// Appends the next piece, which is at most a few lines of a family longer than [`Page::PIECE`]. Returns
    /// false at the end.
    pub fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        let start = piece.len();
        while let Some(source) = self.pending.last().copied() {
            match self.write(source, piece) {
                Some(written) => self.written = written,
                None => {
                    self.pending.pop();
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

    /// Writes a family, or some of its members. Returns how many members are written so far, or `None` when
    /// all are.
    fn write(&self, source: FamilySource, piece: &mut Vec<u8>) -> Option<usize> {
        match source {
            FamilySource::Registered(at) => {
                write_registered(&self.registered[at], self.format, piece);
                None
            }
            FamilySource::Fixed(index) => self.exporter.fixed.write(index, self.written, self.format, piece),
            FamilySource::Published(index) => self.published.write(index, self.written, self.format, piece),
        }
    }
}

/// Writes a family of the `prometheus` registry.
fn write_registered(family: &MetricFamily, format: ExpositionFormat, piece: &mut Vec<u8>) {
    let start = piece.len();
    // Writing to memory cannot fail. The encoder rejects a family without samples, which is then omitted.
    let _ = TextEncoder::new().encode(std::slice::from_ref(family), piece);
    let (classic, name) = (family.name(), format.family(kind_of(family), family.name()));
    if piece.len() > start && name != classic {
        // The library writes only the classic format: replace the two header lines.
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
