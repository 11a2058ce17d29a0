//! The compared tools: how they are run, and how their output is read.

pub(crate) mod blackbox;
pub(crate) mod fping;
pub(crate) mod irtt;
pub(crate) mod ours;
pub(crate) mod prometheus;
pub(crate) mod smokeping;
pub(crate) mod stamp_suite;
pub(crate) mod throughput;
pub(crate) mod traceroutes;

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use pathmeter_lab::Program;
use pathmeter_lab::exchange::ExchangeProtocol;

use crate::host_pair::HostPair;

/// Interval and duration of a run with one target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProbeRun {
    pub(crate) interval: Duration,
    pub(crate) span: Duration,
}

impl ProbeRun {
    pub(crate) fn count(&self) -> u128 {
        self.span.as_nanos() / self.interval.as_nanos()
    }
}

/// A tool that measures one host.
pub(crate) trait MeasuringTool {
    fn name(&self) -> &'static str;

    fn protocol(&self) -> ExchangeProtocol;

    /// Waits for the end of the run and reads the tool's report.
    fn finish(self: Box<Self>, pair: &HostPair) -> io::Result<ToolReport>;
}

/// Report of a tool.
#[derive(Debug, Default)]
pub(crate) struct ToolReport {
    pub(crate) lost: u64,
    /// Losses forward and reverse, if the tool reports directions.
    pub(crate) directions: Option<[i64; 2]>,
    pub(crate) duplicates: Option<u64>,
    pub(crate) reordered: Option<u64>,
    pub(crate) round_trips: Vec<ReportedRtt>,
    /// The report covers requests sent before this time, in nanoseconds since 1970.
    pub(crate) until: Option<u64>,
    /// Its RTT histogram, if it exports one.
    pub(crate) page: Option<ExportedHistogram>,
}

/// The RTT histogram on a metrics page.
#[derive(Debug)]
pub(crate) struct ExportedHistogram {
    pub(crate) text: String,
    /// Name of the metric family.
    pub(crate) name: &'static str,
}

/// A round trip as reported by a tool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReportedRtt {
    pub(crate) of: RequestRef,
    pub(crate) nanos: f64,
}

/// Reference to a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RequestRef {
    Sequence(u32),
    /// The only request to this address that was sent between two times.
    Between(IpAddr, u64, u64),
}

type Start = fn(&mut HostPair, ProbeRun) -> io::Result<Box<dyn MeasuringTool>>;

/// A tool to compare, and how to start it.
#[derive(Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) start: Start,
}

/// Tools that report every round trip.
pub(crate) const TIMED: [Tool; 6] = [
    Tool { program: ours::PROGRAM, start: ours::once },
    Tool { program: irtt::PROGRAM, start: irtt::start },
    Tool { program: stamp_suite::PROGRAM, start: stamp_suite::start },
    Tool { program: fping::PROGRAM, start: fping::timing },
    Tool { program: smokeping::PROGRAM, start: smokeping::start },
    Tool { program: blackbox::PROGRAM, start: blackbox::start },
];

/// Tools whose counts are compared; for pathmeter the agent.
pub(crate) const COUNTED: [Tool; 6] = {
    let mut all = TIMED;
    all[0] = Tool { program: ours::PROGRAM, start: ours::agent };
    all[3] = Tool { program: fping::PROGRAM, start: fping::counting };
    all
};

/// The tools with the version of their package or of `--version`.
pub(crate) fn versions() -> Vec<(&'static str, Option<String>)> {
    let all = [
        (ours::PROGRAM, ours::version()),
        (irtt::PROGRAM, package("irtt")),
        (stamp_suite::PROGRAM, stamp_suite::version()),
        (fping::PROGRAM, package("fping")),
        (smokeping::PROGRAM, package("prometheus-smokeping-prober")),
        (blackbox::PROGRAM, package("prometheus-blackbox-exporter")),
    ];
    all.into_iter().chain(traceroutes::versions()).chain(throughput::versions()).collect()
}

fn package(name: &str) -> Option<String> {
    let mut query = std::process::Command::new("dpkg-query");
    let output = query.args(["-W", "-f=${Version} (Debian)", name]).output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !version.is_empty()).then_some(version)
}

/// The last word of the first line that a program prints for `--version`.
fn version_of(program: &str) -> Option<String> {
    let output = std::process::Command::new(program).arg("--version").output().ok()?;
    Some(String::from_utf8(output.stdout).ok()?.lines().next()?.rsplit(' ').next()?.to_owned())
}

/// Longest time until a tool exits after its run.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until a program exits.
fn wait_for(program: &mut Program) -> io::Result<()> {
    let begin = Instant::now();
    while program.try_wait().is_none() {
        if begin.elapsed() > END_TIMEOUT {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("does not exit:\n{}", program.output()),
            ));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Parses a number in the output of a tool.
fn parse_number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.trim().parse().map_err(|_| io::Error::other(format!("{text:?} is not a number")))
}
