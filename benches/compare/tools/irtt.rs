//! irtt: has a client and a server of its own. Reports the direction of every loss, and every round trip
//! without the server's time, from user-space timestamps.

use std::io;

use pathmeter_lab::Program;
use pathmeter_lab::exchange::ExchangeProtocol;
use serde_json::Value;

use super::{MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport, wait_for};
use crate::host_pair::HostPair;

pub(crate) const PROGRAM: &str = "irtt";
pub(crate) const PORT: u16 = 2_112;

struct Irtt {
    client: Program,
    _server: Program,
}

pub(crate) fn start(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let (target, out) = (pair.target().to_string(), pair.file("irtt.json"));
    let interval = format!("{}ms", run.interval.as_millis());
    // No minimum interval: the link may deliver requests closer together than they were sent.
    let server = pair.start_responder(PROGRAM, &["server", "-b", &target, "-i", "0"]);
    pair.wait_for_udp(PORT);
    let span = format!("{}ms", run.span.as_millis());
    let out = out.display().to_string();
    let client =
        pair.start_prober(PROGRAM, &["client", "-i", &interval, "-d", &span, "-Q", "-o", &out, &target]);
    Ok(Box::new(Irtt { client, _server: server }))
}

impl MeasuringTool for Irtt {
    fn name(&self) -> &'static str {
        "irtt"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Irtt(PORT)
    }

    fn finish(mut self: Box<Self>, pair: &HostPair) -> io::Result<ToolReport> {
        wait_for(&mut self.client)?;
        let text = std::fs::read_to_string(pair.file("irtt.json"))
            .map_err(|error| io::Error::other(format!("{error}\n{}", self.client.output())))?;
        let found: Value = serde_json::from_str(&text)?;
        let all = found["round_trips"].as_array().map(Vec::as_slice).unwrap_or_default();
        let fate = |fate: &str| all.iter().filter(|one| one["lost"] == fate).count();
        let [unknown, forward, reverse] = ["true", "true_up", "true_down"].map(fate);
        let timed = |one: &Value| {
            let sequence = u32::try_from(one["seqno"].as_u64()?).ok()?;
            Some(ReportedRtt { of: RequestRef::Sequence(sequence), nanos: one["delay"]["rtt"].as_f64()? })
        };
        let signed = |count: usize| i64::try_from(count).map_err(io::Error::other);
        Ok(ToolReport {
            lost: (unknown + forward + reverse) as u64,
            directions: Some([signed(forward)?, signed(reverse)?]),
            duplicates: found["stats"]["duplicates"].as_u64(),
            reordered: found["stats"]["late_packets"].as_u64(),
            round_trips: all.iter().filter_map(timed).collect(),
            ..ToolReport::default()
        })
    }
}
