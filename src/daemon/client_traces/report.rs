//! What clients and operators receive of a trace.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::trace::{Answer, DirectedReport, HopState, TraceReport};
use serde::Serialize;
use tokio::sync::mpsc::{Sender, UnboundedReceiver};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::TraceRefusal;
use crate::event_log::{EventLog, EventType};
use crate::metrics::websocket::{ClientTraceResult, WebSocketSeries};
use crate::trace_log::{HopRecord, TraceRecord};
use crate::websocket::{ClientMessage, TraceUpdate};

/// Reports the trace of one client to that client, and to the operator: as an event and in the metrics.
#[derive(Debug)]
pub(in crate::daemon) struct ClientTraceReport {
    client: IpAddr,
    /// The protocol of the probes, or `own_flow`; `None` before the trace began.
    method: Option<&'static str>,
    /// Why the method is not `own_flow`, which is configured.
    fallback_reason: Option<String>,
    messages: Sender<ClientMessage>,
    events: Arc<EventLog>,
    series: Arc<WebSocketSeries>,
    /// The TTLs of the hops that were sent.
    hops: BTreeSet<u8>,
    /// What is counted if the report is dropped before the trace has ended.
    result: ClientTraceResult,
}

/// How the task of a trace has ended.
#[derive(Debug)]
pub(in crate::daemon) enum TraceEnd {
    /// With a result.
    Reported,
    /// It did not begin; the client is traced by another method.
    NotBegun(ClientTraceReport),
    /// The client's connection has stalled.
    Stalled,
}

/// A trace without a result after this time has failed. Chosen: more than the longest wait for the answers to
/// all hops.
pub(super) const RESULT_MAX: Duration = Duration::from_secs(15);

/// Number of events of each type about clients that are kept. Chosen: the clients of the last minute at the
/// default rate, with up to thirty hops each, in two megabytes.
const EVENTS_MAX: usize = 64;

impl ClientTraceReport {
    pub(super) fn new(
        client: IpAddr,
        messages: Sender<ClientMessage>,
        events: Arc<EventLog>,
        series: Arc<WebSocketSeries>,
    ) -> Self {
        let result = ClientTraceResult::Failed;
        let (method, fallback_reason, hops) = (None, None, BTreeSet::new());
        Self { client, method, fallback_reason, messages, events, series, hops, result }
    }

    /// Sends a message on the connection of the client. It may have left, and has room for all messages of a
    /// trace.
    pub(super) fn send(&self, message: ClientMessage) {
        let _ = self.messages.try_send(message);
    }

    fn update(&self, update: TraceUpdate) {
        self.send(ClientMessage::Update(update));
    }

    /// Waits until the client disconnects.
    pub(super) fn disconnected(&self) -> impl Future<Output = ()> + Send + 'static {
        let messages = self.messages.clone();
        async move { messages.closed().await }
    }

    pub(super) fn client(&self) -> IpAddr {
        self.client
    }

    /// Whether the client knows that the trace has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.method.is_some()
    }

    /// The client is not traced. That is only counted: with an event for each connection, clients that
    /// connect often would displace all others.
    pub(super) fn refused(mut self, refusal: TraceRefusal) {
        self.result = refusal.result();
        self.update(TraceUpdate::Error { reason: refusal.to_string() });
    }

    /// The client is traced by another method than `own_flow`, which is configured.
    pub(super) fn fall_back(&mut self, reason: String) {
        self.fallback_reason = Some(reason);
    }

    pub(super) fn connected(&mut self, method: &'static str) {
        self.method = Some(method);
        let (address, fallback_reason) = (self.client, self.fallback_reason.clone());
        self.update(TraceUpdate::Connected { address, method, fallback_reason });
    }

    /// A router has answered. Only its first answer counts.
    pub(super) fn answered(&mut self, ttl: u8, answer: &Answer) {
        if self.hops.insert(ttl) {
            self.update(TraceUpdate::Hop {
                ttl,
                state: HopState::Answered.as_str().to_owned(),
                address: Some(answer.router),
                rtt_seconds: Some(answer.rtt.as_secs_f64()),
            });
        }
    }

    /// The trace is complete: sends the hops that were not sent before.
    pub(super) fn complete(&mut self, trace: TraceRecord) {
        for hop in trace.hops.iter().filter(|hop| !self.hops.contains(&hop.ttl)) {
            self.update(update_of(hop));
        }
        let TraceRecord { reached, routers, rtt_seconds, duration_seconds, .. } = trace;
        self.update(TraceUpdate::Done { reached, routers, rtt_seconds, duration_seconds });
        self.result = ClientTraceResult::Complete;
        let (client, method) = (self.client, self.method.unwrap_or_default());
        let fallback_reason = self.fallback_reason.take();
        self.events.add(&ClientTraced { client, method, fallback_reason, trace });
    }

    pub(super) fn left(&mut self) {
        self.result = ClientTraceResult::Left;
        self.error("the client disconnected".to_owned());
    }

    pub(super) fn timed_out(&self) {
        self.error(format!("no result within {} s", RESULT_MAX.as_secs()));
    }

    /// A trace by this method has made the connection of the client stall: closes it, so that the client need
    /// not wait until it times out.
    pub(super) fn stalled(&mut self, method: &'static str, reason: String) {
        (self.method, self.result) = (Some(method), ClientTraceResult::Stalled);
        self.error(reason);
        self.send(ClientMessage::Close);
    }

    /// There is no trace.
    pub(super) fn error(&self, reason: String) {
        let (client, method) = (self.client, self.method);
        self.events.add(&ClientTraceFailed { client, method, reason: reason.clone() });
        self.update(TraceUpdate::Error { reason });
    }
}

