//! Traces as the API shows them, and as they are stored.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use pathmeter_proto::trace::{Answer, AnswerExtensions, Hop, Interface, Rejection, Trace};
use pathmeter_proto::wire::icmp_extensions::MplsLabel;
use pathmeter_proto::wire::quoted_header::{QuotedChecksum, QuotedHeader};
use serde::{Deserialize, Serialize};

/// A trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// Whether the destination answered.
    pub reached: bool,
    /// Number of routers up to the destination; `None` if it is not known.
    pub routers: Option<u8>,
    /// Time until the last answer, or until the last wait for one ended.
    pub duration_seconds: f64,
    /// RTT of the destination; `None` if it did not answer.
    pub rtt_seconds: Option<f64>,
    /// The TTL from which on probes are lost up to the destination; `None` if the destination loses none.
    pub first_lossy_hop: Option<u8>,
    /// Whether a device on the way rewrites TTLs, so that hops are not known. Traces that were stored by
    /// versions that did not look for it have no such field.
    #[serde(default)]
    pub ttl_clamped: bool,
    /// The nearest router, or the destination's host, that rejected a probe; `None` if none was rejected.
    #[serde(default)]
    pub rejected: Option<RejectionRecord>,
    /// The hops in the order of their TTL.
    pub hops: Vec<HopRecord>,
}

/// A rejection of a probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RejectionRecord {
    /// TTL of the hop at which it was rejected; `None` if it is not known.
    pub ttl: Option<u8>,
    /// Address of the router or host that rejected it.
    pub address: IpAddr,
    /// Why, [`RejectionReason::as_str`](pathmeter_proto::trace::RejectionReason::as_str).
    pub reason: Cow<'static, str>,
    /// Time from the probe to the error.
    pub rtt_seconds: f64,
}

/// A hop of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HopRecord {
    /// Its TTL.
    pub ttl: u8,
    /// What its answers mean, [`HopState::as_str`](pathmeter_proto::trace::HopState::as_str).
    pub state: Cow<'static, str>,
    /// Probes of this trace.
    pub sent: u16,
    /// Answers of this trace.
    pub answered: usize,
    /// The routers that answered, and the last known one.
    pub responders: Vec<ResponderRecord>,
}

/// A router at a hop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResponderRecord {
    /// Its address.
    pub address: IpAddr,
    /// RTT of its answers.
    pub rtt_seconds: RttRecord,
    /// The label stack of its latest answer, the top first.
    #[serde(default)]
    pub mpls: Vec<LabelRecord>,
    /// The interfaces in its latest answer.
    #[serde(default)]
    pub interfaces: Vec<InterfaceRecord>,
    /// What it last quoted of a probe of the flow; `None` if that is not known.
    #[serde(default)]
    pub quoted: Option<QuotedRecord>,
}

/// The IP header of a probe as a router quoted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotedRecord {
    /// The DSCP with which the probe arrived at the router.
    pub dscp: u8,
    /// The ECN field with which it arrived.
    pub ecn: u8,
    /// `true`: its addresses or ports were translated before. `None`: that is not known; nothing shows that
    /// they were not.
    pub is_translated: Option<bool>,
}

/// An entry of a label stack (RFC 4950).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelRecord {
    /// Label.
    pub label: u32,
    /// Traffic class, formerly called experimental bits.
    pub traffic_class: u8,
    /// Whether it is the last entry.
    pub is_bottom: bool,
    /// Time to live.
    pub ttl: u8,
}

/// An interface of a router (RFC 5837); what is `None` was not told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceRecord {
    /// What the probe had to do with it,
    /// [`InterfaceRole::as_str`](pathmeter_proto::wire::icmp_extensions::InterfaceRole::as_str).
    pub role: Cow<'static, str>,
    /// Index (SNMP `ifIndex`).
    pub index: Option<u32>,
    /// Address.
    pub address: Option<IpAddr>,
    /// Name.
    pub name: Option<String>,
    /// MTU in bytes.
    pub mtu_bytes: Option<u32>,
}

/// RTTs in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RttRecord {
    /// The shortest.
    pub min: f64,
    /// The latest.
    pub last: f64,
}

impl From<&Trace> for TraceRecord {
    fn from(trace: &Trace) -> Self {
        Self {
            reached: trace.rtt.is_some(),
            routers: trace.routers,
            duration_seconds: trace.duration.as_secs_f64(),
            rtt_seconds: trace.rtt.map(|rtt| rtt.as_secs_f64()),
            first_lossy_hop: trace.first_lossy_hop,
            ttl_clamped: trace.is_ttl_clamped,
            rejected: trace.rejection.as_ref().map(RejectionRecord::from),
            hops: trace.hops.iter().map(HopRecord::from).collect(),
        }
    }
}

impl TraceRecord {
    /// The trace with what each router has quoted of the probes of its flow.
    #[must_use]
    pub fn with_quoted(mut self, quoted: impl Fn(IpAddr) -> Option<QuotedRecord>) -> Self {
        for responder in self.hops.iter_mut().flat_map(|hop| &mut hop.responders) {
            responder.quoted = quoted(responder.address);
        }
        self
    }
}

