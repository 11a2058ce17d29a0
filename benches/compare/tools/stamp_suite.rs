//! stamp-suite: a STAMP sender and reflector. Counts losses by direction with its Direct Measurement
//! extension; its round trip is from its own clock and contains the reflector's time.

use std::io;
use std::path::Path;

use pathmeter_lab::Program;
use pathmeter_lab::exchange::ExchangeProtocol;
use serde_json::Value;

use super::{
    MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport, parse_number, version_of, wait_for,
};
use crate::host_pair::HostPair;

pub(crate) const PROGRAM: &str = "stamp-suite";
pub(crate) const PORT: u16 = 862;

/// `$PATHMETER_STAMP_SUITE`, or where `scripts/install-test-peers.sh` installs it.
pub(crate) fn program() -> String {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/stamp-suite/bin/stamp-suite");
    std::env::var("PATHMETER_STAMP_SUITE").unwrap_or_else(|_| ours.display().to_string())
}

pub(crate) fn version() -> Option<String> {
    version_of(&program()).map(|version| format!("{version} (crates.io, default features)"))
}

struct StampSuite {
    sender: Program,
    _reflector: Program,
}

pub(crate) fn start(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let (target, port) = (pair.target().to_string(), PORT.to_string());
    let reflector = answer(pair, &target);
    let (count, interval) = (run.count().to_string(), run.interval.as_millis().to_string());
    let sender = pair.start_prober(
        &program(),
        &[
            "-r",
            &target,
            "-p",
            &port,
            "-c",
            &count,
            "-d",
            &interval,
            "-L",
            "1",
            "--direct-measurement",
            "-R",
            "--output-format",
            "json",
        ],
    );
    Ok(Box::new(StampSuite { sender, _reflector: reflector }))
}

/// Starts the reflector and waits until it listens.
pub(crate) fn answer(pair: &mut HostPair, on: &str) -> Program {
    let port = PORT.to_string();
    let reflector = pair.start_responder(&program(), &["-i", "-S", on, "-o", &port, "--stateful-reflector"]);
    pair.wait_for_udp(PORT);
    reflector
}

impl MeasuringTool for StampSuite {
    fn name(&self) -> &'static str {
        "stamp-suite"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Stamp(PORT)
    }

    fn finish(mut self: Box<Self>, _: &HostPair) -> io::Result<ToolReport> {
        wait_for(&mut self.sender)?;
        let text = self.sender.output();
        let summary = text.lines().find(|line| line.starts_with('{'));
        let summary = summary.ok_or_else(|| io::Error::other(format!("no summary:\n{text}")))?;
        let found: Value = serde_json::from_str(summary)?;
        let direct = &found["measurements"]["direct_measurement"];
        // It records 4,096 datagrams, and starts over beyond them.
        let is_whole = direct["history_exceeded"] == false;
        let missing = |name: &str| direct[name].as_i64().filter(|_| is_whole);
        let count = |name: &str| found["measurements"][name].as_u64();
        let mut round_trips = Vec::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("seq=")) {
            let (sequence, rest) = line.split_once(" rtt=").unwrap_or((line, ""));
            let milliseconds: f64 = parse_number(rest.split("ms").next().unwrap_or_default())?;
            round_trips.push(ReportedRtt {
                of: RequestRef::Sequence(parse_number(sequence)?),
                nanos: milliseconds * 1e6,
            });
        }
        Ok(ToolReport {
            lost: found["packets_lost"].as_u64().unwrap_or_default(),
            directions: missing("forward_missing").zip(missing("reverse_missing")).map(<[i64; 2]>::from),
            duplicates: count("duplicate_replies")
                .zip(count("additional_replies"))
                .map(|(same, others)| same + others),
            reordered: count("reordered_replies"),
            round_trips,
            ..ToolReport::default()
        })
    }
}
