//! Traces as the API shows them, and as they are stored.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use pathmeter_proto::trace::{Hop, Trace};
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
    /// The hops in the order of their TTL.
    pub hops: Vec<HopRecord>,
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
            hops: trace.hops.iter().map(HopRecord::from).collect(),
        }
    }
}

impl From<&Hop> for HopRecord {
    fn from(hop: &Hop) -> Self {
        // The shortest and the last RTT of each.
        let mut responders: BTreeMap<IpAddr, (Duration, Duration)> = BTreeMap::new();
        for (address, rtt) in &hop.answers {
            let (min, last) = responders.entry(*address).or_insert((*rtt, *rtt));
            (*min, *last) = ((*min).min(*rtt), *rtt);
        }
        // Of the last known one, the shortest RTT of all its answers is known.
        responders.extend(hop.responder.map(|known| (known.address, (known.rtt_min, known.rtt_last))));
        let responders = responders.into_iter().map(|(address, (min, last))| ResponderRecord {
            address,
            rtt_seconds: RttRecord { min: min.as_secs_f64(), last: last.as_secs_f64() },
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
