//! Requests the identities of other agents, at `/api/v1/agent`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::http::client::{Client, ClientError, TlsClient};
use crate::identity::Identity;
use crate::poller::{Backoff, KeyedPoller, NextPoll};
use crate::route_record::{ROUTES_MAX, RouteRecord};
use crate::tls::Cause;

/// Chosen: labels and versions change rarely, and a peer that has just restarted answers within seconds.
const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(60), retry: Duration::from_secs(15) };

/// Chosen: agents that start together know each other within the first minute of measurements.
const SPREAD: Duration = Duration::from_secs(2);

/// What a peer reports about itself, or why that is not available.
pub type ReportResult = Result<PeerReport, IdentityError>;

/// What a peer reports about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerReport {
    /// Its identity.
    pub identity: Identity,
    /// The routes of its flows to this agent; empty if it does not trace them.
    pub routes: Vec<RouteRecord>,
}

/// Maximum bytes of a report. Chosen: twice what an agent sends of its routes,
/// [`ROUTES_BYTES_MAX`](crate::route_record::ROUTES_BYTES_MAX).
const REPORT_BYTES_MAX: usize = 512 * 1024;

/// The HTTP endpoint of a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// The address and the HTTP port.
    pub address: SocketAddr,
    /// The configured host and port, for the `Host` header.
    pub host: String,
    /// The TLS client; `None`: plain HTTP.
    pub secure: Option<TlsClient>,
}

/// Why the identity of an agent is not available.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The request failed.
    #[error(transparent)]
    Request(#[from] ClientError),
    /// The agent requires a password or a signature.
    #[error(
        "{address} requires a password; \
         use the same `key_file` on both agents, or remove `basic_auth_users` there"
    )]
    Unauthorized {
        /// The address of the agent.
        address: SocketAddr,
    },
    /// The response has a status other than success.
    #[error("{address} responded with {status} to /api/v1/agent")]
    Status {
        /// The address of the agent.
        address: SocketAddr,
        /// The status code.
        status: StatusCode,
    },
    /// The response is not the identity of an agent.
    #[error("{address} is not a pathmeter agent: {source}")]
    NotAnAgent {
        /// The address of the agent.
        address: SocketAddr,
        /// What is wrong with the response.
        source: serde_json::Error,
    },
}

impl IdentityError {
    /// Whether one side does not trust the other, because of TLS or a password. An operator has to correct
    /// this.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Request(ClientError::Tls { source, .. }) => match source.cause {
                Cause::Io => false,
                Cause::Expired
                | Cause::NotYetValid
                | Cause::UnknownIssuer
                | Cause::WrongName
                | Cause::BadCertificate
                | Cause::ClientCertificateRequired
                | Cause::ClientCertificateRefused
                | Cause::NotTls
                | Cause::Protocol => true,
            },
            Self::Unauthorized { .. } => true,
            Self::Request(
                ClientError::Invalid { .. }
                | ClientError::Unsigned { .. }
                | ClientError::Connect { .. }
                | ClientError::Timeout { .. }
                | ClientError::TooLarge { .. }
                | ClientError::Protocol { .. },
            )
            | Self::Status { .. }
            | Self::NotAnAgent { .. } => false,
        }
    }
}

/// Polls the identities of peers in the background. Measurements do not depend on it.
#[derive(Debug)]
pub struct IdentityPoller {
    poller: KeyedPoller<String, Endpoint, ReportResult>,
}

impl IdentityPoller {
    /// A poller without peers, and the receiver of its results, each with the configured name of the peer.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, ReportResult)>) {
        let (poller, results) = KeyedPoller::new(|_| BACKOFF);
        (Self { poller: poller.spread_over(SPREAD) }, results)
    }

    /// Polls exactly these peers, by name, as the agent `own_name`. If `client` or `own_name` differs from
    /// the last call, `renew` must be true: it restarts all polls.
    pub fn follow(
        &mut self,
        peers: BTreeMap<String, Endpoint>,
        client: &Client,
        own_name: &str,
        renew: bool,
    ) {
        if renew {
            self.poller.renew();
        }
        let client = Client { answer_bytes_max: REPORT_BYTES_MAX, ..client.clone() };
        let own_name = own_name.to_owned();
        self.poller.follow(peers, move |peer, endpoint| {
            let client = Client { secure: endpoint.secure.clone(), ..client.clone() };
            let (address, host) = (endpoint.address, endpoint.host.clone());
            let (peer, own_name) = (peer.clone(), own_name.clone());
            async move {
                let result = fetch_report(&client, address, &host, &peer, &own_name).await;
                let next = NextPoll::of(&result);
                (result, next)
            }
        });
    }
}

/// Requests what the agent `peer` reports to the agent `own_name`.
async fn fetch_report(
    client: &Client,
    address: SocketAddr,
    host: &str,
    peer: &str,
    own_name: &str,
) -> ReportResult {
    /// Agents of other versions may report other fields.
    #[derive(Deserialize)]
    struct Response {
        #[serde(flatten)]
        identity: Identity,
        #[serde(default)]
        routes: Value,
    }
    let body = fetch(client, address, host, &format!("/api/v1/agent?routes_to={own_name}")).await?;
    let Response { identity, routes } =
        serde_json::from_slice(&body).map_err(|source| IdentityError::NotAnAgent { address, source })?;
    let routes = routes.as_array().map_or(&[][..], |routes| routes);
    let records = routes.iter().take(ROUTES_MAX).filter_map(|record| RouteRecord::deserialize(record).ok());
    let is_valid = |record: &RouteRecord| record.is_valid_report(peer, own_name);
    Ok(PeerReport { identity: identity.sanitized(), routes: records.filter(is_valid).collect() })
}

/// Requests the identity of an agent. `host` is the configured host and port.
///
/// # Errors
/// [`IdentityError`] with the address of the agent.
pub async fn fetch_identity(
    client: &Client,
    address: SocketAddr,
    host: &str,
) -> Result<Identity, IdentityError> {
    let body = fetch(client, address, host, "/api/v1/agent").await?;
    let identity = serde_json::from_slice(&body);
    identity.map(Identity::sanitized).map_err(|source| IdentityError::NotAnAgent { address, source })
}

/// The body of a successful response.
async fn fetch(client: &Client, address: SocketAddr, host: &str, path: &str) -> Result<Bytes, IdentityError> {
    let response = client.get(address, host, path).await?;
    if response.status == StatusCode::UNAUTHORIZED {
        return Err(IdentityError::Unauthorized { address });
    }
    if !response.status.is_success() {
        return Err(IdentityError::Status { address, status: response.status });
    }
    Ok(response.body)
}