impl From<&QuotedHeader> for QuotedRecord {
    fn from(header: &QuotedHeader) -> Self {
        // Many devices that translate restore the checksum too.
        let is_translated = (header.checksum == QuotedChecksum::Wrong).then_some(true);
        Self { dscp: header.dscp.value(), ecn: header.ecn, is_translated }
    }
}

impl From<&Rejection> for RejectionRecord {
    fn from(rejection: &Rejection) -> Self {
        let Rejection { ttl, address, reason, rtt } = *rejection;
        Self { ttl, address, reason: reason.as_str().into(), rtt_seconds: rtt.as_secs_f64() }
    }
}

impl From<&Hop> for HopRecord {
    fn from(hop: &Hop) -> Self {
        // The shortest and the last RTT of each, and what its last answer said.
        let mut responders: BTreeMap<IpAddr, (Duration, Duration, Option<&AnswerExtensions>)> =
            BTreeMap::new();
        for Answer { router, rtt, extensions } in &hop.answers {
            let (min, last, latest) = responders.entry(*router).or_insert((*rtt, *rtt, None));
            (*min, *last, *latest) = ((*min).min(*rtt), *rtt, extensions.as_deref());
        }
        // Of the last known one, the shortest RTT of all its answers is known.
        responders.extend(
            hop.responder
                .as_ref()
                .map(|known| (known.address, (known.rtt_min, known.rtt_last, known.extensions.as_deref()))),
        );
        let responders = responders.into_iter().map(|(address, (min, last, extensions))| ResponderRecord {
            address,
            rtt_seconds: RttRecord { min: min.as_secs_f64(), last: last.as_secs_f64() },
            mpls: extensions.iter().flat_map(|found| &found.labels).map(LabelRecord::from).collect(),
            interfaces: extensions
                .iter()
                .flat_map(|found| &found.interfaces)
                .map(InterfaceRecord::from)
                .collect(),
            quoted: None,
        });
        Self {
            ttl: hop.ttl,
            state: hop.state.as_str().into(),
            sent: hop.sent,
            answered: hop.answers.len(),
            responders: responders.collect(),
        }
    }
}

impl From<&MplsLabel> for LabelRecord {
    fn from(entry: &MplsLabel) -> Self {
        let MplsLabel { label, traffic_class, is_bottom, ttl } = *entry;
        Self { label, traffic_class, is_bottom, ttl }
    }
}

impl From<&Interface> for InterfaceRecord {
    fn from(interface: &Interface) -> Self {
        let Interface { role, index, address, name, mtu } = interface;
        let (role, name) = (role.as_str().into(), name.clone());
        Self { role, index: *index, address: *address, name, mtu_bytes: *mtu }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pathmeter_proto::time::Timestamp;
    use pathmeter_proto::trace::{HopState, Responder};
    use pathmeter_proto::wire::icmp_extensions::InterfaceRole;

    use super::*;

    #[test]
    fn responder_has_the_labels_and_interfaces_of_its_last_answer() {
        let interface = Interface {
            role: InterfaceRole::Outgoing,
            index: Some(7),
            address: None,
            name: Some("ge-0/0/1".into()),
            mtu: None,
        };
        let extensions = |label: u32| {
            let label = MplsLabel { label, traffic_class: 5, is_bottom: true, ttl: 1 };
            Some(Arc::new(AnswerExtensions { labels: vec![label], interfaces: vec![interface.clone()] }))
        };
        let answer = |last: u8, extensions| Answer {
            extensions,
            ..Answer::new([192, 0, 2, last].into(), Duration::from_millis(1))
        };
        let known = Responder {
            address: [192, 0, 2, 2].into(),
            answers: 9,
            rtt_min: Duration::from_millis(1),
            rtt_last: Duration::from_millis(1),
            answered_at: Timestamp::from_nanos(1),
            extensions: extensions(24_015),
        };
        let answers = vec![answer(1, extensions(16_004)), answer(1, None), answer(3, extensions(16_004))];
        let hop = Hop { ttl: 2, state: HopState::Balanced, sent: 3, answers, responder: Some(known) };
        let hop = HopRecord::from(&hop);
        let label = |label| LabelRecord { label, traffic_class: 5, is_bottom: true, ttl: 1 };
        let labels: Vec<&[LabelRecord]> = hop.responders.iter().map(|found| &found.mpls[..]).collect();
        let expected: [&[LabelRecord]; 3] = [
            // Its label is gone.
            &[],
            // It did not answer this time.
            &[label(24_015)],
            &[label(16_004)],
        ];
        assert_eq!(labels, expected);
        let counts: Vec<usize> = hop.responders.iter().map(|found| found.interfaces.len()).collect();
        assert_eq!(counts, [0, 1, 1]);
        let shown = serde_json::to_value(&hop.responders[1].interfaces[0]).unwrap();
        let expected = serde_json::json!({
            "role": "outgoing", "index": 7, "address": null, "name": "ge-0/0/1", "mtu_bytes": null,
        });
        assert_eq!(shown, expected);
    }
}