impl Drop for ClientTraceReport {
    fn drop(&mut self) {
        self.series.traced(self.result);
    }
}

/// Reports a trace with packets of its own until it ends or the client leaves.
pub(super) async fn watch(
    mut report: ClientTraceReport,
    method: &'static str,
    mut reports: UnboundedReceiver<DirectedReport>,
    mut failure: oneshot::Receiver<String>,
) -> TraceEnd {
    report.connected(method);
    let mut timeout = pin!(sleep(RESULT_MAX));
    let mut disconnected = pin!(report.disconnected());
    loop {
        tokio::select! {
            Some(DirectedReport { report: found, .. }) = reports.recv() => match found {
                TraceReport::Answered { ttl, answer, is_destination: false, .. } => report.answered(ttl, &answer),
                TraceReport::Traced(trace) => {
                    report.complete(TraceRecord::from(&*trace));
                    break;
                }
                TraceReport::Answered { .. }
                | TraceReport::Sent { .. }
                | TraceReport::Rejected { .. }
                | TraceReport::Unanswered { .. }
                | TraceReport::Withdrawn
                | TraceReport::SendError(_)
                | TraceReport::Deferred(_)
                | TraceReport::Unmatched
                | TraceReport::LossyFlow { .. }
                | TraceReport::Route { .. }
                | TraceReport::Reachability(_)
            | TraceReport::TtlClamped { .. } => {}
            },
            Ok(reason) = &mut failure => break report.error(reason),
            () = &mut disconnected => break report.left(),
            () = &mut timeout => break report.timed_out(),
        }
    }
    TraceEnd::Reported
}

fn update_of(hop: &HopRecord) -> TraceUpdate {
    let first = hop.responders.first().filter(|_| hop.answered > 0);
    TraceUpdate::Hop {
        ttl: hop.ttl,
        state: hop.state.to_string(),
        address: first.map(|found| found.address),
        rtt_seconds: first.map(|found| found.rtt_seconds.last),
    }
}

/// The route to a client of `/ws`.
#[derive(Serialize)]
struct ClientTraced {
    client: IpAddr,
    method: &'static str,
    fallback_reason: Option<String>,
    #[serde(flatten)]
    trace: TraceRecord,
}

impl EventType for ClientTraced {
    const NAME: &'static str = "client_traced";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}

/// There is no route to a client of `/ws`.
#[derive(Serialize)]
struct ClientTraceFailed {
    client: IpAddr,
    /// `None` if the trace did not begin.
    method: Option<&'static str>,
    reason: String,
}

impl EventType for ClientTraceFailed {
    const NAME: &'static str = "client_trace_failed";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::time::Timestamp;
    use pathmeter_proto::trace::{Direction, Hop, Trace, Trigger};
    use serde_json::{Value, json};
    use tokio::sync::mpsc::{Receiver, channel, unbounded_channel};

    use super::*;

    const RTT: Duration = Duration::from_millis(3);

    fn router(ttl: u8) -> Answer {
        Answer::new([10, 0, 0, ttl].into(), RTT)
    }

    fn reported(report: TraceReport) -> DirectedReport {
        DirectedReport { direction: Direction::Forward, report }
    }

    fn answered(ttl: u8, is_destination: bool) -> DirectedReport {
        reported(TraceReport::Answered { flow: 0, ttl, answer: router(ttl), is_destination })
    }

    /// The first and the third router have answered.
    fn traced() -> DirectedReport {
        let hop = |ttl: u8| Hop {
            ttl,
            state: if ttl == 2 { HopState::Unanswered } else { HopState::Answered },
            sent: 1,
            answers: if ttl == 2 { Vec::new() } else { vec![router(ttl)] },
            responder: None,
        };
        reported(TraceReport::Traced(Box::new(Trace {
            flow: 0,
            trigger: Trigger::Start,
            began: Timestamp::from_nanos(0),
            duration: RTT,
            is_burst: true,
            rtt: Some(RTT),
            routers: Some(3),
            hops: vec![hop(1), hop(2), hop(3)],
            route: None,
            first_lossy_hop: None,
            is_ttl_clamped: false,
            rejection: None,
        })))
    }

    struct Watched {
        events: Arc<EventLog>,
        series: Arc<WebSocketSeries>,
        report: ClientTraceReport,
        updates: Receiver<ClientMessage>,
    }

