//! Agents of whom only the address is known are asked what they are called.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::some_of;
use crate::config::Https;
use crate::http::client::{Client, Secure, authority};
use crate::identity::Identity;
use crate::identity_poller::fetch_identity;
use crate::resolver;

/// Who did not answer is asked again after this, and then after twice as long each time: fleets start together, and the dead
/// stay dead.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(15);

/// The first questions are spread over this, so that a fleet that starts is no storm.
const SPREAD: Duration = Duration::from_secs(1);

/// An agent without a name: where it is asked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnidentifiedAgent {
    /// An IP address or a host name.
    pub host: String,
    /// Its HTTP port.
    pub http_port: u16,
    /// With TLS; `None`: without.
    pub https: Option<Https>,
}

/// What came of asking one.
#[derive(Debug)]
pub struct IdentifyResult {
    /// Whom.
    pub agent: UnidentifiedAgent,
    /// What it says of itself; or why it does not.
    pub identity: Result<Identity, String>,
}

/// Asks agents in the background, each until it has told.
#[derive(Debug)]
pub struct AgentIdentifier {
    tasks: JoinSet<()>,
    told: mpsc::Sender<IdentifyResult>,
    asked: BTreeMap<UnidentifiedAgent, AbortHandle>,
}

impl AgentIdentifier {
    /// Nobody is asked yet; what is told goes to `told`.
    #[must_use]
    pub fn new(told: mpsc::Sender<IdentifyResult>) -> Self {
        Self { tasks: JoinSet::new(), told, asked: BTreeMap::new() }
    }

    /// Asks exactly these; `secure` knows how TLS is spoken. With another `client` than before, `renew` all questions.
    pub fn follow(
        &mut self,
        agents: Vec<UnidentifiedAgent>,
        client: &Client,
        secure: impl Fn(&Https) -> Secure,
        renew: bool,
    ) {
        while self.tasks.try_join_next().is_some() {}
        self.asked.retain(|agent, task| {
            let stays = !renew && agents.contains(agent);
            if !stays {
                task.abort();
            }
            stays
        });
        for agent in agents {
            if !self.asked.contains_key(&agent) {
                let client = Client { secure: agent.https.as_ref().map(&secure), ..client.clone() };
                let task = self.tasks.spawn(ask(agent.clone(), client, self.told.clone()));
                self.asked.insert(agent, task);
            }
        }
    }
}

async fn ask(agent: UnidentifiedAgent, client: Client, told: mpsc::Sender<IdentifyResult>) {
    tokio::time::sleep(some_of(SPREAD)).await;
    let mut again = AGAIN;
    loop {
        let identity = introduce(&agent, &client).await;
        let is_done = identity.is_ok();
        let is_heard = told.send(IdentifyResult { agent: agent.clone(), identity }).await.is_ok();
        if is_done || !is_heard {
            return;
        }
        tokio::time::sleep(again).await;
        again = (2 * again).min(AGAIN_MAX);
    }
}

async fn introduce(agent: &UnidentifiedAgent, client: &Client) -> Result<Identity, String> {
    let UnidentifiedAgent { host, http_port, .. } = agent;
    let addresses = resolver::once(host).await?;
    let address = addresses.first().ok_or_else(|| format!("{host} has no address"))?;
    let asked =
        fetch_identity(client, SocketAddr::new(*address, *http_port), &authority(host, *http_port)).await;
    asked.map_err(|why| why.to_string())
}
