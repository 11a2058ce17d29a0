//! The routes of all flows, which are printed while they become known.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::anyhow;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use pathmeter_proto::machine::NotSent;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    Answer, DESTINATION, DirectedReport, Direction, HopState, Rejection, RejectionReason, Trace, TraceReport,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::time::sleep;

use super::super::{Failure, print_out};
use super::table::{attached_text, line, milliseconds, rejection_text};
use super::{MAX_HOPS, TraceArguments};
use crate::clock::Clock;
use crate::datagram::opens_ping_sockets;
use crate::loops::LoopEvent;
use crate::trace_log::TraceRecord;

/// How long to wait for the traces to the target.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the traces back, after those to the target. A target that cannot trace them does not
/// say so in every case.
const REVERSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to wait for a rejection by this host after a trace without any answer. It looks for the next host
/// for three seconds before (ARP and neighbour discovery of Linux: three requests, one per second).
const LINK_TIMEOUT: Duration = Duration::from_millis(3_500);

/// How long to wait for further rejections after the first of these: those of all probes come together.
const REJECTIONS_SPREAD: Duration = Duration::from_millis(100);

/// The first trace of each flow in each direction.
pub(super) struct Routes<'a> {
    arguments: &'a TraceArguments,
    /// The port is 0 over ICMP.
    to: SocketAddr,
    flows: BTreeMap<(Direction, u8), FlowRoute>,
    has_sent: bool,
    /// Probes that this host could not send.
    not_sent: BTreeMap<NotSent, u64>,
}

/// What is known about the route of a flow in one direction.
#[derive(Debug, Default)]
struct FlowRoute {
    /// The first answer of each hop, until the trace is complete.
    answers: BTreeMap<u8, Answer>,
    trace: Option<Trace>,
    /// When it was reported.
    traced_at: Option<Timestamp>,
    /// The nearest rejection since the trace is complete.
    late_rejection: Option<Rejection>,
}

/// What the loops report.
pub(super) struct Sources<'a> {
    pub(super) reports: &'a mut UnboundedReceiver<DirectedReport>,
    pub(super) events: &'a mut Receiver<LoopEvent>,
}

impl<'a> Routes<'a> {
    pub(super) fn new(arguments: &'a TraceArguments, to: SocketAddr) -> Self {
        Self { arguments, to, flows: BTreeMap::new(), has_sent: false, not_sent: BTreeMap::new() }
    }

    /// Waits for the traces and, unless they are for JSON, prints each hop as soon as it and all before it
    /// are known.
    pub(super) async fn watch(&mut self, mut sources: Sources<'_>) -> Result<(), Failure> {
        for (direction, timeout) in
            [(Direction::Forward, FORWARD_TIMEOUT), (Direction::Reverse, REVERSE_TIMEOUT)]
        {
            if direction == Direction::Reverse && (self.arguments.protocol != "udp" || !self.is_reached()) {
                break;
            }
            // What is known after that time is shown.
            let deadline = Clock::now() + timeout;
            for flow in 0..u8::try_from(self.arguments.flows).unwrap_or(u8::MAX) {
                self.watch_flow((direction, flow), deadline, &mut sources).await?;
            }
        }
        Ok(())
    }

    /// Waits for the trace of one flow, and prints its hops.
    async fn watch_flow(
        &mut self,
        key: (Direction, u8),
        deadline: Timestamp,
        sources: &mut Sources<'_>,
    ) -> Result<(), Failure> {
        let is_printed = !self.arguments.json;
        let mut next = 1;
        loop {
            while let Some(text) = self.line(key, next).filter(|_| is_printed) {
                let title = if next == 1 { self.flow_title(key) } else { String::new() };
                print_out(&(title + &text))?;
                next += 1;
            }
            let is_complete = self.route(key).is_some_and(|route| route.trace.is_some());
            if is_complete || !self.wait(deadline, sources).await? {
                break;
            }
        }
        self.fail_if_nothing_was_sent()?;
        self.await_late_rejection(key, sources).await?;
        self.fail_if_rejected_here(key)?;
        if is_printed {
            let title = if next == 1 { self.flow_title(key) } else { String::new() };
            print_out(&(title + &self.end(key)))?;
        }
        Ok(())
    }

