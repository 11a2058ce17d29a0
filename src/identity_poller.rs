//! Asks other agents for their descriptions, at `/api/v1/agent`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::StatusCode;
use tokio::sync::mpsc;

use crate::http::client::{Client, ClientError, TlsClient};
use crate::identity::Identity;
use crate::poller::{Backoff, KeyedPoller, NextPoll};
use crate::tls::Cause;

/// Chosen: labels and versions change rarely, and a peer that has just restarted answers within seconds.
const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(60), retry: Duration::from_secs(15) };

/// Chosen: agents of a fleet that start together know each other before the first minute of measurements is
/// over.
const SPREAD: Duration = Duration::from_secs(2);

/// A peer's description; or why there is none.
pub type IdentityResult = Result<Identity, IdentityError>;

/// Where a peer answers HTTP requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Its HTTP port.
    pub address: SocketAddr,
    /// Host and port as they are configured.
    pub host: String,
    /// With TLS; `None`: without.
    pub secure: Option<TlsClient>,
}

/// Why an agent's description is not known.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The request failed.
    #[error(transparent)]
    Request(#[from] ClientError),
    /// It requires a password or a signature.
    #[error(
        "{address} requires a password; \
         use the same `key_file` on both agents, or remove `basic_auth_users` there"
    )]
    Unauthorized {
        /// The address that was asked.
        address: SocketAddr,
    },
    /// It answered with another status than success.
    #[error("{address} answered {status} at /api/v1/agent")]
    Status {
        /// The address that was asked.
        address: SocketAddr,
        /// The status.
        status: StatusCode,
    },
    /// Its answer is not the description of an agent.
    #[error("{address} is not a pathmeter agent: {source}")]
    NotAnAgent {
        /// The address that was asked.
        address: SocketAddr,
        /// What is wrong with the answer.
        source: serde_json::Error,
    },
}

impl IdentityError {
    /// Whether one side does not trust the other, by TLS or a password: an operator has to change something.
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
    poller: KeyedPoller<String, Endpoint, IdentityResult>,
}

impl IdentityPoller {
    /// A poller of nothing yet, and where results come out: each with the configured name of its peer.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, IdentityResult)>) {
        let (poller, results) = KeyedPoller::new(|_| BACKOFF);
        (Self { poller: poller.spread_over(SPREAD) }, results)
    }

    /// Polls exactly these peers from now on, by name. Where `client` is another than before, `renew` all.
    pub fn follow(&mut self, peers: BTreeMap<String, Endpoint>, client: &Client, renew: bool) {
        if renew {
            self.poller.renew();
        }
        let client = client.clone();
        self.poller.follow(peers, move |_, endpoint| {
            let client = Client { secure: endpoint.secure.clone(), ..client.clone() };
            let (address, host) = (endpoint.address, endpoint.host.clone());
            async move {
                let result = fetch_identity(&client, address, &host).await;
                let next = NextPoll::of(&result);
                (result, next)
            }
        });
    }
}

/// Asks an agent for its description; `host` is its host and port as they are configured.
///
/// # Errors
/// [`IdentityError`] names the agent.
pub async fn fetch_identity(client: &Client, address: SocketAddr, host: &str) -> IdentityResult {
    let answer = client.get(address, host, "/api/v1/agent").await?;
    if answer.status == StatusCode::UNAUTHORIZED {
        return Err(IdentityError::Unauthorized { address });
    }
    if !answer.status.is_success() {
        return Err(IdentityError::Status { address, status: answer.status });
    }
    let identity = serde_json::from_slice(&answer.body);
    identity.map(Identity::sanitized).map_err(|source| IdentityError::NotAnAgent { address, source })
}
