//! Routes as JSON.

use pathmeter_proto::trace::{Direction, Trace};
use serde_json::{Value, json};

use super::routes::{DirectedFlow, Routes};
use crate::datagram::opens_ping_sockets;
use crate::trace_log::TraceRecord;

impl Routes<'_> {
    /// The object of `--json`.
    pub(in crate::cli) fn json(&self) -> Value {
        let of = |number: u8, direction| {
            let flow = DirectedFlow { direction, number };
            let trace = self.trace(flow)?;
            let rejection = self.rejection(flow);
            Some(TraceRecord::from(&Trace { rejection, ..trace.clone() }))
        };
        let first = json!(of(0, Direction::Forward));
        let flows = (0..self.arguments.flows).map(|flow| {
            let flow = u8::try_from(flow).unwrap_or(u8::MAX);
            json!({"forward": of(flow, Direction::Forward), "reverse": of(flow, Direction::Reverse)})
        });
        json!({
            "target": self.arguments.target,
            "address": self.to.ip().to_string(),
            "method": self.arguments.protocol,
            "privileged": self.arguments.protocol == "icmp" && !opens_ping_sockets(self.to.ip()),
            "reached": self.is_reached(),
            "routers": first["routers"],
            "duration_seconds": first["duration_seconds"],
            "rtt_seconds": first["rtt_seconds"],
            "rejected": first["rejected"],
            "send_errors": self.not_sent.values().sum::<u64>(),
            "hops": first["hops"],
            "flows": flows.collect::<Vec<Value>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::machine::NotSent;
    use pathmeter_proto::trace::{Rejection, RejectionReason, TraceReport};

    use super::super::fixture::{MS, add, arguments, routes, trace};
    use super::*;

    #[test]
    fn late_rejection_and_send_errors_are_in_the_object() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        add(&mut routes, TraceReport::SendError(NotSent::Unreachable));
        add(&mut routes, TraceReport::Traced(Box::new(trace(&[true, true], None, None))));
        let (address, reason) = ([10, 0, 0, 2].into(), RejectionReason::HostUnreachable);
        let rejection = Rejection { ttl: None, address, reason, rtt: MS };
        add(&mut routes, TraceReport::Rejected { flow: 0, rejection });
        let object = routes.json();
        assert_eq!((&object["rejected"]["ttl"], &object["send_errors"]), (&json!(2), &json!(1)));
        assert_eq!(object["flows"][0]["forward"]["rejected"], object["rejected"]);
    }
}