    /// Waits for the next report or event, or until the deadline; returns whether there is more to wait for.
    async fn wait(&mut self, deadline: Timestamp, sources: &mut Sources<'_>) -> anyhow::Result<bool> {
        tokio::select! {
            Some(event) = sources.events.recv() => {
                if let LoopEvent::NotStarted { reason, .. } = event {
                    return Err(anyhow!(reason));
                }
            }
            Some(report) = sources.reports.recv() => self.add(report),
            () = sleep(deadline.since(Clock::now())) => return Ok(false),
        }
        Ok(true)
    }

    /// If a flow did not reach the target and no probe was rejected so far, waits for that as long as is
    /// requested.
    async fn await_late_rejection(
        &mut self,
        key: (Direction, u8),
        sources: &mut Sources<'_>,
    ) -> Result<(), Failure> {
        let is_unreached = |trace: &Trace| trace.rtt.is_none() && trace.rejection.is_none();
        let trace = self.route(key).and_then(|route| route.trace.as_ref());
        let is_open = trace.is_some_and(is_unreached);
        let has_no_answer = trace.is_some_and(|trace| trace.hops.is_empty());
        // Sockets of probes over TCP are closed before that.
        if key.0 == Direction::Reverse || !is_open || self.arguments.protocol == "tcp" {
            return Ok(());
        }
        let traced_at = self.route(key).and_then(|route| route.traced_at).unwrap_or_else(Clock::now);
        let least = if has_no_answer { LINK_TIMEOUT } else { Duration::ZERO };
        let mut deadline = traced_at + self.arguments.wait.max(least);
        loop {
            if self.rejection(key).is_some() {
                deadline = deadline.min(Clock::now() + REJECTIONS_SPREAD);
            }
            if !self.wait(deadline, sources).await? {
                break;
            }
        }
        Ok(())
    }

