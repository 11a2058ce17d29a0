//! Compares pathmeter with other tools on links whose true loss and delay are known. Prints Markdown.
//!
//! `cargo bench --bench compare` takes about 32 minutes, `cargo bench --bench compare -- quick` about ten.
//! Name sections to run only those: `loss`, `idle`, `loaded`, `cost`, `transports`, `traces`, `bandwidth`. It
//! needs root or unprivileged user namespaces. Tools that are not installed are left out; `make compare`
//! installs them.

mod bandwidth;
mod commands;
mod cost;
mod direct_hosts;
mod exported;
mod host_pair;
mod loss;
#[path = "../budgets/machine.rs"]
mod machine;
mod router_chain;
mod rtt;
mod table;
mod tools;
mod traces;
mod transports;

use std::io::{self, Write as _};
use std::time::Duration;

use commands::Commands;

/// Durations of the measurements.
struct Durations {
    is_quick: bool,
    lossy: Duration,
    timed: Duration,
}

const FULL: Durations =
    Durations { is_quick: false, lossy: Duration::from_secs(33), timed: Duration::from_secs(24) };
const QUICK: Durations =
    Durations { is_quick: true, lossy: Duration::from_secs(8), timed: Duration::from_secs(3) };

type Section = (&'static str, &'static str, fn(&Durations, &mut Commands) -> io::Result<String>);

const SECTIONS: [Section; 7] = [
    ("loss", "Losses", |durations, commands| loss::measure(durations.lossy, commands)),
    ("idle", "Error of round trips in µs, idle host", |durations, commands| {
        rtt::idle(durations.timed, commands)
    }),
    ("loaded", "Error of round trips in µs, two busy loops a core", |durations, commands| {
        rtt::loaded(durations.timed, commands)
    }),
    ("cost", "Cost of asking", |durations, commands| cost::measure(durations.is_quick, commands)),
    ("transports", "Cost of asking over TCP, HTTP and ICMP", |durations, commands| {
        transports::measure(durations.is_quick, commands)
    }),
    ("traces", "Time and probes until a trace is complete", |durations, commands| {
        traces::measure(durations.is_quick, commands)
    }),
    ("bandwidth", "Throughput and CPU time of bandwidth runs", |durations, commands| {
        bandwidth::measure(durations.is_quick, commands)
    }),
];

fn main() -> io::Result<()> {
    // A process with a second thread cannot enter a user namespace.
    pathmeter_lab::enter().map_err(io::Error::other)?;
    // Cargo itself passes `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let durations = if words.iter().any(|word| word == "quick") { QUICK } else { FULL };
    let is_wanted = |name: &str| {
        let mut sections = words.iter().filter(|word| *word != "quick").peekable();
        sections.peek().is_none() || sections.any(|word| word == name)
    };
    let mut out = io::stdout();
    writeln!(out, "{}.\n", machine::machine())?;
    let versions = tools::versions();
    for (program, version) in &versions {
        let version = version.as_deref().unwrap_or("not installed, left out");
        writeln!(out, "* {program} {version}")?;
    }
    let present = versions.iter().filter(|(_, version)| version.is_some()).map(|(program, _)| *program);
    let mut commands = Commands::new(present);
    for (name, title, measure) in SECTIONS {
        if is_wanted(name) {
            let tables = measure(&durations, &mut commands)?;
            writeln!(out, "\n### {title}\n\n{tables}\n```text\n{}\n```", commands.take())?;
        }
    }
    writeln!(out, "\nLoad average at the end: {}.", machine::load_average())
}
