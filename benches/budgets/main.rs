//! Measures the budgets of `docs/explanation/benchmarks.md` and prints a table.
//!
//! `cargo bench --bench budgets` runs the real agent and, in the same run, bare loops that make the same
//! system calls and nothing else. Absolute figures are valid for one machine at one time; ratios are
//! comparable between machines. Name sections to run only those: `cargo bench --bench budgets -- start
//! allocations prober responder tail websocket traces transports answering`.
//!
//! `-- scale` takes 15 minutes, alone or with other sections, and prints tables of its own. Its parts are
//! `scale-paths`, `scale-beyond` and `scale-responder`.

mod agent;
mod allocations;
mod answering;
mod bare;
mod batch;
mod load;
mod machine;
mod page;
mod prober;
mod process;
mod report;
mod responder;
mod scale;
mod start;
mod tail;
mod traces;
mod transports;
mod websocket;

use std::io::{self, Write as _};

use report::Row;

type Section = (&'static str, fn() -> io::Result<Vec<Row>>);
/// A section that prints its own table.
type LongSection = (&'static str, fn(&mut dyn io::Write) -> io::Result<()>);

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const SECTIONS: [Section; 7] = [
    ("start", start::measure),
    ("allocations", allocations::measure),
    ("prober", prober::measure),
    ("responder", responder::measure),
    ("tail", tail::measure),
    ("websocket", websocket::measure),
    ("traces", traces::measure),
];

/// Sections with their own table that run by default.
const TABLES: [LongSection; 2] = [("transports", transports::measure), ("answering", answering::measure)];

/// Sections that take 15 minutes run only when named.
const LONG: [LongSection; 3] = [
    ("scale-paths", scale::paths::measure),
    ("scale-beyond", scale::paths::measure_beyond),
    ("scale-responder", scale::rates::measure),
];

fn main() -> io::Result<()> {
    // Cargo itself passes `--bench`.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.iter().any(|section| section == name);
    let mut out = io::stdout();
    writeln!(out, "{}", machine::machine())?;
    let short: Vec<_> =
        SECTIONS.into_iter().filter(|(name, _)| wanted.is_empty() || is_wanted(name)).collect();
    if !short.is_empty() {
        writeln!(out, "\n{}", report::HEAD)?;
    }
    for (_, measure) in short {
        for row in measure()? {
            writeln!(out, "{row}")?;
        }
    }
    for (name, measure) in TABLES {
        if wanted.is_empty() || is_wanted(name) {
            measure(&mut out)?;
        }
    }
    for (name, measure) in LONG {
        if is_wanted("scale") || is_wanted(name) {
            measure(&mut out)?;
        }
    }
    writeln!(out, "\nload average at the end: {}", machine::load_average())
}
