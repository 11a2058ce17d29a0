//! Arguments, reports and traces for the tests of this module.

use std::time::Duration;

use clap::Parser;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{Answer, DirectedReport, Direction, Hop, HopState, Trace, TraceReport, Trigger};

use super::TraceArguments;
use super::routes::{DirectedFlow, Routes};

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    trace: TraceArguments,
}

pub(super) fn arguments(options: &[&str]) -> TraceArguments {
    Command::parse_from([&["trace", "192.0.2.9", "-n"], options].concat()).trace
}

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn routes(arguments: &TraceArguments) -> Routes<'_> {
    Routes::new(arguments, ([192, 0, 2, 9], 862).into())
}

pub(super) const FORWARD: DirectedFlow = DirectedFlow { direction: Direction::Forward, number: 0 };

pub(super) fn add(routes: &mut Routes<'_>, report: TraceReport) {
    routes.add(DirectedReport { direction: Direction::Forward, report });
}

pub(super) fn router(ttl: u8) -> Answer {
    Answer::new([10, 0, 0, ttl].into(), MS)
}

pub(super) fn answered(ttl: u8) -> TraceReport {
    TraceReport::Answered { flow: 0, ttl, answer: router(ttl), is_destination: false }
}

/// A trace with an answer at these hops.
pub(super) fn trace(hops: &[bool], rtt: Option<Duration>, routers: Option<u8>) -> Trace {
    let hops = (1..).zip(hops).map(|(ttl, is_answered)| Hop {
        ttl,
        state: if *is_answered { HopState::Answered } else { HopState::Unanswered },
        sent: 1,
        answers: is_answered.then(|| router(ttl)).into_iter().collect(),
        responder: None,
    });
    Trace {
        flow: 0,
        trigger: Trigger::Start,
        began: Timestamp::from_nanos(0),
        duration: MS,
        is_burst: true,
        rtt,
        routers,
        hops: hops.collect(),
        route: None,
        first_lossy_hop: None,
        is_ttl_clamped: false,
        rejection: None,
    }
}
