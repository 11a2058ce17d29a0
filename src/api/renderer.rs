//! Renders metrics pages on a few dedicated threads, and shares them among scrapers.
//!
//! A page of 10,000 paths is tens of megabytes of text and takes about 70 ms to render and compress. The
//! threads that measure, answer peers or control the agent never wait for that.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io::Write as _;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::scrape::Negotiated;
use crate::http::server::Body;
use crate::metrics::{ExpositionFormat, Page};
use crate::runtime::DetachedRuntime;

/// Maximum number of pages, or pieces of pages, rendered at once; further ones wait. Chosen: two scrapers per
/// agent are common, and rendering leaves the host most of its cores.
pub const RENDERED_AT_ONCE: usize = 2;

/// Time for which a rendered page is shared with further scrapers. Chosen: scrape intervals are longer.
pub const SHARED_FOR: Duration = Duration::from_secs(1);

/// Maximum size of an uncompressed page that is held in memory. A longer one is rendered for each scraper,
/// piece by piece as the scraper reads it. Chosen: a page of 1,200 paths.
const PLAIN_BYTES_MAX: usize = 8 << 20;

/// Maximum size of all pages held in memory, including those that slow scrapers still read. Above it, a page
/// is rendered piece by piece and sent uncompressed. Chosen: twenty compressed pages of 10,000 paths.
const HELD_BYTES_MAX: usize = 64 << 20;

/// The fastest level: pages are so repetitive that the best level saves little more.
const LEVEL: Compression = Compression::fast();

/// A page that is rendered in pieces. Also implemented for `FnMut(&mut Vec<u8>) -> bool`.
pub trait RenderPieces: Send {
    /// Appends the next piece of about [`Page::PIECE`] bytes. Returns false at the end.
    fn next(&mut self, piece: &mut Vec<u8>) -> bool;
}

impl RenderPieces for Page {
    fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        Self::next(self, piece)
    }
}

impl<F: FnMut(&mut Vec<u8>) -> bool + Send> RenderPieces for F {
    fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        self(piece)
    }
}

/// Begins a page with the current values of the metrics.
type BeginPage = dyn Fn(ExpositionFormat) -> Box<dyn RenderPieces> + Send + Sync;

/// Renders metrics pages. Clones share threads and pages.
#[derive(Debug, Clone)]
pub struct Renderer {
    inner: Arc<RendererState>,
}

struct RendererState {
    begin: Box<BeginPage>,
    pool: Pool,
    limits: HoldLimits,
    /// Bytes of all [`HeldPage`]s.
    held_bytes: AtomicUsize,
    /// Pages being rendered, and pages rendered within [`SHARED_FOR`]: at most one for each format and
    /// encoding.
    pages: Mutex<Vec<Rendering>>,
    /// Whether the last uncompressed page was at most `plain_bytes_max` long. False before the first one: a
    /// failed attempt to hold a long page costs as much memory as it may hold.
    is_plain_short: AtomicBool,
}

/// Memory limits of held pages. Tests use values other than the constants.
#[derive(Debug, Clone, Copy)]
struct HoldLimits {
    plain_bytes_max: usize,
    held_bytes_max: usize,
}

/// A page that is rendered as a whole and held in memory.
#[derive(Clone)]
struct Rendering {
    wanted: Negotiated,
    has_begun: Arc<AtomicBool>,
    outcome: watch::Receiver<Option<RenderOutcome>>,
}

/// Result of rendering a page to be held.
#[derive(Clone)]
enum RenderOutcome {
    Held(Arc<HeldPage>),
    /// A limit of [`HoldLimits`] was exceeded.
    TooLong,
}

impl fmt::Debug for RendererState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("held_bytes", &self.held_bytes).finish_non_exhaustive()
    }
}

impl Renderer {
    /// Returns a renderer of the pages that `begin` creates. Its threads start with the first page.
    #[must_use]
    pub fn new(begin: impl Fn(ExpositionFormat) -> Box<dyn RenderPieces> + Send + Sync + 'static) -> Self {
        Self::within(HoldLimits { plain_bytes_max: PLAIN_BYTES_MAX, held_bytes_max: HELD_BYTES_MAX }, begin)
    }