    /// Returns an error if this host itself has rejected the probes, because it does not find the next one.
    fn fail_if_rejected_here(&self, key: (Direction, u8)) -> anyhow::Result<()> {
        match self.rejection(key) {
            Some(Rejection { address, reason: RejectionReason::HostUnreachable, .. })
                if address != self.to.ip() && is_own(address) =>
            {
                let to = self.to.ip();
                Err(anyhow!("sending to {to}: host unreachable: the next host does not answer on its link"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether a rejection may come later than it is waited for.
    fn has_more_time(&self) -> bool {
        self.arguments.protocol != "tcp" && self.arguments.wait < LINK_TIMEOUT
    }

    fn route(&self, key: (Direction, u8)) -> Option<&FlowRoute> {
        self.flows.get(&key)
    }

    fn add(&mut self, DirectedReport { direction, report }: DirectedReport) {
        match report {
            TraceReport::Sent { .. } => self.has_sent = true,
            TraceReport::Answered { flow, ttl, answer, is_destination: false } => {
                self.flows.entry((direction, flow)).or_default().answers.entry(ttl).or_insert(answer);
            }
            TraceReport::Rejected { flow, rejection } => {
                let route = self.flows.entry((direction, flow)).or_default();
                let nearest = |rejection: &Rejection| rejection.ttl.unwrap_or(DESTINATION);
                let known = route.late_rejection.as_ref().map_or(u8::MAX, nearest);
                if route.trace.is_some() && (route.late_rejection.is_none() || nearest(&rejection) < known) {
                    route.late_rejection = Some(rejection);
                }
            }
            TraceReport::Traced(trace) => {
                let route = self.flows.entry((direction, trace.flow)).or_default();
                route.traced_at.get_or_insert_with(Clock::now);
                route.trace.get_or_insert(*trace);
            }
            TraceReport::SendError(reason) => *self.not_sent.entry(reason).or_default() += 1,
            TraceReport::Answered { is_destination: true, .. }
            | TraceReport::Unanswered { .. }
            | TraceReport::Withdrawn
            | TraceReport::Deferred(_)
            | TraceReport::Unmatched
            | TraceReport::LossyFlow { .. }
            | TraceReport::Route { .. }
            | TraceReport::Reachability(_)
            | TraceReport::TtlClamped { .. } => {}
        }
    }

    /// The rejection of a flow's probes, at the hop at which the router has answered, if it has.
    fn rejection(&self, key: (Direction, u8)) -> Option<Rejection> {
        let route = self.route(key)?;
        let trace = route.trace.as_ref()?;
        let late = route.late_rejection.filter(|_| trace.rtt.is_none());
        trace.rejection.or_else(|| {
            let late = late?;
            let is_it = |answer: &Answer| answer.router == late.address;
            let hop = trace.hops.iter().find(|hop| hop.answers.iter().any(is_it));
            Some(Rejection { ttl: hop.map(|hop| hop.ttl).or(late.ttl), ..late })
        })
    }

    /// The routers in the order in which they are shown, each once.
    pub(super) fn routers(&self) -> Vec<IpAddr> {
        let mut routers = Vec::new();
        for (key, FlowRoute { answers, trace, .. }) in &self.flows {
            let shown: Vec<&Answer> = match trace {
                Some(trace) => trace.hops.iter().filter_map(|hop| hop.answers.first()).collect(),
                None => answers.values().collect(),
            };
            let rejecting = self.rejection(*key).map(|rejection| rejection.address);
            for router in shown.into_iter().map(|answer| answer.router).chain(rejecting) {
                if !routers.contains(&router) {
                    routers.push(router);
                }
            }
        }
        routers
    }

    /// Whether a trace is complete.
    pub(super) fn has_trace(&self) -> bool {
        self.flows.values().any(|route| route.trace.is_some())
    }

    pub(super) fn is_reached(&self) -> bool {
        let forward = self.flows.iter().filter(|((direction, _), _)| *direction == Direction::Forward);
        let mut traces = forward.filter_map(|(_, route)| route.trace.as_ref());
        traces.any(|trace| trace.rtt.is_some())
    }

    /// Returns an error if this host could not send a single probe.
    fn fail_if_nothing_was_sent(&self) -> anyhow::Result<()> {
        let most = self.not_sent.iter().max_by_key(|(_, count)| **count);
        match most.filter(|_| !self.has_sent) {
            Some((reason, _)) => Err(anyhow!("sending to {}: {}", self.to.ip(), reason.as_text())),
            None => Ok(()),
        }
    }

    pub(super) fn title(&self) -> String {
        let TraceArguments { target, protocol, max_hops, flows, .. } = self.arguments;
        let protocol = protocol.to_uppercase();
        let flows = if *flows == 1 { "one flow".to_owned() } else { format!("{flows} flows") };
        let hops = if *max_hops == 1 { "hop" } else { "hops" };
        let address = self.to.ip().to_string();
        let host = if *target == address { address } else { format!("{target} ({address})") };
        format!("{host}: {flows} over {protocol}, at most {max_hops} {hops}\n")
    }

    fn flow_title(&self, (direction, flow): (Direction, u8)) -> String {
        let way = match direction {
            Direction::Forward => "to",
            Direction::Reverse => "back from",
        };
        let of_flow = if self.arguments.flows == 1 { String::new() } else { format!(", flow {flow}") };
        format!("\n{way} {}{of_flow}\n", self.arguments.target)
    }

    /// The line of a hop; `None` if it is not final yet, or the trace has no such hop.
    fn line(&self, key: (Direction, u8), ttl: u8) -> Option<String> {
        let route = self.route(key)?;
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
    fn end(&self, key: (Direction, u8)) -> String {
        let (target, address) = (&self.arguments.target, self.to.ip());
        let Some(trace) = self.route(key).and_then(|route| route.trace.as_ref()) else {
            return match key.0 {
                Direction::Forward => format!("no result within {FORWARD_TIMEOUT:?}\n"),
                Direction::Reverse => format!("no trace of the way back within {REVERSE_TIMEOUT:?}\n"),
            };
        };
        let mut text = String::new();
        let rejection = self.rejection(key);
        if let Some(Rejection { ttl, address, reason, rtt }) = rejection {
            text += &line(ttl, &milliseconds(rtt), &format!("{address}  {}", rejection_text(reason)));
        }
        if let Some(rtt) = trace.rtt {
            let last = trace.routers.map(|routers| routers.saturating_add(1));
            let end = match key.0 {
                Direction::Forward => address.to_string(),
                Direction::Reverse => "this host".to_owned(),
            };
            text += &line(last, &milliseconds(rtt), &end);
        }
        let max_hops = self.arguments.max_hops;
        let is_last_answered =
            trace.hops.last().is_some_and(|hop| hop.ttl == max_hops && !hop.answers.is_empty());
        let is_deferred = trace.hops.iter().any(|hop| hop.state == HopState::NotProbed);
        let larger = |what: String| match max_hops {
            MAX_HOPS => what,
            _ => format!("{what}; a larger --max-hops shows more"),
        };
        let away = if max_hops == 1 { "1 hop".to_owned() } else { format!("{max_hops} hops") };
        let sentence = match (trace.rtt, trace.routers, rejection) {
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
        };
        text += &(sentence + "\n");
        for (reason, count) in &self.not_sent {
            text += &format!("{count} probes were not sent: {}\n", reason.as_text());
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let of = |flow: u8, direction| {
            let trace = self.route((direction, flow))?.trace.as_ref()?;
            let rejection = self.rejection((direction, flow));
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

/// Whether an interface of this host has the address; false if they cannot be listed.
fn is_own(address: IpAddr) -> bool {
    let addresses = getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    addresses.filter_map(|own| ip_of(&own)).any(|own| own == address)
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use pathmeter_proto::trace::{Hop, Trigger};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        trace: TraceArguments,
    }

    fn arguments(options: &[&str]) -> TraceArguments {
        Command::parse_from([&["trace", "192.0.2.9", "-n"], options].concat()).trace
    }

    const MS: Duration = Duration::from_millis(1);

    fn routes(arguments: &TraceArguments) -> Routes<'_> {
        Routes::new(arguments, ([192, 0, 2, 9], 862).into())
    }

    const FORWARD: (Direction, u8) = (Direction::Forward, 0);

    fn add(routes: &mut Routes<'_>, report: TraceReport) {
        routes.add(DirectedReport { direction: Direction::Forward, report });
    }

    fn router(ttl: u8) -> Answer {
        Answer::new([10, 0, 0, ttl].into(), MS)
    }

    fn answered(ttl: u8) -> TraceReport {
        TraceReport::Answered { flow: 0, ttl, answer: router(ttl), is_destination: false }
    }

    /// A trace with an answer at these hops.
    fn trace(hops: &[bool], rtt: Option<Duration>, routers: Option<u8>) -> Trace {
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
    fn late_rejection_is_shown_at_the_hop_of_its_router() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        add(&mut routes, TraceReport::Traced(Box::new(trace(&[true, true], None, None))));
        let reason = RejectionReason::HostUnreachable;
        for (ttl, rtt) in [(None, 3_000), (Some(5), 2_900), (Some(4), 2_950)] {
            let (address, rtt) = ([10, 0, 0, 2].into(), Duration::from_millis(rtt));
            add(
                &mut routes,
                TraceReport::Rejected { flow: 0, rejection: Rejection { ttl, address, reason, rtt } },
            );
        }
        let expected = "   2   2950.000 ms  10.0.0.2  rejects the probes: host unreachable\n\
                        192.0.2.9 does not answer: 10.0.0.2 rejects the probes\n";
        assert_eq!(routes.end(FORWARD), expected);
        assert_eq!(routes.json()["rejected"]["ttl"], 2);
        assert_eq!(routes.routers(), [1, 2].map(|ttl| router(ttl).router), "each once");
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
    fn only_an_unreachable_next_host_is_an_error_of_this_host() {
        let address = [127, 0, 0, 1].into();
        for (reason, is_error) in
            [(RejectionReason::HostUnreachable, true), (RejectionReason::Prohibited, false)]
        {
            let arguments = arguments(&[]);
            let mut routes = routes(&arguments);
            let rejection = Some(Rejection { ttl: None, address, reason, rtt: MS });
            let trace = Trace { rejection, ..trace(&[], None, None) };
            add(&mut routes, TraceReport::Traced(Box::new(trace)));
            assert_eq!(routes.fail_if_rejected_here(FORWARD).is_err(), is_error, "{reason:?}");
        }
    }

    #[test]
    fn host_that_can_send_nothing_is_an_error_and_some_probes_are_counted() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        (0..2).for_each(|_| add(&mut routes, TraceReport::SendError(NotSent::Unreachable)));
        let error = routes.fail_if_nothing_was_sent().unwrap_err();
        assert_eq!(error.to_string(), "sending to 192.0.2.9: no route from this host");
        add(&mut routes, TraceReport::Sent { ttl: 1 });
        assert!(routes.fail_if_nothing_was_sent().is_ok());
        add(&mut routes, TraceReport::Traced(Box::new(trace(&[true], Some(MS), Some(1)))));
        assert!(routes.end(FORWARD).ends_with("1 router\n2 probes were not sent: no route from this host\n"));
        assert_eq!(routes.json()["send_errors"], 2);
    }
}
