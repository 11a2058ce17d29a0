//! The servers of the agent: the responders and the HTTP port.

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
    /// The responder over UDP.
    pub(super) responder: DatagramHandle,
    /// The responder over TCP.
    pub(super) stream_responder: Arc<StreamResponder>,
    /// The state of the HTTP API.
    pub(super) app_state: Arc<AppState>,
    pub(super) answering: answering::AnsweringHandle,
}

impl Servers {
    /// Applies the settings to the HTTP port.
    pub(super) fn apply_settings(&self, settings: &Settings) {
        // The verifier is kept, because it remembers requests to detect replays.
        match (settings.keys.mesh.as_deref(), self.app_state.verifier.load().as_ref()) {
            (Some(keys), Some(verifier)) => verifier.set_keys(keys),
            (keys, _) => self.app_state.verifier.store(Arc::new(keys.map(Verifier::new))),
        }
        self.app_state.leases.set_rules(settings.config.bandwidth.clone());
        self.app_state.websocket.set_rules(settings.config.websocket.clone());
        if let Some(clients) = self.app_state.websocket.descriptor_shortage() {
            warn!(
                clients,
                "the limit of open files allows fewer WebSocket clients than websocket.clients_max"
            );
        }
        self.apply_web_config(settings);
    }

    /// Applies the web config to new connections of the HTTP port. Open connections do not change.
    pub(super) fn apply_web_config(&self, settings: &Settings) {
        self.app_state.web_config.store(Arc::new(settings.web_config.value.clone()));
    }

    /// Sets the policy and the keys of the responders.
    pub(super) fn set_policy(&self, policy: Policy, settings: &Settings) {
        let keys = &settings.keys;
        self.stream_responder.change(StreamAccess::new(policy.clone(), keys.mesh.as_deref()));
        let access = Access { policy, keys: keys.mesh.clone() };
        self.responder.control(Control::SetAccess(Box::new(access)));
    }

    /// Stops answering measurements. HTTP requests are still answered.
    pub(super) fn stop_answering(&self) {
        self.responder.control(Control::StopAnswering);
        self.app_state.leases.shut_down();
        self.stream_responder.stop_answering();
        self.app_state.websocket.stop_answering();
    }

    /// Stops all servers.
    pub(super) async fn stop(self) {
        self.responder.stop(Duration::ZERO);
        self.answering.stop().await;
    }
}

/// The policy of the responders: which requests they answer.
pub(super) fn policy(config: &Config, ports: Ports, roster: &Roster, addresses: &Addresses) -> Policy {
    let addresses_of = |name: &String| {
        addresses.get(name).and_then(|resolution| resolution.as_ref().ok()).into_iter().flatten()
    };
    // An unidentified agent requests the identity of this agent, as this agent requests its identity.
    let unidentified = roster.unidentified.keys().filter_map(|agent| agent.host.parse::<IpAddr>().ok());
    let peers =
        roster.peers.keys().flat_map(|name| addresses_of(name).copied()).chain(unidentified).collect();
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
