//! `pathmeter probe trace --enumerate`.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::anyhow;
use pathmeter_proto::machine::NotSent;
use pathmeter_proto::trace::{Completeness, Enumerated, EnumerationReport, EqualCostPaths};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};

use super::super::{Failure, print_out};
use super::TraceArguments;
use crate::loops::LoopEvent;
use crate::trace::{completeness_name, enumerated_json};

/// Waits for the paths to the target and prints them.
pub(super) async fn print_enumeration(
    arguments: &TraceArguments,
    address: IpAddr,
    reports: &mut UnboundedReceiver<EnumerationReport>,
    events: &mut Receiver<LoopEvent>,
) -> Result<(), Failure> {
    if !arguments.json {
        print_out(&format!("{address}: equal-cost paths over UDP, at most {} hops\n", arguments.max_hops))?;
    }
    let mut has_sent = false;
    let enumerated = loop {
        tokio::select! {
            Some(event) = events.recv() => {
                if let LoopEvent::NotStarted { reason, .. } = event {
                    return Err(anyhow!(reason).into());
                }
            }
            report = reports.recv() => match report {
                Some(EnumerationReport::Enumerated(enumerated)) => break enumerated,
                Some(EnumerationReport::Sent { .. }) => has_sent = true,
                // It goes on for as long as routers would be waited for, to no end.
                Some(EnumerationReport::SendError(reason)) if !has_sent && reason != NotSent::Buffer => {
                    return Err(anyhow!("sending to {address}: {}", reason.as_text()).into());
                }
                Some(
                    EnumerationReport::Answered { .. }
                    | EnumerationReport::Unanswered { .. }
                    | EnumerationReport::Withdrawn
                    | EnumerationReport::SendError(_)
                    | EnumerationReport::Deferred(_)
                    | EnumerationReport::Unmatched,
                ) => {}
                None => return Err(anyhow!("the enumeration ended early").into()),
            },
        }
    };
    let mut object = enumerated_json(&enumerated);
    let text = match arguments.json {
        true => {
            object["target"] = arguments.target.clone().into();
            object["address"] = address.to_string().into();
            object.to_string() + "\n"
        }
        false => enumerated_text(&enumerated),
    };
    print_out(&text)?;
    if object["reached"] == true { Ok(()) } else { Err(Failure::AlreadyReported) }
}

fn enumerated_text(enumerated: &Enumerated) -> String {
    let EqualCostPaths { hops, flows, probes, .. } = &enumerated.paths;
    let mut text = String::new();
    for hop in hops {
        let mut found: Vec<String> = hop.routers.iter().map(|router| router.address.to_string()).collect();
        if !hop.destination_flows.is_empty() {
            found.push("target".to_owned());
        }
        if found.is_empty() {
            found.push("*".to_owned());
        }
        let note = match hop.completeness {
            Completeness::Complete => String::new(),
            Completeness::CompleteIfUniform
            | Completeness::PartlySilent
            | Completeness::Silent
            | Completeness::PerPacket
            | Completeness::Limited(_) => {
                format!("  ({})", completeness_name(hop.completeness).replace('_', "-"))
            }
        };
        let _ = writeln!(text, "{:>4}  {}{note}", hop.ttl, found.join("  "));
    }
    let seconds = enumerated.duration.as_secs_f64();
    let _ = writeln!(text, "{probes} probes of {flows} flows in {seconds:.1} s");
    text
}