    fn within(
        limits: HoldLimits,
        begin: impl Fn(ExpositionFormat) -> Box<dyn RenderPieces> + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner: Arc::new(RendererState {
                begin: Box::new(begin),
                pool: Pool::new(),
                limits,
                held_bytes: AtomicUsize::new(0),
                pages: Mutex::default(),
                is_plain_short: AtomicBool::new(false),
            }),
        }
    }

    /// Returns a page, and whether it is compressed, which it may not be even if requested. With `is_fresh` a
    /// page is shared only if its rendering has not begun. Must be called within a tokio runtime, where a
    /// task removes the page after [`SHARED_FOR`].
    ///
    /// # Panics
    /// Panics if rendering panicked.
    pub(super) async fn page(&self, wanted: Negotiated, is_fresh: bool) -> (Body, bool) {
        if wanted.is_gzip || self.inner.is_plain_short.load(Relaxed) {
            let mut outcome = self.join(wanted, is_fresh).outcome;
            let outcome = outcome.wait_for(Option::is_some).await.expect("rendering does not panic").clone();
            if let Some(RenderOutcome::Held(held)) = outcome {
                return (HeldBody { held, next: 0, has_yielded: true }.boxed_unsync(), wanted.is_gzip);
            }
        }
        let plain = Negotiated { is_gzip: false, ..wanted };
        (StreamedBody::new(Arc::clone(&self.inner), plain).boxed_unsync(), false)
    }

    /// Returns a shared page that matches, or starts rendering a new one.
    fn join(&self, wanted: Negotiated, is_fresh: bool) -> Rendering {
        let mut pages = self.inner.pages();
        let shared = pages.iter().find(|page| page.wanted == wanted);
        if let Some(page) = shared.filter(|page| !(is_fresh && page.has_begun.load(Relaxed))) {
            return page.clone();
        }
        let (sender, outcome) = watch::channel(None);
        let page = Rendering { wanted, has_begun: Arc::default(), outcome };
        pages.retain(|page| page.wanted != wanted);
        pages.push(page.clone());
        let (inner, rendering) = (Arc::clone(&self.inner), page.clone());
        // A task of its own: the first scraper can disconnect while others wait for the page.
        tokio::spawn(async move {
            let (job, has_begun) = (Arc::clone(&inner), rendering.has_begun);
            let rendered = inner.pool.run(move || {
                has_begun.store(true, Relaxed);
                job.hold(wanted)
            });
            if let Ok(outcome) = rendered.await {
                sender.send_replace(Some(outcome));
                sleep(SHARED_FOR).await;
            }
            inner.pages().retain(|page| !page.outcome.same_channel(&rendering.outcome));
        });
        page
    }
}

impl RendererState {
    fn pages(&self) -> MutexGuard<'_, Vec<Rendering>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renders a whole page into memory.
    fn hold(self: Arc<Self>, wanted: Negotiated) -> RenderOutcome {
        let mut page = Encoded::new((self.begin)(wanted.format), wanted.is_gzip);
        let bytes_max = if wanted.is_gzip { usize::MAX } else { self.limits.plain_bytes_max };
        let mut held = HeldPage { pieces: Vec::new(), length: 0, allocated: 0, inner: self };
        loop {
            let piece = page.next();
            if piece.is_empty() {
                return RenderOutcome::Held(Arc::new(held));
            }
            if held.length + piece.len() > bytes_max {
                held.inner.is_plain_short.store(false, Relaxed);
                return RenderOutcome::TooLong;
            }
            if !held.push(piece) {
                return RenderOutcome::TooLong;
            }
        }
    }
}

/// Rendering threads. They start on demand and end when idle.
struct Pool(DetachedRuntime);

