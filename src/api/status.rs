//! Snapshot of the daemon's status, from which the HTTP server answers requests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use pathmeter_proto::admission::Policy;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::WebSocketRules;
use crate::fleet::PathStatus;
use crate::identity::{Ports, WouldAnswer};
use crate::probe::Measured;
use crate::route_record::RouteRecord;

/// State of the daemon at one moment.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Name of this agent.
    pub name: String,
    /// Labels of this agent.
    pub labels: BTreeMap<String, String>,
    /// Random number of this run of the agent; it changes with each restart.
    pub boot_id: u64,
    /// Ports on which the agent listens; `None` while it starts.
    pub ports: Option<Ports>,
    /// Addresses that the responder answers.
    pub policy: Policy,
    /// Whether a mesh key is configured, so that requests can be authenticated.
    pub has_key: bool,
    /// All desired paths, measured or not.
    pub paths: Vec<PathStatus>,
    /// The routes that peers report, of their flows to this agent, by peer.
    pub reported_routes: Vec<Arc<[RouteRecord]>>,
    /// Discovery providers of peers and targets.
    pub providers: Vec<ProviderStatus>,
    /// Where events, traces and budgets are stored.
    pub state_dir: StateDirStatus,
    /// Whether the agent is shutting down.
    pub is_stopping: bool,
}

/// Where events, traces and budgets are stored, as shown by `/api/v1/agent`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StateDirStatus {
    /// The folder; `None`: they are kept in memory only.
    pub directory: Option<PathBuf>,
    /// Why they cannot be stored at the moment; `None` if they can.
    pub error: Option<String>,
}

/// A discovery provider, as shown by `/api/v1/discovery`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ProviderStatus {
    /// Name of the provider.
    pub name: String,
    /// Members in its last successful result.
    pub members: usize,
    /// Time of the last successful poll in nanoseconds since the Unix epoch; 0 if there was none.
    #[serde(rename = "last_success_timestamp_seconds", serialize_with = "as_seconds")]
    pub last_success: u64,
    /// Failed polls.
    pub failures: u64,
    /// Why the last poll failed; `None` if it succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Members whose agent names are not known, with the reason.
    pub unidentified: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "signature required by serde")]
fn as_seconds<S: serde::Serializer>(nanos: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    #[expect(clippy::cast_precision_loss, reason = "displayed only; exact to a microsecond")]
    serializer.serialize_f64(*nanos as f64 / 1e9)
}

/// Result of verifying a request's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureStatus {
    /// The request is not signed.
    None,
    /// Signed with the mesh key.
    Valid,
    /// Signed with a different key.
    WrongKey,
    /// Signed, but this agent has no key.
    NoLocalKey,
    /// The signature could not be verified, for this reason.
    Unverifiable(String),
}

/// A path, as shown by `/api/v1/paths`.
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
    /// Fields specific to its probe kind.
    #[serde(flatten)]
    kind_fields: Map<String, Value>,
}

impl From<&PathStatus> for PathView {
    fn from(path: &PathStatus) -> Self {
        let measured = path.measured.as_deref();
        let state = match measured {
            None => "not_measured",
            Some(measured) if measured.is_draining() => "draining",
            Some(_) => "measured",
        };
        #[expect(clippy::cast_precision_loss, reason = "displayed only; exact to a microsecond")]
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
            kind_fields: measured.map(Measured::json).unwrap_or_default(),
        }
    }
}

impl Status {
    /// Returns whether STAMP requests from `caller`, authenticated like this request, would be answered.
    #[must_use]
    pub fn answers(&self, caller: IpAddr, proof: &SignatureStatus) -> WouldAnswer {
        let refused = |reason: String| WouldAnswer { answers: false, reason: Some(reason) };
        let name = &self.name;
        match proof {
            SignatureStatus::Valid => WouldAnswer { answers: true, reason: None },
            SignatureStatus::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            SignatureStatus::NoLocalKey => refused(format!(
                "{name} has no key and cannot answer authenticated requests of {caller}: configure the key file there, or send requests without a key"
            )),
            SignatureStatus::Unverifiable(refusal) => {
                refused(format!("{name} cannot verify the signature of {caller}: the request {refusal}"))
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

    /// Returns whether a WebSocket at `/ws` from `caller`, authenticated like this request, would be
    /// accepted.
    #[must_use]
    pub fn answers_websocket(
        &self,
        rules: &WebSocketRules,
        caller: IpAddr,
        proof: &SignatureStatus,
    ) -> WouldAnswer {
        let refused = |reason: String| WouldAnswer { answers: false, reason: Some(reason) };
        let name = &self.name;
        if !rules.enabled {
            return refused(format!("{name} has websocket.enabled: false"));
        }
        // An unverifiable signature does not revoke what the address is allowed.
        if rules.open || caller.to_canonical().is_loopback() || self.policy.lists(caller) {
            return WouldAnswer { answers: true, reason: None };
        }
        let remedy = "add it to responder.allow there, or set websocket.open";
        match proof {
            SignatureStatus::Valid => WouldAnswer { answers: true, reason: None },
            SignatureStatus::None if self.has_key => refused(format!(
                "{name} does not answer {caller} at /ws: {remedy}, or sign the request with the mesh key"
            )),
            SignatureStatus::None => refused(format!("{name} does not answer {caller} at /ws: {remedy}")),
            SignatureStatus::WrongKey => {
                refused(format!("{name} does not know the key of {caller}: give both the same key file"))
            }
            SignatureStatus::NoLocalKey => {
                refused(format!("{name} has no key and does not answer {caller} at /ws: {remedy}"))
            }
            SignatureStatus::Unverifiable(refusal) => {
                refused(format!("{name} cannot verify the signature of {caller}: the request {refusal}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, LoadContext};

    #[test]
    fn loopback_listed_addresses_and_keys_may_open_websockets() {
        let rules = |yaml: &str| {
            let host = LoadContext {
                name_override: None,
                hostname: "fra-1".to_owned(),
                labels: BTreeMap::new(),
                state_dir: None,
            };
            config::load(format!("websocket: {{{yaml}}}").as_bytes(), &host).unwrap().config.websocket
        };
        let near: IpAddr = "::1".parse().unwrap();
        let (listed, unlisted): (IpAddr, IpAddr) =
            ("198.51.100.1".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let mut status = Status { name: "fra-1".into(), has_key: true, ..Status::default() };
        status.policy.prefixes = vec!["198.51.100.0/24".parse().unwrap()];
        let proofs = [
            SignatureStatus::None,
            SignatureStatus::Valid,
            SignatureStatus::WrongKey,
            SignatureStatus::NoLocalKey,
            SignatureStatus::Unverifiable("x".into()),
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
