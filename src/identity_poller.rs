//! What the other agents say about themselves.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::StatusCode;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::discovery::some_of;
use crate::http::client::{Client, ClientError, Secure};
use crate::identity::Identity;
use crate::tls::Cause;

/// A peer is asked this often.
const INTERVAL: Duration = Duration::from_secs(60);

/// A peer that did not answer is asked again after this.
const RETRY: Duration = Duration::from_secs(15);

/// The first questions are spread over this, so that a restart of many agents is no storm.
const SPREAD: Duration = Duration::from_secs(2);

/// What a peer said.
#[derive(Debug)]
pub struct IdentityResult {
    /// Its configured name.
    pub name: String,
    /// Its description; or why there is none.
    pub identity: Result<Identity, IdentityError>,
}

/// Where a peer can be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Its HTTP port.
    pub address: SocketAddr,
    /// Host and port as they are configured.
    pub host: String,
    /// With TLS; `None`: without.
    pub secure: Option<Secure>,
}

/// Why an agent's description is not known.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There was no answer.
    #[error(transparent)]
    Request(#[from] ClientError),
    /// It wants to know who asks.
    #[error("{address} wants a password; give both the same key file, or take basic_auth_users away there")]
    Unauthorized {
        /// Who was asked.
        address: SocketAddr,
    },
    /// There was another one.
    #[error("{address} answered {status} at /api/v1/agent")]
    Status {
        /// Who was asked.
        address: SocketAddr,
        /// The status.
        status: StatusCode,
    },
    /// There was one that is no description.
    #[error("{address} is no pathmeter: {source}")]
    NotAnAgent {
        /// Who was asked.
        address: SocketAddr,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl IdentityError {
    /// Whether somebody there does not believe us, or we do not believe it: that does not pass by itself.
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

/// Asks peers in the background. Losing this never stops a measurement.
#[derive(Debug)]
pub struct IdentityPoller {
    tasks: JoinSet<()>,
    told: mpsc::Sender<IdentityResult>,
    asked: BTreeMap<String, (Endpoint, AbortHandle)>,
}

impl IdentityPoller {
    /// An inquirer that passes on what it is told.
    #[must_use]
    pub fn new(told: mpsc::Sender<IdentityResult>) -> Self {
        Self { tasks: JoinSet::new(), told, asked: BTreeMap::new() }
    }

    /// Asks exactly these peers, by name. With another `client` than before, `renew` all questions.
    pub fn follow(&mut self, peers: &BTreeMap<String, Endpoint>, client: &Client, renew: bool) {
        while self.tasks.try_join_next().is_some() {}
        self.asked.retain(|name, (endpoint, task)| {
            let stays = !renew && peers.get(name) == Some(endpoint);
            if !stays {
                task.abort();
            }
            stays
        });
        for (name, endpoint) in peers {
            if !self.asked.contains_key(name) {
                let client = Client { secure: endpoint.secure.clone(), ..client.clone() };
                let task = self.tasks.spawn(ask(name.clone(), endpoint.clone(), client, self.told.clone()));
                self.asked.insert(name.clone(), (endpoint.clone(), task));
            }
        }
    }
}

async fn ask(name: String, endpoint: Endpoint, client: Client, told: mpsc::Sender<IdentityResult>) {
    tokio::time::sleep(some_of(SPREAD)).await;
    loop {
        let identity = fetch_identity(&client, endpoint.address, &endpoint.host).await;
        let pause = if identity.is_ok() { INTERVAL } else { RETRY };
        if told.send(IdentityResult { name: name.clone(), identity }).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Asks an agent for its description; `host` is what it is called, with its port.
///
/// # Errors
/// A sentence that names it.
pub async fn fetch_identity(
    client: &Client,
    address: SocketAddr,
    host: &str,
) -> Result<Identity, IdentityError> {
    let answer = client.get(address, host, "/api/v1/agent").await?;
    if answer.status == StatusCode::UNAUTHORIZED {
        return Err(IdentityError::Unauthorized { address });
    }
    if !answer.status.is_success() {
        return Err(IdentityError::Status { address, status: answer.status });
    }
    let identity = serde_json::from_slice(&answer.body);
    identity.map(Identity::tamed).map_err(|source| IdentityError::NotAnAgent { address, source })
}
