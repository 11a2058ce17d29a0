//! Traces on the connections of clients: when they are made, and what follows from them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use pathmeter_proto::admission::rate_limit_key;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{Answer, CLAMPED_FOR};
use tokio::time::timeout;
use tracing::warn;

use super::report::{ClientTraceReport, RESULT_MAX, TraceEnd};
use crate::config::{TraceMethod, TracedClients, WebSocketRules};
use crate::http::AcceptedConnection;
use crate::stream::own_flow::{self, OwnFlowError, OwnFlowLimits, OwnFlowObserver, is_permitted};
use crate::trace_log::TraceRecord;
use crate::websocket::ClientMessage;

/// The method as events and clients see it.
const METHOD: &str = "own_flow";

/// Traces on connections that run at once; further clients are traced by another method. Chosen: each has two
/// raw sockets, and the kernel offers each received segment and ICMP message to all of them.
const RUNNING_MAX: usize = 16;

/// Addresses, or IPv6 /64, that are remembered because a connection has stalled; at the limit the one that
/// was added first is forgotten. Chosen: 4,096, in some hundred kilobytes.
const STALLED_MAX: usize = 4_096;

/// Which clients are traced on their own connections.
#[derive(Debug, Default)]
pub(super) struct OwnFlowAdmission {
    /// `None` until the method is configured.
    is_permitted: Option<bool>,
    /// Until when no such trace is made, because a connection has stalled.
    stalled: BTreeMap<IpAddr, Timestamp>,
}

/// Why a client is not traced on its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum OwnFlowRefusal {
    #[error("raw sockets need CAP_NET_RAW")]
    NotPermitted,
    #[error("a connection of this address has stalled when it was traced")]
    Stalled,
    #[error("{RUNNING_MAX} clients are being traced on their connections")]
    TooMany,
    #[error("the connection cannot be used besides the server")]
    NoConnection,
}

impl OwnFlowAdmission {
    /// Checks the permission when the method is first configured, and says so if it is missing.
    pub(super) fn apply(&mut self, rules: &WebSocketRules) {
        let is_configured = rules.trace_method == TraceMethod::OwnFlow && rules.trace != TracedClients::Off;
        if is_configured && self.is_permitted.is_none() {
            let is_permitted = is_permitted();
            if !is_permitted {
                warn!(
                    capability = "CAP_NET_RAW",
                    "clients cannot be traced on their own connections: using other methods"
                );
            }
            self.is_permitted = Some(is_permitted);
        }
    }

    /// Whether a client may be traced on its connection, while this many are.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn admit(&self, client: IpAddr, running: usize, now: Timestamp) -> Result<(), OwnFlowRefusal> {
        let is_stalled = self.stalled.get(&rate_limit_key(client)).is_some_and(|until| *until > now);
        if self.is_permitted != Some(true) {
            return Err(OwnFlowRefusal::NotPermitted);
        }
        if is_stalled {
            return Err(OwnFlowRefusal::Stalled);
        }
        if running >= RUNNING_MAX {
            return Err(OwnFlowRefusal::TooMany);
        }
        Ok(())
    }

    /// The connection of a client has stalled.
    pub(super) fn stalled(&mut self, client: IpAddr, now: Timestamp) {
        self.stalled.retain(|_, until| *until > now);
        if self.stalled.len() >= STALLED_MAX
            && let Some((first, _)) = self.stalled.iter().min_by_key(|(_, until)| **until)
        {
            let first = *first;
            self.stalled.remove(&first);
        }
        self.stalled.insert(rate_limit_key(client), now + CLAMPED_FOR);
        let hours = CLAMPED_FOR.as_secs() / 3_600;
        warn!(
            %client,
            hours,
            "a client's connection stalled when it was traced: using other methods for its address"
        );
    }
}

impl OwnFlowObserver for ClientTraceReport {
    fn ping(&mut self) {
        self.send(ClientMessage::Ping);
    }

    fn begun(&mut self) {
        self.connected(METHOD);
    }

    fn found(&mut self, ttl: u8, answer: &Answer) {
        self.answered(ttl, answer);
    }
}

/// Traces a client on its connection, and reports that.
pub(super) async fn watch(
    mut report: ClientTraceReport,
    connection: AcceptedConnection,
    limits: OwnFlowLimits,
) -> TraceEnd {
    let disconnected = report.disconnected();
    let trace = timeout(RESULT_MAX, own_flow::trace(connection, limits, &mut report));
    let outcome = tokio::select! {
        outcome = trace => Some(outcome),
        () = disconnected => None,
    };
    match outcome {
        None => report.left(),
        Some(Err(_)) => report.timed_out(),
        Some(Ok(Ok(trace))) => report.complete(TraceRecord::from(&trace)),
        Some(Ok(Err(error @ OwnFlowError::Stalled))) => {
            report.stalled(METHOD, error.to_string());
            return TraceEnd::Stalled;
        }
        Some(Ok(Err(error @ (OwnFlowError::RawSocket(_) | OwnFlowError::Unhealthy)))) => {
            if !report.has_begun() {
                report.fall_back(error.to_string());
                return TraceEnd::NotBegun(report);
            }
            report.error(error.to_string());
        }
    }
    TraceEnd::Reported
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos((1_000 + seconds) * 1_000_000_000)
    }

    fn permitted() -> OwnFlowAdmission {
        OwnFlowAdmission { is_permitted: Some(true), ..OwnFlowAdmission::default() }
    }

    #[test]
    fn address_whose_connection_has_stalled_is_left_alone_for_a_day() {
        let mut admission = permitted();
        let client = |text: &str| -> IpAddr { text.parse().unwrap() };
        admission.stalled(client("2001:db8::1"), at(0));
        let allowed = |text, seconds| admission.admit(client(text), 0, at(seconds)).is_ok();
        assert!(!allowed("2001:db8::2", 86_399), "a /64 is one source");
        assert!(allowed("2001:db8:0:1::1", 1));
        assert!(allowed("2001:db8::1", 86_400));
    }

    #[test]
    fn number_of_remembered_addresses_is_limited() {
        let mut admission = permitted();
        let client = |index: u32| IpAddr::from((0x0a00_0000 + index).to_be_bytes());
        let count = u32::try_from(STALLED_MAX).unwrap() + 10;
        for index in 0..count {
            admission.stalled(client(index), at(index.into()));
        }
        assert_eq!(admission.stalled.len(), STALLED_MAX);
        assert_eq!(admission.admit(client(9), 0, at(5_000)), Ok(()), "the first ones are forgotten");
        assert_eq!(admission.admit(client(10), 0, at(5_000)), Err(OwnFlowRefusal::Stalled));
    }

    #[test]
    fn method_needs_permission_and_has_a_limit() {
        let client = [192, 0, 2, 1].into();
        let refused = OwnFlowAdmission::default().admit(client, 0, at(0));
        assert_eq!(refused, Err(OwnFlowRefusal::NotPermitted));
        assert_eq!(permitted().admit(client, RUNNING_MAX - 1, at(0)), Ok(()));
        assert_eq!(permitted().admit(client, RUNNING_MAX, at(0)), Err(OwnFlowRefusal::TooMany));
    }
}