impl Pool {
    fn new() -> Self {
        let mut builder = Builder::new_current_thread();
        builder.max_blocking_threads(RENDERED_AT_ONCE).thread_name("pm-renderer");
        let runtime = DetachedRuntime::build(&mut builder);
        Self(runtime.expect("building a runtime without I/O and timers cannot fail"))
    }

    /// Runs `work` as soon as a thread is free.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.0.spawn_blocking(work)
    }
}

/// A page in its content encoding.
struct Encoded {
    page: Box<dyn RenderPieces>,
    gzip: Option<GzEncoder<Vec<u8>>>,
    is_over: bool,
}

impl Encoded {
    fn new(page: Box<dyn RenderPieces>, is_gzip: bool) -> Self {
        Self { page, gzip: is_gzip.then(|| GzEncoder::new(empty_piece(), LEVEL)), is_over: false }
    }

    /// Returns the next piece; it is empty at the end.
    fn next(&mut self) -> Vec<u8> {
        let mut piece = empty_piece();
        let Some(gzip) = &mut self.gzip else {
            self.page.next(&mut piece);
            return piece;
        };
        while !self.is_over && gzip.get_ref().len() < Page::PIECE {
            piece.clear();
            let written = match self.page.next(&mut piece) {
                true => gzip.write_all(&piece),
                false => {
                    self.is_over = true;
                    gzip.try_finish()
                }
            };
            written.expect("writing to memory cannot fail");
        }
        piece.clear();
        std::mem::replace(gzip.get_mut(), piece)
    }

    /// Returns itself and the next pieces, up to [`PIECES_AT_ONCE`]; there are none at the end.
    fn next_pieces(mut self) -> (Self, VecDeque<Vec<u8>>) {
        let mut pieces = VecDeque::new();
        while pieces.len() < PIECES_AT_ONCE {
            let piece = self.next();
            if piece.is_empty() {
                break;
            }
            pieces.push_back(piece);
        }
        (self, pieces)
    }
}

/// Number of pieces that are rendered together for a scraper that reads them one by one. Chosen: 256 KiB for
/// each scraper; each change of threads then serves several pieces.
const PIECES_AT_ONCE: usize = 4;

fn empty_piece() -> Vec<u8> {
    // A piece can be some lines longer than `Page::PIECE`.
    Vec::with_capacity(Page::PIECE + Page::PIECE / 4)
}

/// A whole page in memory, kept while it is shared or read.
struct HeldPage {
    pieces: Vec<Bytes>,
    length: usize,
    /// Its part of [`RendererState::held_bytes`].
    allocated: usize,
    inner: Arc<RendererState>,
}

impl HeldPage {
    /// Appends a piece. Returns false if it exceeds the memory limit.
    fn push(&mut self, piece: Vec<u8>) -> bool {
        let allocated = piece.capacity();
        let before = self.inner.held_bytes.fetch_add(allocated, Relaxed);
        self.allocated += allocated;
        if before + allocated > self.inner.limits.held_bytes_max {
            return false;
        }
        self.length += piece.len();
        self.pieces.push(piece.into());
        true
    }
}

impl Drop for HeldPage {
    fn drop(&mut self) {
        self.inner.held_bytes.fetch_sub(self.allocated, Relaxed);
    }
}

/// Response body that reads a held page for one scraper.
struct HeldBody {
    held: Arc<HeldPage>,
    next: usize,
    has_yielded: bool,
}

impl hyper::body::Body for HeldBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // Yields between two pieces, so that a ping on the same thread does not wait for a whole page.
        if !std::mem::replace(&mut self.has_yielded, true) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = self.held.pieces.get(self.next).cloned();
        self.next += 1;
        self.has_yielded = false;
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        let remaining = self.held.pieces.iter().skip(self.next).map(|piece| piece.len() as u64).sum();
        SizeHint::with_exact(remaining)
    }
}

/// Response body that renders a page as one scraper reads it, a few pieces at a time. No thread waits for the
/// scraper.
struct StreamedBody {
    inner: Arc<RendererState>,
    /// Bytes rendered so far.
    length: usize,
    /// Rendered pieces that the scraper has not read.
    ready: VecDeque<Vec<u8>>,
    state: Streamed,
}

