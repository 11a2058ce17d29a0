//! What the other agents say about themselves.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::http::client::Client;
use crate::identity::Identity;

/// A peer is asked this often.
const ASK_EVERY: Duration = Duration::from_secs(60);

/// A peer that did not answer is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(15);

/// The first questions are spread over this, so that a restart of many agents is no storm.
const SPREAD: Duration = Duration::from_secs(2);

/// What a peer said.
#[derive(Debug)]
pub struct Told {
    /// Its configured name.
    pub name: String,
    /// Its description; or why there is none.
    pub identity: Result<Identity, String>,
}

/// Asks peers in the background. Losing this never stops a measurement.
#[derive(Debug)]
pub struct Inquirer {
    tasks: JoinSet<()>,
    told: mpsc::Sender<Told>,
    asked: BTreeMap<String, (SocketAddr, AbortHandle)>,
}

impl Inquirer {
    /// An inquirer that passes on what it is told.
    #[must_use]
    pub fn new(told: mpsc::Sender<Told>) -> Self {
        Self { tasks: JoinSet::new(), told, asked: BTreeMap::new() }
    }

    /// Asks exactly these peers, by name and HTTP address. With another `client` than before, `renew` all questions.
    pub fn follow(&mut self, peers: &BTreeMap<String, SocketAddr>, client: &Client, renew: bool) {
        while self.tasks.try_join_next().is_some() {}
        self.asked.retain(|name, (address, task)| {
            let stays = !renew && peers.get(name) == Some(address);
            if !stays {
                task.abort();
            }
            stays
        });
        for (name, address) in peers {
            if !self.asked.contains_key(name) {
                let task = self.tasks.spawn(ask(name.clone(), *address, client.clone(), self.told.clone()));
                self.asked.insert(name.clone(), (*address, task));
            }
        }
    }
}

async fn ask(name: String, address: SocketAddr, client: Client, told: mpsc::Sender<Told>) {
    let mut draw = [0; 2];
    // Without randomness everybody asks at once, which is only less polite.
    let _ = getrandom::fill(&mut draw);
    tokio::time::sleep(SPREAD * u32::from(u16::from_be_bytes(draw)) / 65_536).await;
    loop {
        let identity = identity_of(&client, address).await;
        let pause = if identity.is_ok() { ASK_EVERY } else { ASK_AGAIN };
        if told.send(Told { name: name.clone(), identity }).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Asks an agent for its description.
///
/// # Errors
/// A sentence that names the address.
pub async fn identity_of(client: &Client, address: SocketAddr) -> Result<Identity, String> {
    let host = address.to_string();
    let answer = client.get(address, &host, "/api/v1/agent").await.map_err(|error| error.to_string())?;
    if !answer.status.is_success() {
        return Err(format!("{address} answered {} at /api/v1/agent", answer.status));
    }
    let identity = serde_json::from_slice(&answer.body);
    identity.map(Identity::tamed).map_err(|error| format!("{address} is no pathmeter: {error}"))
}
