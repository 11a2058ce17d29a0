//! Routes as text.

use pathmeter_proto::trace::{Direction, HopState, Rejection, RejectionReason};

use super::routes::{DirectedFlow, Routes};
use super::table::{attached_text, line, milliseconds, rejection_text};
use super::timeouts::{FORWARD_TIMEOUT, LINK_TIMEOUT, REVERSE_TIMEOUT};
use super::{MAX_HOPS, TraceArguments};

impl Routes<'_> {
    /// What is traced, and how.
    pub(super) fn title(&self) -> String {
        let TraceArguments { target, protocol, max_hops, flows, .. } = self.arguments;
        let protocol = protocol.to_uppercase();
        let flows = if *flows == 1 { "one flow".to_owned() } else { format!("{flows} flows") };
        let hops = if *max_hops == 1 { "hop" } else { "hops" };
        let address = self.to.ip().to_string();
        let host = if *target == address { address } else { format!("{target} ({address})") };
        format!("{host}: {flows} over {protocol}, at most {max_hops} {hops}\n")
    }

    /// The title of the table of a flow.
    pub(super) fn flow_title(&self, DirectedFlow { direction, number }: DirectedFlow) -> String {
        let way = match direction {
            Direction::Forward => "to",
            Direction::Reverse => "back from",
        };
        let of_flow = if self.arguments.flows == 1 { String::new() } else { format!(", flow {number}") };
        format!("\n{way} {}{of_flow}\n", self.arguments.target)
    }

    /// The line of a hop; `None` if it is not final yet, or the trace has no such hop.
    pub(super) fn line(&self, flow: DirectedFlow, ttl: u8) -> Option<String> {
        let route = self.route(flow)?;
        let (answer, state) = match &route.trace {
            Some(trace) => {
                let hop = trace.hops.get(usize::from(ttl) - 1)?;
                (hop.answers.first(), hop.state)
            }
            None => (route.answers.get(&ttl), HopState::Unanswered),
        };
        let Some(answer) = answer else {
            // Over TCP a hop is probed when the one before it has had its time.
            let is_serial = self.arguments.protocol == "tcp";
            let is_passed = is_serial && route.answers.last_key_value().is_some_and(|(last, _)| *last > ttl);
            let is_final = route.trace.is_some() || is_passed;
            return is_final.then(|| line(Some(ttl), &state.as_str().replace('_', "-"), "*"));
        };
        let attached = answer.extensions.as_deref().map_or_else(String::new, attached_text);
        Some(line(Some(ttl), &milliseconds(answer.rtt), &format!("{}{attached}", answer.router)))
    }

    /// The lines behind the hops: who ends the route, and a sentence.
    pub(super) fn end(&self, flow: DirectedFlow) -> String {
        let mut text = self.last_lines(flow) + &self.conclusion(flow) + "\n";
        if self.trace(flow).is_some() {
            for (reason, count) in &self.not_sent {
                text += &format!("{count} probes were not sent: {}\n", reason.as_text());
            }
        }
        text
    }

    /// Who ends the route: a router that rejects the probes, or the target.
    fn last_lines(&self, flow: DirectedFlow) -> String {
        let Some(trace) = self.trace(flow) else { return String::new() };
        let mut text = String::new();
        if let Some(Rejection { ttl, address, reason, rtt }) = self.rejection(flow) {
            text += &line(ttl, &milliseconds(rtt), &format!("{address}  {}", rejection_text(reason)));
        }
        if let Some(rtt) = trace.rtt {
            let last = trace.routers.map(|routers| routers.saturating_add(1));
            let end = match flow.direction {
                Direction::Forward => self.to.ip().to_string(),
                Direction::Reverse => "this host".to_owned(),
            };
            text += &line(last, &milliseconds(rtt), &end);
        }
        text
    }

    /// What is known about the end of the route, in a sentence.
    pub(in crate::cli) fn conclusion(&self, flow: DirectedFlow) -> String {
        let (target, address) = (&self.arguments.target, self.to.ip());
        let Some(trace) = self.trace(flow) else {
            return match flow.direction {
                Direction::Forward => format!("no result within {} s", FORWARD_TIMEOUT.as_secs()),
                Direction::Reverse => {
                    format!("no trace of the way back within {} s", REVERSE_TIMEOUT.as_secs())
                }
            };
        };
        let max_hops = self.arguments.max_hops;
        let is_last_answered =
            trace.hops.last().is_some_and(|hop| hop.ttl == max_hops && !hop.answers.is_empty());
        let is_deferred = trace.hops.iter().any(|hop| hop.state == HopState::NotProbed);
        let larger = |what: String| match max_hops {
            MAX_HOPS => what,
            _ => format!("{what}; a larger --max-hops shows more"),
        };
        let away = if max_hops == 1 { "1 hop".to_owned() } else { format!("{max_hops} hops") };
        match (trace.rtt, trace.routers, self.rejection(flow)) {
            _ if trace.is_ttl_clamped => {
                "a device on the way rewrites TTLs, so that routers cannot be found".to_owned()
            }
            (Some(_), Some(1), _) => "1 router".to_owned(),
            (Some(_), Some(routers), _) if routers > max_hops => {
                larger(format!("{routers} routers, of which {max_hops} can be shown"))
            }
            (Some(_), Some(routers), _) => format!("{routers} routers"),
            (Some(_), None, _) if is_deferred => "unknown number of routers".to_owned(),
            (Some(_), None, _) => larger(format!("{target} answers, but is more than {away} away")),
            (None, _, Some(Rejection { address: from, reason: RejectionReason::PortUnreachable, .. }))
                if from == address && self.to.port() > 0 =>
            {
                format!("{target} does not answer: nothing listens on its UDP port {}", self.to.port())
            }
            (None, _, Some(Rejection { address: from, .. })) => {
                format!("{target} does not answer: {from} rejects the probes")
            }
            (None, _, None) if is_last_answered => larger(format!("{target} does not answer within {away}")),
            (None, _, None) if self.has_more_time() && !trace.hops.is_empty() => {
                format!("{target} does not answer; --wait 4s shows whether a router rejects probes late")
            }
            (None, _, None) => format!("{target} does not answer"),
        }
    }

    /// The first flow in both directions: what is known about the end, and the hops.
    pub(in crate::cli) fn summary(&self) -> String {
        let [forward, reverse] = [Direction::Forward, Direction::Reverse].map(DirectedFlow::first);
        let mut text = format!("{}\n{}", self.conclusion(forward), self.table(forward));
        if self.is_reached() && self.arguments.protocol == "udp" {
            text += &format!("  back: {}\n{}", self.conclusion(reverse), self.table(reverse));
        }
        text
    }

    /// The lines of all hops.
    fn table(&self, flow: DirectedFlow) -> String {
        let hops: String = (1..).map_while(|ttl| self.line(flow, ttl)).collect();
        hops + &self.last_lines(flow)
    }

    /// Whether a rejection may come later than it is waited for.
    fn has_more_time(&self) -> bool {
        self.arguments.protocol != "tcp" && self.arguments.wait < LINK_TIMEOUT
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pathmeter_proto::machine::NotSent;
    use pathmeter_proto::trace::{Trace, TraceReport};

    use super::super::fixture::{FORWARD, MS, add, answered, arguments, router, routes, trace};
    use super::*;

    /// The address and the state of the lines that are final.
    fn lines(routes: &Routes<'_>) -> Vec<String> {
        let lines = (1..).map_while(|ttl| routes.line(FORWARD, ttl));
        lines.map(|line| line.split_whitespace().collect::<Vec<&str>>().join(" ")).collect()
    }

    #[test]
    fn hop_is_shown_when_it_and_all_before_it_have_answered() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        assert_eq!(lines(&routes), Vec::<String>::new());
        add(&mut routes, answered(1));
        add(&mut routes, answered(3));
        assert_eq!(lines(&routes), ["1 1.000 ms 10.0.0.1"]);
        let of_others = TraceReport::Answered { flow: 1, ttl: 2, answer: router(2), is_destination: false };
        add(&mut routes, of_others);
        assert_eq!(lines(&routes).len(), 1, "the second hop may still answer");
        add(&mut routes, answered(2));
        let second = TraceReport::Answered { flow: 0, ttl: 2, answer: router(7), is_destination: false };
        add(&mut routes, second);
        assert_eq!(lines(&routes)[1..], ["2 1.000 ms 10.0.0.2", "3 1.000 ms 10.0.0.3"]);
    }

    #[test]
    fn hop_without_an_answer_is_shown_when_the_trace_is_complete_and_over_tcp_with_the_next_answer() {
        for (protocol, is_serial) in [("tcp", true), ("icmp", false)] {
            let arguments = arguments(&["--protocol", protocol]);
            let mut routes = routes(&arguments);
            let expected = ["1 unanswered *", "2 1.000 ms 10.0.0.2"];
            assert_eq!(lines(&routes), Vec::<String>::new(), "{protocol}");
            add(&mut routes, answered(2));
            assert_eq!(lines(&routes), expected[..2 * usize::from(is_serial)], "{protocol}");
            add(&mut routes, TraceReport::Traced(Box::new(trace(&[false, true], Some(MS), Some(2)))));
            assert_eq!(lines(&routes), expected, "{protocol}");
        }
    }

    fn sentence(options: &[&str], reports: Vec<TraceReport>) -> String {
        let arguments = arguments(options);
        let mut routes = routes(&arguments);
        reports.into_iter().for_each(|report| add(&mut routes, report));
        routes.end(FORWARD).lines().last().unwrap_or_default().to_owned()
    }

    #[test]
    fn sentence_names_the_option_that_shows_more() {
        let traced =
            |hops: &[bool], rtt, routers| vec![TraceReport::Traced(Box::new(trace(hops, rtt, routers)))];
        let (one, two) = (["-m", "1"], ["-m", "2"]);
        for (options, reports, expected) in [
            (&[][..], traced(&[true; 3], Some(MS), Some(3)), "3 routers"),
            (&[], traced(&[true], Some(MS), Some(1)), "1 router"),
            (
                &one,
                traced(&[true], Some(MS), Some(3)),
                "3 routers, of which 1 can be shown; a larger --max-hops shows more",
            ),
            (
                &one,
                traced(&[true], Some(MS), None),
                "192.0.2.9 answers, but is more than 1 hop away; a larger --max-hops shows more",
            ),
            (
                &two,
                traced(&[true, true], None, None),
                "192.0.2.9 does not answer within 2 hops; a larger --max-hops shows more",
            ),
            (
                &two,
                traced(&[true], None, None),
                "192.0.2.9 does not answer; --wait 4s shows whether a router rejects probes late",
            ),
            (&["-w", "4s"], traced(&[true], None, None), "192.0.2.9 does not answer"),
            (&["--protocol", "tcp"], traced(&[true], None, None), "192.0.2.9 does not answer"),
            (&two, traced(&[], None, None), "192.0.2.9 does not answer"),
        ] {
            assert_eq!(sentence(options, reports), expected);
        }
    }

    #[test]
    fn closed_port_of_the_target_is_named() {
        let address = [192, 0, 2, 9].into();
        let rejection =
            Rejection { ttl: Some(3), address, reason: RejectionReason::PortUnreachable, rtt: MS };
        let trace = Trace { rejection: Some(rejection), ..trace(&[true; 2], None, None) };
        assert_eq!(
            sentence(&["--port", "862"], vec![TraceReport::Traced(Box::new(trace))]),
            "192.0.2.9 does not answer: nothing listens on its UDP port 862"
        );
    }

    #[test]
    fn rejection_is_shown_at_its_hop() {
        let (address, rtt) = ([10, 0, 0, 2].into(), Duration::from_millis(2_950));
        let rejection = Rejection { ttl: Some(2), address, reason: RejectionReason::HostUnreachable, rtt };
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        let trace = Trace { rejection: Some(rejection), ..trace(&[true, true], None, None) };
        add(&mut routes, TraceReport::Traced(Box::new(trace)));
        let expected = "   2   2950.000 ms  10.0.0.2  rejects the probes: host unreachable\n\
                        192.0.2.9 does not answer: 10.0.0.2 rejects the probes\n";
        assert_eq!(routes.end(FORWARD), expected);
    }

    #[test]
    fn probes_that_were_not_sent_are_counted_by_reason() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        (0..2).for_each(|_| add(&mut routes, TraceReport::SendError(NotSent::Unreachable)));
        add(&mut routes, TraceReport::Traced(Box::new(trace(&[true], Some(MS), Some(1)))));
        assert!(routes.end(FORWARD).ends_with("1 router\n2 probes were not sent: no route from this host\n"));
    }

    #[test]
    fn missing_trace_names_the_time_that_was_waited_for_it() {
        let arguments = arguments(&[]);
        let routes = routes(&arguments);
        assert_eq!(routes.end(FORWARD), "no result within 10 s\n");
        let back = DirectedFlow { direction: Direction::Reverse, ..FORWARD };
        assert_eq!(routes.end(back), "no trace of the way back within 3 s\n");
    }
}
