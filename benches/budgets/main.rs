//! Measures what the budgets of `docs/benchmarks.md` are about, and prints a table.
//!
//! `cargo bench --bench budgets` runs the real agent as its users do and, in the same run, bare loops that make the same
//! system calls and nothing else. Absolute figures belong to one machine and one hour; ratios travel. Name sections to
//! run only those: `cargo bench --bench budgets -- start allocations prober responder tail`.

mod agent;
mod allocations;
mod bare;
mod batch;
mod load;
mod page;
mod prober;
mod process;
mod report;
mod responder;
mod start;
mod tail;

use std::io::{self, Write as _};

use report::Row;

type Section = (&'static str, fn() -> io::Result<Vec<Row>>);

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const SECTIONS: [Section; 5] = [
    ("start", start::measure),
    ("allocations", allocations::measure),
    ("prober", prober::measure),
    ("responder", responder::measure),
    ("tail", tail::measure),
];

fn main() -> io::Result<()> {
    // Cargo itself passes `--bench`.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let mut out = io::stdout();
    writeln!(out, "{}\n\n{}", report::machine(), report::HEAD)?;
    for (name, measure) in SECTIONS {
        if wanted.is_empty() || wanted.iter().any(|section| section == name) {
            for row in measure()? {
                writeln!(out, "{row}")?;
            }
        }
    }
    writeln!(out, "\nload average at the end: {}", report::load_average())
}
