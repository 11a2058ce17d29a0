//! What the daemon shows of itself: a snapshot that the HTTP server reads.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use pathmeter_proto::admission::Policy;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::WebSocketRules;
use crate::fleet::PathStatus;
use crate::identity::{Ports, WouldAnswer};
use crate::probe::Measured;

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
    pub unidentified: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it")]
fn as_seconds<S: serde::Serializer>(nanos: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    #[expect(clippy::cast_precision_loss, reason = "a time for people, to the microsecond")]
    serializer.serialize_f64(*nanos as f64 / 1e9)
}

/// What a request's signature proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureStatus {
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
    last_reply_timestamp_seconds: Option<f64>,
    /// What only its kind of probe has.
    #[serde(flatten)]
    of_kind: Map<String, Value>,
}

impl From<&PathStatus> for PathView {
    fn from(path: &PathStatus) -> Self {
        let measured = path.measured.as_deref();
        let state = match measured {
            None => "not_measured",
            Some(measured) if measured.is_draining() => "draining",
            Some(_) => "measured",
        };
        #[expect(clippy::cast_precision_loss, reason = "a time for people, to the microsecond")]
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let last = measured.map(Measured::last_reply).filter(|at| *at > 0);
        Self {
            probe: path.key.probe.to_string(),
            peer: path.key.peer.to_string(),
            family: path.key.family,
            address: path.to.map(|to| to.to_string()),
            sources: path.sources.iter().map(SocketAddr::to_string).collect(),
            state,
            reason: path.reason.clone().or_else(|| measured.and_then(Measured::local_failure)),
            last_reply_timestamp_seconds: last.map(seconds),
            of_kind: measured.map(Measured::json).unwrap_or_default(),
        }
    }
}

impl Status {
    /// Whether STAMP requests from `caller` would be answered, as it asks now.
    #[must_use]
    pub fn answers(&self, caller: IpAddr, proof: &SignatureStatus) -> WouldAnswer {
        let refused = |why: String| WouldAnswer { answers: false, reason: Some(why) };
        let name = &self.name;
        match proof {
            SignatureStatus::Given => WouldAnswer { answers: true, reason: None },
            SignatureStatus::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            SignatureStatus::NoKeyHere => refused(format!(
                "{name} has no key and cannot answer authenticated requests of {caller}: give it the key file, or ask without one"
            )),
            SignatureStatus::Doubtful(refusal) => {
                refused(format!("{name} cannot tell whether {caller} knows the key: the signature {refusal}"))
            }
            SignatureStatus::None if self.policy.lists(caller) => WouldAnswer { answers: true, reason: None },
            SignatureStatus::None if self.has_key => refused(format!(
                "{name} does not answer {caller}: add it to responder.allow there, or pass --key-file"
            )),
            SignatureStatus::None => {
                refused(format!("{name} does not answer {caller}: add it to responder.allow there"))
            }
        }
    }

    /// Whether messages of `caller` at `/ws` would be sent back, as it asks now.
    #[must_use]
    pub fn answers_websocket(
        &self,
        rules: &WebSocketRules,
        caller: IpAddr,
        proof: &SignatureStatus,
    ) -> WouldAnswer {
        let refused = |why: String| WouldAnswer { answers: false, reason: Some(why) };
        let name = &self.name;
        if !rules.enabled {
            return refused(format!("{name} has websocket.enabled: false"));
        }
        // A signature that proves nothing takes nothing away from what an address may.
        if rules.open || caller.to_canonical().is_loopback() || self.policy.lists(caller) {
            return WouldAnswer { answers: true, reason: None };
        }
        let remedy = "add it to responder.allow there, or set websocket.open";
        match proof {
            SignatureStatus::Given => WouldAnswer { answers: true, reason: None },
            SignatureStatus::None if self.has_key => refused(format!(
                "{name} does not answer {caller} at /ws: {remedy}, or sign the request with the mesh key"
            )),
            SignatureStatus::None => refused(format!("{name} does not answer {caller} at /ws: {remedy}")),
            SignatureStatus::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            SignatureStatus::NoKeyHere => {
                refused(format!("{name} has no key and does not answer {caller} at /ws: {remedy}"))
            }
            SignatureStatus::Doubtful(refusal) => {
                refused(format!("{name} cannot tell whether {caller} knows the key: the signature {refusal}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, LoadContext};

    #[test]
    fn loopback_listed_addresses_and_keys_are_admitted_to_websockets() {
        let rules = |yaml: &str| {
            let host =
                LoadContext { name_override: None, hostname: "fra-1".to_owned(), labels: BTreeMap::new() };
            config::load(format!("websocket: {{{yaml}}}").as_bytes(), &host).unwrap().config.websocket
        };
        let near: IpAddr = "::1".parse().unwrap();
        let (listed, unlisted): (IpAddr, IpAddr) =
            ("198.51.100.1".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let mut status = Status { name: "fra-1".into(), has_key: true, ..Status::default() };
        status.policy.prefixes = vec!["198.51.100.0/24".parse().unwrap()];
        let proofs = [
            SignatureStatus::None,
            SignatureStatus::Given,
            SignatureStatus::WrongKey,
            SignatureStatus::NoKeyHere,
            SignatureStatus::Doubtful("x".into()),
        ];
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
            status.answers_websocket(&rules(""), unlisted, &SignatureStatus::None).reason.unwrap(),
            "fra-1 does not answer 192.0.2.1 at /ws: add it to responder.allow there, or set websocket.open, \
             or sign the request with the mesh key"
        );
    }
}
