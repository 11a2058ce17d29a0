//! Everything that answers: the responders and the HTTP port.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::wire::stamp;
use tracing::warn;

use crate::answering;
use crate::api::routes::AppState;
use crate::config::Config;
use crate::datagram::{Access, Control, DatagramHandle};
use crate::fleet::Addresses;
use crate::http::auth::Verifier;
use crate::identity::Ports;
use crate::roster::Roster;
use crate::settings::Settings;
use crate::stream::responder::{StreamAccess, StreamResponder};

/// The servers of a running agent.
#[derive(Debug)]
pub(super) struct Servers {
    /// Answers datagrams.
    pub(super) responder: DatagramHandle,
    /// Answers messages over TCP.
    pub(super) stream_responder: Arc<StreamResponder>,
    /// What HTTP requests are answered with.
    pub(super) app_state: Arc<AppState>,
    pub(super) answering: answering::AnsweringHandle,
}

impl Servers {
    /// Makes the HTTP port agree with the settings.
    pub(super) fn apply_settings(&self, settings: &Settings) {
        // A verifier goes on remembering which requests it has seen.
        match (settings.keys.mesh.as_deref(), self.app_state.verifier.load().as_ref()) {
            (Some(keys), Some(verifier)) => verifier.set_keys(keys),
            (keys, _) => self.app_state.verifier.store(Arc::new(keys.map(Verifier::new))),
        }
        self.app_state.websocket.set_rules(settings.config.websocket.clone());
        if let Some(clients) = self.app_state.websocket.shortage() {
            warn!(
                clients,
                "the limit of open files allows fewer WebSocket clients than websocket.clients_max"
            );
        }
        self.serve(settings);
    }

    /// Serves new connections of the HTTP port as the web config file says; open ones stay as they are.
    pub(super) fn serve(&self, settings: &Settings) {
        self.app_state.web_config.store(Arc::new(settings.web_config.value.clone()));
    }

    /// Answers whom `policy` lists.
    pub(super) fn set_policy(&self, policy: Policy, settings: &Settings) {
        let keys = &settings.keys;
        self.stream_responder.change(StreamAccess::new(policy.clone(), keys.mesh.as_deref()));
        let access = Access { policy, keys: keys.mesh.clone() };
        self.responder.control(Control::SetAccess(Box::new(access)));
    }

    /// Stops answering measurements. HTTP requests are still answered.
    pub(super) fn stop_replying(&self) {
        self.responder.control(Control::StopAnswering);
        self.stream_responder.stop_replying();
        self.app_state.websocket.stop_replying();
    }

    /// Closes everything.
    pub(super) async fn stop(self) {
        self.responder.stop(Duration::ZERO);
        self.answering.stop().await;
    }
}

/// Whom the responders answer.
pub(super) fn policy(config: &Config, ports: Ports, roster: &Roster, addresses: &Addresses) -> Policy {
    let of = |name: &String| addresses.get(name).and_then(|found| found.as_ref().ok()).into_iter().flatten();
    // An agent without a name yet asks for ours as we ask for its.
    let unidentified = roster.unidentified.keys().filter_map(|agent| agent.host.parse::<IpAddr>().ok());
    let peers = roster.peers.keys().flat_map(|name| of(name).copied()).chain(unidentified).collect();
    let others = roster.peers.values().map(|peer| peer.stamp_port);
    let targets = roster.targets.values().map(|target| target.port);
    let own = [ports.stamp, ports.agent, stamp::PORT];
    Policy {
        open: config.responder.open,
        peers,
        prefixes: config.responder.allow.clone(),
        reflector_ports: own.into_iter().chain(others).chain(targets).collect(),
        rate: config.responder.rate,
        rate_per_source: config.responder.rate_per_source,
    }
}
