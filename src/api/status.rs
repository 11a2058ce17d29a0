//! What the daemon shows of itself: a snapshot that the HTTP server reads.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pathmeter_proto::admission::Policy;
use serde::Serialize;

use crate::config::WebSocket;
use crate::identity::{Answers, Ports};
use crate::metrics::echo::EchoSeries;
use crate::metrics::path_mtu::PathMtuSeries;

/// The daemon at one moment.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Our name.
    pub name: String,
    /// Our labels.
    pub labels: BTreeMap<String, String>,
    /// Which of our lives this is.
    pub boot_id: u64,
    /// Where we listen.
    pub ports: Option<Ports>,
    /// Whom we answer.
    pub policy: Policy,
    /// Whether requests must, or can, be authenticated.
    pub has_key: bool,
    /// Everything that should be measured.
    pub paths: Vec<PathStatus>,
    /// Who is asked for peers and targets.
    pub providers: Vec<ProviderStatus>,
    /// Whether we are on our way out.
    pub is_stopping: bool,
}

/// A provider of peers or targets, as `/api/v1/discovery` shows it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ProviderStatus {
    /// What it is called.
    pub name: String,
    /// Of its last answer.
    pub members: usize,
    /// When that was, in nanoseconds since 1970; 0: there was none.
    #[serde(rename = "last_success_timestamp_seconds", serialize_with = "as_seconds")]
    pub last_success: u64,
    /// How often it did not answer.
    pub failures: u64,
    /// Why it did not answer the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Members whose names are not known, and why.
    pub unnamed: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it")]
fn as_seconds<S: serde::Serializer>(nanos: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    #[expect(clippy::cast_precision_loss, reason = "a time for people, to the microsecond")]
    serializer.serialize_f64(*nanos as f64 / 1e9)
}

/// What a request's signature proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// There is none.
    None,
    /// The caller knows the mesh key.
    Given,
    /// It knows another key.
    WrongKey,
    /// It signed, and we have no key.
    NoKeyHere,
    /// It signed in a way that proves nothing; why.
    Doubtful(String),
}

/// One path.
#[derive(Debug, Clone)]
pub struct PathStatus {
    /// The configured probe.
    pub probe: Arc<str>,
    /// The peer or target.
    pub peer: Arc<str>,
    /// Address family; `auto` while there is no address.
    pub family: &'static str,
    /// Where to; `None` while there is no address.
    pub to: Option<SocketAddr>,
    /// Where from, for each flow.
    pub sources: Vec<SocketAddr>,
    /// What it has measured; `None` while it is not measured.
    pub series: Option<Arc<EchoSeries>>,
    /// What was found of its MTU; `None` where that is not looked for.
    pub path_mtu: Option<Arc<PathMtuSeries>>,
    /// Why it is not measured, or why nothing may come back.
    pub reason: Option<String>,
}

/// A path as `/api/v1/paths` shows it.
#[derive(Debug, Serialize)]
pub struct PathView {
    probe: String,
    peer: String,
    family: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    sources: Vec<String>,
    /// `measured`, `draining` or `not_measured`.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    counts: Option<Counts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_reply_timestamp_seconds: Option<f64>,
    path_mtu_bytes: Option<u16>,
}

