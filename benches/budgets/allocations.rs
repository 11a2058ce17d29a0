//! Allocations for a metrics page, counted in this process. The memory of a scrape must not grow with the
//! number of paths.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pathmeter::metrics::echo::EchoSeries;
use pathmeter::metrics::{Blocks, Exporter, ExpositionFormat, HttpCounts, Responders};

use super::report::Row;

/// The system's allocator, with a counter.
pub(crate) struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "an allocator is unsafe by its signature")]
// SAFETY: every call is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Relaxed);
        // SAFETY: the caller fulfils the contract, which is that of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let (few, many) = (of_a_page(10), of_a_page(10_000));
    Ok(vec![
        Row::new("allocations of a page of 10,000 paths (bare loop column: 10 paths)", many, "")
            .bare(few)
            .budget(few),
    ])
}

/// Allocations of one page, written into a reused buffer.
fn of_a_page(paths: u32) -> f64 {
    let exporter = Arc::new(Exporter::new(Vec::new(), Responders::default()));
    let series = |index| Arc::new(EchoSeries::new("fast", &format!("peer-{index}"), "ipv4", 1));
    let mut blocks = Blocks::default();
    for path in 0..paths {
        blocks.add(series(path));
    }
    exporter.publish(blocks);
    let http = HttpCounts {
        connections: 1,
        accept_errors: 0,
        responses: ["1xx", "2xx", "3xx", "4xx", "5xx"].map(|c| (c, 0)),
        tls: None,
    };
    let mut piece = Vec::with_capacity(1 << 20);
    let mut write = || {
        let mut page = exporter.page(&http, ExpositionFormat::Classic);
        while page.next(&mut piece) {
            piece.clear();
        }
    };
    // The first page allocates what later pages reuse.
    write();
    let before = COUNT.load(Relaxed);
    write();
    let count = COUNT.load(Relaxed) - before;
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