enum Streamed {
    NotBegun(Negotiated),
    Waiting(Encoded),
    Rendering(JoinHandle<(Encoded, VecDeque<Vec<u8>>)>),
    Ended,
}

impl StreamedBody {
    fn new(inner: Arc<RendererState>, wanted: Negotiated) -> Self {
        Self { inner, length: 0, ready: VecDeque::new(), state: Streamed::NotBegun(wanted) }
    }

    fn ended(&mut self, length: usize) {
        if length <= self.inner.limits.plain_bytes_max {
            self.inner.is_plain_short.store(true, Relaxed);
        }
    }
}

impl hyper::body::Body for StreamedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(piece) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(piece.into()))));
        }
        let mut rendering = match std::mem::replace(&mut self.state, Streamed::Ended) {
            Streamed::NotBegun(wanted) => {
                let inner = Arc::clone(&self.inner);
                self.inner
                    .pool
                    .run(move || Encoded::new((inner.begin)(wanted.format), wanted.is_gzip).next_pieces())
            }
            Streamed::Waiting(page) => self.inner.pool.run(move || page.next_pieces()),
            Streamed::Rendering(rendering) => rendering,
            Streamed::Ended => return Poll::Ready(None),
        };
        let Poll::Ready(rendered) = Pin::new(&mut rendering).poll(context) else {
            self.state = Streamed::Rendering(rendering);
            return Poll::Pending;
        };
        let (page, mut pieces) = rendered.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        self.length += pieces.iter().map(Vec::len).sum::<usize>();
        let Some(piece) = pieces.pop_front() else {
            let length = self.length;
            self.ended(length);
            return Poll::Ready(None);
        };
        self.ready = pieces;
        self.state = Streamed::Waiting(page);
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::sync::{Condvar, mpsc};
    use std::thread::yield_now;

    use flate2::read::GzDecoder;
    use tokio::time::timeout;

    const DEADLINE: Duration = Duration::from_secs(20);
    const GZIP: Negotiated = Negotiated { format: ExpositionFormat::Classic, is_gzip: true };
    const PLAIN: Negotiated = Negotiated { format: ExpositionFormat::Classic, is_gzip: false };
    const OPEN_METRICS: Negotiated = Negotiated { format: ExpositionFormat::OpenMetrics, is_gzip: true };
    const PIECES: usize = 5;

    /// Number of pages begun, number of pieces being rendered, and the maximum of the latter.
    #[derive(Debug, Default)]
    struct Counts {
        begun: usize,
        running: usize,
        running_max: usize,
    }

    /// Source of pages of [`PIECES`] lines, whose rendering can be blocked.
    #[derive(Clone, Default)]
    struct Pages {
        counts: Arc<Mutex<Counts>>,
        /// Whether rendering waits before each line.
        gate: Arc<(Mutex<bool>, Condvar)>,
    }

    impl Pages {
        fn closed() -> Self {
            let pages = Self::default();
            *pages.gate.0.lock().unwrap() = true;
            pages
        }

        fn open(&self) {
            *self.gate.0.lock().unwrap() = false;
            self.gate.1.notify_all();
        }

        fn begin(&self) -> Box<dyn RenderPieces> {
            let (pages, mut remaining) = (self.clone(), PIECES);
            self.counts.lock().unwrap().begun += 1;
            Box::new(move |piece: &mut Vec<u8>| {
                {
                    let mut counts = pages.counts.lock().unwrap();
                    counts.running += 1;
                    counts.running_max = counts.running_max.max(counts.running);
                }
                let (is_closed, opened) = &*pages.gate;
                drop(opened.wait_while(is_closed.lock().unwrap(), |is_closed| *is_closed).unwrap());
                pages.counts.lock().unwrap().running -= 1;
                if remaining == 0 {
                    return false;
                }
                piece.extend_from_slice(format!("line {remaining}\n").as_bytes());
                remaining -= 1;
                true
            })
        }

        fn renderer(&self, limits: HoldLimits) -> Renderer {
            let pages = self.clone();
            Renderer::within(limits, move |_| pages.begin())
        }

        fn begun(&self) -> usize {
            self.counts.lock().unwrap().begun
        }

        /// Waits until `count` pages are being rendered.
        async fn running(&self, count: usize) {
            within(async {
                while self.counts.lock().unwrap().running < count {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
    }

    const UNLIMITED: HoldLimits = HoldLimits { plain_bytes_max: 1 << 20, held_bytes_max: 1 << 30 };
    const TEXT: &str = "line 5\nline 4\nline 3\nline 2\nline 1\n";

    async fn within<F: Future>(future: F) -> F::Output {
        timeout(DEADLINE, future).await.expect("completes within the deadline")
    }

    async fn text(body: Body, is_gzip: bool) -> String {
        let bytes = within(body.collect()).await.unwrap().to_bytes();
        let mut text = String::new();
        match is_gzip {
            true => GzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap(),
            false => (&bytes[..]).read_to_string(&mut text).unwrap(),
        };
        text
    }

    #[tokio::test]
    async fn requests_within_a_second_share_a_page() {
        let pages = Pages::closed();
        let renderer = pages.renderer(UNLIMITED);
        let request = |wanted| {
            let renderer = renderer.clone();
            tokio::spawn(async move { renderer.page(wanted, false).await })
        };
        // Some requests arrive before the page is begun, others while it is rendered, and others after that.
        let mut requested: Vec<_> = (0..3).map(|_| request(GZIP)).collect();
        pages.running(1).await;
        requested.extend((0..3).map(|_| request(GZIP)));
        pages.open();
        for requested in requested {
            let (body, is_gzip) = within(requested).await.unwrap();
            assert_eq!((text(body, is_gzip).await.as_str(), is_gzip), (TEXT, true));
        }
        let (body, _) = within(request(GZIP)).await.unwrap();
        assert_eq!((text(body, true).await.as_str(), pages.begun()), (TEXT, 1));
        // Another format or encoding is another page.
        let (body, is_gzip) = within(request(PLAIN)).await.unwrap();
        assert_eq!((text(body, false).await.as_str(), is_gzip), (TEXT, false));
        within(request(OPEN_METRICS)).await.unwrap();
        assert_eq!(pages.begun(), 3);
        within(async {
            while pages.begun() == 3 {
                sleep(Duration::from_millis(10)).await;
                within(request(GZIP)).await.unwrap();
            }
        })
        .await;
    }

    #[tokio::test]
    async fn fresh_page_is_shared_only_until_rendering_begins() {
        let pages = Pages::closed();
        let renderer = pages.renderer(UNLIMITED);
        let request = || {
            let renderer = renderer.clone();
            tokio::spawn(async move { renderer.page(GZIP, true).await })
        };
        let mut requested = Vec::new();
        for running in 1..=RENDERED_AT_ONCE {
            requested.push(request());
            pages.running(running).await;
        }
        // These wait for a thread, all for the same page.
        requested.extend((0..3).map(|_| request()));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        pages.open();
        for requested in requested {
            let (body, is_gzip) = within(requested).await.unwrap();
            assert_eq!(text(body, is_gzip).await, TEXT);
        }
        assert_eq!(pages.begun(), RENDERED_AT_ONCE + 1);
    }

    #[tokio::test]
    async fn page_is_freed_after_a_second_unless_it_is_being_read() {
        let pages = Pages::default();
        let renderer = pages.renderer(UNLIMITED);
        let held = || renderer.inner.held_bytes.load(Relaxed);
        let (body, _) = within(renderer.page(GZIP, false)).await;
        let one_page = held();
        assert!(one_page > 0);
        within(async {
            while !renderer.inner.pages().is_empty() {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(held(), one_page, "it is being read");
        assert_eq!(text(body, true).await, TEXT);
        within(async {
            while held() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn number_of_pages_rendered_at_once_is_limited() {
        let pages = Pages::closed();
        // All pages without compression are streamed.
        let renderer = pages.renderer(HoldLimits { plain_bytes_max: 0, ..UNLIMITED });
        let read = |wanted| {
            let renderer = renderer.clone();
            tokio::spawn(async move {
                let (body, is_gzip) = renderer.page(wanted, false).await;
                text(body, is_gzip).await
            })
        };
        let reading: Vec<_> = [GZIP, OPEN_METRICS, PLAIN, PLAIN, PLAIN].into_iter().map(read).collect();
        pages.running(RENDERED_AT_ONCE).await;
        // A third page would have begun by now if it could: the runtime has nothing else to do.
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
            yield_now();
        }
        pages.open();
        for reading in reading {
            assert_eq!(within(reading).await.unwrap(), TEXT);
        }
        assert_eq!(pages.counts.lock().unwrap().running_max, RENDERED_AT_ONCE);
    }

    #[tokio::test]
    async fn long_page_is_rendered_for_each_reader_and_blocks_no_thread() {
        let pages = Pages::default();
        let renderer = pages.renderer(HoldLimits { plain_bytes_max: TEXT.len() - 1, ..UNLIMITED });
        renderer.inner.is_plain_short.store(true, Relaxed);
        let mut waiting = Vec::new();
        for _ in 0..2 * RENDERED_AT_ONCE {
            let (mut body, _) = within(renderer.page(PLAIN, false)).await;
            let first = within(body.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(first, "line 5\n");
            waiting.push(body);
        }
        assert_eq!(renderer.inner.held_bytes.load(Relaxed), 0);
        // The last page was short, so the renderer first tried to hold this one.
        assert_eq!(pages.begun(), 1 + waiting.len());
        let (body, is_gzip) = within(renderer.page(GZIP, false)).await;
        assert_eq!((text(body, is_gzip).await.as_str(), is_gzip), (TEXT, true));
        for body in waiting {
            assert!(TEXT.ends_with(&text(body, false).await));
        }
        assert!(!renderer.inner.is_plain_short.load(Relaxed));
    }

    #[tokio::test]
    async fn short_page_is_shared_from_the_second_on() {
        let pages = Pages::default();
        let renderer = pages.renderer(UNLIMITED);
        let (body, _) = within(renderer.page(PLAIN, false)).await;
        assert_eq!(text(body, false).await, TEXT);
        assert!(renderer.inner.is_plain_short.load(Relaxed));
        for _ in 0..2 {
            let (body, _) = within(renderer.page(PLAIN, false)).await;
            assert_eq!(text(body, false).await, TEXT);
        }
        assert_eq!(pages.begun(), 2);
    }

    #[tokio::test]
    async fn page_is_sent_uncompressed_when_memory_limit_is_reached() {
        let pages = Pages::default();
        let renderer = pages.renderer(HoldLimits { held_bytes_max: 10, ..UNLIMITED });
        let (body, is_gzip) = within(renderer.page(GZIP, false)).await;
        assert_eq!((text(body, is_gzip).await.as_str(), is_gzip), (TEXT, false));
        assert_eq!(renderer.inner.held_bytes.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn panic_while_rendering_does_not_affect_later_requests() {
        let (sender, panics) = mpsc::channel();
        sender.send(()).unwrap();
        let panics = Mutex::new(panics);
        let renderer = Renderer::new(move |_| {
            assert!(panics.lock().unwrap().try_recv().is_err(), "a page with a bug");
            Pages::default().begin()
        });
        let requesting = renderer.clone();
        let requested = tokio::spawn(async move { requesting.page(GZIP, false).await.1 });
        assert!(within(requested).await.unwrap_err().is_panic());
        within(async {
            while !renderer.inner.pages().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let (body, is_gzip) = within(renderer.page(GZIP, false)).await;
        assert_eq!(text(body, is_gzip).await, TEXT);
    }
}