#[derive(Debug, Serialize)]
struct Counts {
    sent: u64,
    decided: u64,
    ok: u64,
    lost: Lost,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    send_errors: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    icmp_errors: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct Lost {
    forward: u64,
    reverse: u64,
    unknown: u64,
}

impl PathStatus {
    /// As it is shown.
    #[must_use]
    pub fn view(&self) -> PathView {
        let state = match &self.series {
            None => "not_measured",
            Some(series) if series.is_draining() => "draining",
            Some(_) => "measured",
        };
        #[expect(clippy::cast_precision_loss, reason = "a time for people, to the microsecond")]
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let last = self.series.as_ref().map(|series| series.last_reply()).filter(|at| *at > 0);
        PathView {
            probe: self.probe.to_string(),
            peer: self.peer.to_string(),
            family: self.family,
            address: self.to.map(|to| to.to_string()),
            sources: self.sources.iter().map(SocketAddr::to_string).collect(),
            state,
            reason: self.reason.clone().or_else(|| self.series.as_deref().and_then(refused_by_our_host)),
            counts: self.series.as_deref().map(Counts::of),
            last_reply_timestamp_seconds: last.map(seconds),
            path_mtu_bytes: self.path_mtu.as_ref().and_then(|found| found.bytes()),
        }
    }
}

/// Why nothing leaves, when nothing ever did.
fn refused_by_our_host(series: &EchoSeries) -> Option<String> {
    let (error, count) = series.send_errors().max_by_key(|(_, count)| *count)?;
    let nothing_left = series.sent.get() == 0;
    nothing_left.then(|| format!("our host sends none of its datagrams: {error:?}, {count} times"))
}

impl Counts {
    fn of(series: &EchoSeries) -> Self {
        let [forward, reverse, unknown] = series.lost();
        Self {
            sent: series.sent.get(),
            decided: series.decided(),
            ok: series.ok.get(),
            lost: Lost { forward, reverse, unknown },
            send_errors: series.send_errors().map(|(error, count)| (format!("{error:?}"), count)).collect(),
            icmp_errors: series.icmp_errors().map(|(kind, count)| (format!("{kind:?}"), count)).collect(),
        }
    }
}

impl Status {
    /// Whether STAMP requests from `caller` would be answered, as it asks now.
    #[must_use]
    pub fn answers(&self, caller: IpAddr, proof: &Proof) -> Answers {
        let refused = |why: String| Answers { answers: false, reason: Some(why) };
        let name = &self.name;
        match proof {
            Proof::Given => Answers { answers: true, reason: None },
            Proof::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            Proof::NoKeyHere => refused(format!(
                "{name} has no key and cannot answer authenticated requests of {caller}: give it the key file, or ask without one"
            )),
            Proof::Doubtful(refusal) => {
                refused(format!("{name} cannot tell whether {caller} knows the key: the signature {refusal}"))
            }
            Proof::None if self.policy.lists(caller) => Answers { answers: true, reason: None },
            Proof::None if self.has_key => refused(format!(
                "{name} does not answer {caller}: add it to responder.allow there, or pass --key-file"
            )),
            Proof::None => {
                refused(format!("{name} does not answer {caller}: add it to responder.allow there"))
            }
        }
    }

    /// Whether messages of `caller` at `/ws` would be sent back, as it asks now.
    #[must_use]
    pub fn answers_websocket(&self, rules: &WebSocket, caller: IpAddr, proof: &Proof) -> Answers {
        let refused = |why: String| Answers { answers: false, reason: Some(why) };
        let name = &self.name;
        if !rules.enabled {
            return refused(format!("{name} has websocket.enabled: false"));
        }
        // A signature that proves nothing takes nothing away from what an address may.
        if rules.open || caller.to_canonical().is_loopback() || self.policy.lists(caller) {
            return Answers { answers: true, reason: None };
        }
        let remedy = "add it to responder.allow there, or set websocket.open";
        match proof {
            Proof::Given => Answers { answers: true, reason: None },
            Proof::None if self.has_key => refused(format!(
                "{name} does not answer {caller} at /ws: {remedy}, or sign the request with the mesh key"
            )),
            Proof::None => refused(format!("{name} does not answer {caller} at /ws: {remedy}")),
            Proof::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            Proof::NoKeyHere => {
                refused(format!("{name} has no key and does not answer {caller} at /ws: {remedy}"))
            }
            Proof::Doubtful(refusal) => {
                refused(format!("{name} cannot tell whether {caller} knows the key: the signature {refusal}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Host};

    #[test]
    fn loopback_listed_addresses_and_keys_are_admitted_to_websockets() {
        let rules = |yaml: &str| {
            let host = Host { name_override: None, hostname: "fra-1".to_owned(), labels: BTreeMap::new() };
            config::load(format!("websocket: {{{yaml}}}").as_bytes(), &host).unwrap().config.websocket
        };
        let near: IpAddr = "::1".parse().unwrap();
        let (listed, unlisted): (IpAddr, IpAddr) =
            ("198.51.100.1".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let mut status = Status { name: "fra-1".into(), has_key: true, ..Status::default() };
        status.policy.prefixes = vec!["198.51.100.0/24".parse().unwrap()];
        let proofs =
            [Proof::None, Proof::Given, Proof::WrongKey, Proof::NoKeyHere, Proof::Doubtful("x".into())];
        for (yaml, caller, expected) in [
            ("", near, [true; 5]),
            ("", listed, [true; 5]),
            ("", unlisted, [false, true, false, false, false]),
            ("open: true", unlisted, [true; 5]),
            ("enabled: false, open: true", near, [false; 5]),
        ] {
            for (proof, expected) in proofs.iter().zip(expected) {
                let answers = status.answers_websocket(&rules(yaml), caller, proof);
                assert_eq!(answers.answers, expected, "{yaml}: {caller} with {proof:?}");
                assert_eq!(answers.reason.is_none(), expected, "{yaml}: {caller} with {proof:?}");
            }
        }
        assert_eq!(
            status.answers_websocket(&rules(""), unlisted, &Proof::None).reason.unwrap(),
            "fra-1 does not answer 192.0.2.1 at /ws: add it to responder.allow there, or set websocket.open, \
             or sign the request with the mesh key"
        );
    }
}