    fn watched(room: usize) -> Watched {
        let (sender, updates) = channel(room);
        let (events, series) = (Arc::<EventLog>::default(), Arc::<WebSocketSeries>::default());
        let client = [192, 0, 2, 1].into();
        let report = ClientTraceReport::new(client, sender, Arc::clone(&events), Arc::clone(&series));
        Watched { events, series, report, updates }
    }

    async fn receive(updates: &mut Receiver<ClientMessage>) -> Value {
        let Some(ClientMessage::Update(update)) = updates.recv().await else { panic!("an update") };
        json!(update)
    }

    #[tokio::test]
    async fn hop_is_sent_when_its_router_answers_and_the_others_at_the_end() {
        let Watched { events, series, report, mut updates } = watched(80);
        let (reports, received) = unbounded_channel();
        let (_failed, failure) = oneshot::channel();
        let task = tokio::spawn(watch(report, "icmp", received, failure));
        assert_eq!(receive(&mut updates).await["event"], "connected");
        for report in [answered(3, false), answered(3, false), answered(4, true), answered(1, false)] {
            reports.send(report).unwrap();
        }
        for ttl in [3, 1] {
            let expected = json!({
                "event": "hop", "ttl": ttl, "state": "answered", "address": format!("10.0.0.{ttl}"),
                "rtt_seconds": 0.003,
            });
            assert_eq!(receive(&mut updates).await, expected, "before the trace is complete");
        }
        reports.send(traced()).unwrap();
        task.await.unwrap();
        let hop = receive(&mut updates).await;
        assert_eq!(
            (&hop["ttl"], &hop["state"], &hop["address"]),
            (&json!(2), &json!("unanswered"), &Value::Null)
        );
        assert_eq!(receive(&mut updates).await["event"], "done");
        assert_eq!(updates.recv().await, None);
        assert_eq!(events.after(0).len(), 1);
        assert_eq!(series.traced_as(ClientTraceResult::Complete), 1);
    }

    #[tokio::test]
    async fn refused_trace_is_counted_and_no_event() {
        let Watched { events, series, report, mut updates } = watched(80);
        report.refused(TraceRefusal::SourceRate(Duration::from_nanos(1_333_333_332)));
        let update = receive(&mut updates).await;
        assert_eq!(
            update["reason"],
            "at most one trace to your address begins every 1.33 s; connect again later"
        );
        assert_eq!(events.after(0).len(), 0);
        assert_eq!(series.traced_as(ClientTraceResult::SourceRate), 1);
    }

    #[tokio::test]
    async fn reason_for_another_method_is_in_the_message_and_the_event() {
        let Watched { events, mut report, mut updates, .. } = watched(80);
        report.fall_back("raw sockets need CAP_NET_RAW".to_owned());
        let (reports, received) = unbounded_channel();
        let (_failed, failure) = oneshot::channel();
        reports.send(traced()).unwrap();
        watch(report, "icmp", received, failure).await;
        let expected = json!("raw sockets need CAP_NET_RAW");
        assert_eq!(receive(&mut updates).await["fallback_reason"], expected);
        assert_eq!(events.after(0)[0].fields["fallback_reason"], expected);
    }

    #[tokio::test]
    async fn stalled_connection_is_closed_after_the_error() {
        let Watched { events, series, mut report, mut updates } = watched(80);
        report.stalled("own_flow", "stalled".to_owned());
        drop(report);
        assert_eq!(receive(&mut updates).await["event"], "error");
        assert_eq!(updates.recv().await, Some(ClientMessage::Close));
        assert_eq!(events.after(0)[0].fields["method"], "own_flow");
        assert_eq!(series.traced_as(ClientTraceResult::Stalled), 1);
    }

    #[tokio::test]
    async fn client_that_does_not_read_delays_nothing() {
        let Watched { events, report, mut updates, .. } = watched(2);
        let (reports, received) = unbounded_channel();
        let (_failed, failure) = oneshot::channel();
        for ttl in 1..=64 {
            reports.send(answered(ttl, false)).unwrap();
        }
        reports.send(traced()).unwrap();
        watch(report, "icmp", received, failure).await;
        assert_eq!(events.after(0)[0].fields["routers"], 3);
        let mut kept = Vec::new();
        while let Some(ClientMessage::Update(update)) = updates.recv().await {
            kept.push(json!(update)["event"].clone());
        }
        assert_eq!(kept, ["connected", "hop"], "the others were dropped");
    }

    #[tokio::test]
    async fn trace_ends_when_the_client_leaves_or_the_task_is_dropped() {
        let Watched { events, series, report, updates } = watched(80);
        let (_reports, received) = unbounded_channel();
        let (_failed, failure) = oneshot::channel();
        drop(updates);
        watch(report, "udp", received, failure).await;
        assert_eq!(events.after(0)[0].fields["reason"], "the client disconnected");
        assert_eq!(series.traced_as(ClientTraceResult::Left), 1);
        let Watched { series, report, .. } = watched(80);
        drop(report);
        assert_eq!(series.traced_as(ClientTraceResult::Failed), 1);
    }
}
