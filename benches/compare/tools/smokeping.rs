//! smokeping_prober: exports a histogram; single round trips are only in its debug log. The kernel of the
//! other host answers.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use pathmeter_lab::exchange::ExchangeProtocol;
use pathmeter_lab::{MetricsPage, Program, eventually, get};

use super::{ExportedHistogram, MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport, parse_number};
use crate::host_pair::{HostPair, wall_clock};

pub(crate) const PROGRAM: &str = "prometheus-smokeping-prober";
const HTTP_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_374);
/// It requires a file, even if its targets are on the command line.
const NO_TARGETS: &str = "targets: []\n";

struct Smokeping(Program);

pub(crate) fn start(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let interval = format!("{}ms", run.interval.as_millis());
    let target = pair.target().to_string();
    let program = launch(pair, &["--log.level=debug", "-i", &interval, &target])?;
    Ok(Box::new(Smokeping(program)))
}

/// Starts the tool and waits for its first metrics page.
pub(crate) fn launch(pair: &mut HostPair, arguments: &[&str]) -> io::Result<Program> {
    let file = format!("--config.file={}", pair.write("smokeping.yml", NO_TARGETS)?.display());
    let program = pair.start_prober(PROGRAM, &[&[file.as_str()], arguments].concat());
    eventually("smokeping_prober serves its page", || scrape(pair).ok());
    Ok(program)
}

pub(crate) fn scrape(pair: &HostPair) -> io::Result<MetricsPage> {
    Ok(MetricsPage::parse(&pair.prober_host().within(|| get(HTTP_ADDRESS, "/metrics"))?.body))
}

impl MeasuringTool for Smokeping {
    fn name(&self) -> &'static str {
        "smokeping_prober"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Icmp
    }

    fn finish(self: Box<Self>, pair: &HostPair) -> io::Result<ToolReport> {
        let (page, until) = (scrape(pair)?, wall_clock());
        let answered = page.count("smokeping_response_duration_seconds_count", &[]);
        // `… msg="Echo reply" ip_addr=10.77.0.2 bytes_received=64 icmp_seq=17 time=40.123456ms ttl=64`
        let timed = |line: &str| {
            let (sequence, rest) = line.split_once(" icmp_seq=")?.1.split_once(" time=")?;
            let span = go_span(rest.split(' ').next()?).ok()?;
            Some(ReportedRtt { of: RequestRef::Sequence(sequence.parse().ok()?), nanos: span })
        };
        Ok(ToolReport {
            lost: page.count("smokeping_requests_total", &[]).saturating_sub(answered),
            duplicates: Some(page.count("smokeping_response_duplicates_total", &[])),
            round_trips: self.0.output().lines().filter_map(timed).collect(),
            until: Some(until),
            page: Some(ExportedHistogram {
                text: page.text().to_owned(),
                name: "smokeping_response_duration_seconds",
            }),
            ..ToolReport::default()
        })
    }
}

/// A duration as Go writes it, in nanoseconds.
fn go_span(text: &str) -> io::Result<f64> {
    let units = [("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)];
    let unit = units.iter().find_map(|(unit, nanos)| Some((text.strip_suffix(unit)?, nanos)));
    let (figure, nanos) = unit.ok_or_else(|| io::Error::other(format!("{text:?} is not a duration")))?;
    Ok(parse_number::<f64>(figure)? * nanos)
}
