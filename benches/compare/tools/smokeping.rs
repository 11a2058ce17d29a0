//! smokeping_prober: exports a histogram; each round trip can be had from its debug log alone. The kernel on the other side
//! answers.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use pathmeter_lab::exchange::Protocol;
use pathmeter_lab::{Page, Program, eventually, get};

use super::{Asker, Exported, Run, Said, Timed, Which, number};
use crate::lane::{Lane, wall};

pub(crate) const PROGRAM: &str = "prometheus-smokeping-prober";
const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_374);
/// It wants a file, even if its targets are on the command line.
const NO_TARGETS: &str = "targets: []\n";

struct Smokeping(Program);

pub(crate) fn start(lane: &mut Lane, run: Run) -> io::Result<Box<dyn Asker>> {
    let interval = format!("{}ms", run.interval.as_millis());
    let target = lane.target().to_string();
    let program = launch(lane, &["--log.level=debug", "-i", &interval, &target])?;
    Ok(Box::new(Smokeping(program)))
}

/// Starts it, and waits for its first page.
pub(crate) fn launch(lane: &mut Lane, arguments: &[&str]) -> io::Result<Program> {
    let file = format!("--config.file={}", lane.write("smokeping.yml", NO_TARGETS)?.display());
    let program = lane.ask(PROGRAM, &[&[file.as_str()], arguments].concat());
    eventually("smokeping_prober serves its page", || scrape(lane).ok());
    Ok(program)
}

pub(crate) fn scrape(lane: &Lane) -> io::Result<Page> {
    Ok(Page::parse(&lane.here().within(|| get(FRONT, "/metrics"))?.body))
}

impl Asker for Smokeping {
    fn name(&self) -> &'static str {
        "smokeping_prober"
    }

    fn protocol(&self) -> Protocol {
        Protocol::Icmp
    }

    fn finish(self: Box<Self>, lane: &Lane) -> io::Result<Said> {
        let (page, until) = (scrape(lane)?, wall());
        let answered = page.count("smokeping_response_duration_seconds_count", &[]);
        // `… msg="Echo reply" ip_addr=10.77.0.2 bytes_received=64 icmp_seq=17 time=40.123456ms ttl=64`
        let timed = |line: &str| {
            let (sequence, rest) = line.split_once(" icmp_seq=")?.1.split_once(" time=")?;
            let span = go_span(rest.split(' ').next()?).ok()?;
            Some(Timed { of: Which::Sequence(sequence.parse().ok()?), nanos: span })
        };
        Ok(Said {
            lost: page.count("smokeping_requests_total", &[]).saturating_sub(answered),
            duplicates: Some(page.count("smokeping_response_duplicates_total", &[])),
            round_trips: self.0.output().lines().filter_map(timed).collect(),
            until: Some(until),
            page: Some(Exported {
                text: page.text().to_owned(),
                name: "smokeping_response_duration_seconds",
            }),
            ..Said::default()
        })
    }
}

/// A duration as Go writes it, in nanoseconds.
fn go_span(text: &str) -> io::Result<f64> {
    let units = [("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)];
    let unit = units.iter().find_map(|(unit, nanos)| Some((text.strip_suffix(unit)?, nanos)));
    let (figure, nanos) = unit.ok_or_else(|| io::Error::other(format!("{text:?} is no duration")))?;
    Ok(number::<f64>(figure)? * nanos)
}
