//! fping: the kernel of the other host answers. Uses the kernel's timestamp of a reply and its own of a
//! request, and prints round trips with three digits.

use std::io;

use pathmeter_lab::Program;
use pathmeter_lab::exchange::ExchangeProtocol;

use super::{MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport, parse_number, wait_for};
use crate::host_pair::HostPair;

pub(crate) const PROGRAM: &str = "fping";

struct Fping(Program);

/// Reports each round trip, but no duplicates.
pub(crate) fn timing(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    start(pair, run, &[])
}

/// Reports duplicates, but not each round trip.
pub(crate) fn counting(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    start(pair, run, &["-q"])
}

fn start(pair: &mut HostPair, run: ProbeRun, arguments: &[&str]) -> io::Result<Box<dyn MeasuringTool>> {
    let (count, period) = (run.count().to_string(), run.interval.as_millis().to_string());
    let target = pair.target().to_string();
    // Its timeout is the period, unless set.
    let common = ["-c", &count, "-p", &period, "-i", "1", "-t", "1000", &target];
    Ok(Box::new(Fping(pair.start_prober(PROGRAM, &[arguments, &common].concat()))))
}

impl MeasuringTool for Fping {
    fn name(&self) -> &'static str {
        "fping"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Icmp
    }

    fn finish(mut self: Box<Self>, _: &HostPair) -> io::Result<ToolReport> {
        wait_for(&mut self.0)?;
        let text = self.0.output();
        let summary = text.lines().find_map(|line| line.split("xmt/rcv/%loss = ").nth(1));
        let summary = summary.ok_or_else(|| io::Error::other(format!("no summary:\n{text}")))?;
        let mut counts = summary.split('/').map(parse_number::<u64>);
        let (Some(Ok(sent)), Some(Ok(received))) = (counts.next(), counts.next()) else {
            return Err(io::Error::other(format!("no counts in {summary:?}")));
        };
        // `10.77.0.2 : [17], 64 bytes, 40.1 ms (40.2 avg, 0% loss)`
        let timed = |line: &str| {
            let (sequence, rest) = line.split_once(" : [")?.1.split_once("], ")?;
            let milliseconds: f64 = rest.split_once(" bytes, ")?.1.split_once(" ms")?.0.parse().ok()?;
            Some(ReportedRtt { of: RequestRef::Sequence(sequence.parse().ok()?), nanos: milliseconds * 1e6 })
        };
        Ok(ToolReport {
            lost: sent.saturating_sub(received),
            duplicates: Some(text.lines().filter(|line| line.contains("duplicate for [")).count() as u64),
            round_trips: text.lines().filter_map(timed).collect(),
            ..ToolReport::default()
        })
    }
}
