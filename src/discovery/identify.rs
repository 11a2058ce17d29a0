//! Requests the identities of agents that are listed without a name.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::config::Https;
use crate::http::client::{Client, TlsClient, authority};
use crate::identity::Identity;
use crate::identity_poller::fetch_identity;
use crate::poller::{Backoff, KeyedPoller, NextPoll};
use crate::resolver;

/// Chosen: agents of a fleet start together and respond within seconds; those that do not are probably gone.
const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(15), retry: Duration::from_secs(1) };

/// Chosen: short, because an agent is not measured before its name is known.
const SPREAD: Duration = Duration::from_secs(1);

/// An agent that a provider listed without a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnidentifiedAgent {
    /// An IP address or a host name.
    pub host: String,
    /// Its HTTP port.
    pub http_port: u16,
    /// TLS parameters; `None`: plain HTTP.
    pub https: Option<Https>,
}

/// The identity of an agent, or why it is not available.
pub type IdentifyResult = Result<Identity, String>;

/// Requests the identities of unidentified agents in the background, of each until it has responded once.
#[derive(Debug)]
pub struct AgentIdentifier {
    poller: KeyedPoller<UnidentifiedAgent, Option<TlsClient>, IdentifyResult>,
}

impl AgentIdentifier {
    /// An identifier without agents, and the receiver of its results.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(UnidentifiedAgent, IdentifyResult)>) {
        let (poller, results) = KeyedPoller::new(|_| BACKOFF);
        (Self { poller: poller.spread_over(SPREAD) }, results)
    }

    /// Identifies exactly these agents, each with its TLS client, if any. If `client` differs from the last
    /// call, `renew` must be true: it restarts all polls.
    pub fn follow(
        &mut self,
        agents: BTreeMap<UnidentifiedAgent, Option<TlsClient>>,
        client: &Client,
        renew: bool,
    ) {
        if renew {
            self.poller.renew();
        }
        let client = client.clone();
        self.poller.follow(agents, move |agent, secure| {
            let client = Client { secure: secure.clone(), ..client.clone() };
            let (host, port) = (agent.host.clone(), agent.http_port);
            async move {
                let result = identify(&host, port, &client).await;
                let next = if result.is_ok() { NextPoll::Never } else { NextPoll::Retry };
                (result, next)
            }
        });
    }
}

async fn identify(host: &str, port: u16, client: &Client) -> IdentifyResult {
    let addresses = resolver::once(host).await?;
    let address = addresses.first().ok_or_else(|| format!("{host} has no address"))?;
    let result = fetch_identity(client, SocketAddr::new(*address, port), &authority(host, port)).await;
    result.map_err(|error| error.to_string())
}
