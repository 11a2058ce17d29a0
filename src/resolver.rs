//! Names of peers and targets, looked up again and again without disturbing anything.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// A name is looked up this often. Chosen: DNS entries of peers live for minutes, and so does a wrong one at most.
pub const RESOLVE_EVERY: Duration = Duration::from_secs(30);

/// A look-up that takes longer has failed.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Look-ups at once; each occupies a thread.
const RESOLVE_AT_ONCE: usize = 8;

/// What a look-up found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The peer or target.
    pub name: String,
    /// Its addresses, the preferred one first; or why there are none.
    pub addresses: Result<Vec<IpAddr>, String>,
}

/// Looks up hosts in the background.
#[derive(Debug)]
pub struct Resolver {
    tasks: JoinSet<()>,
    found: mpsc::Sender<Resolved>,
    turns: Arc<Semaphore>,
    hosts: BTreeMap<String, (String, tokio::task::AbortHandle)>,
}

impl Resolver {
    /// A resolver that tells `found`.
    #[must_use]
    pub fn new(found: mpsc::Sender<Resolved>) -> Self {
        Self {
            tasks: JoinSet::new(),
            found,
            turns: Arc::new(Semaphore::new(RESOLVE_AT_ONCE)),
            hosts: BTreeMap::new(),
        }
    }

    /// Looks up exactly these: names of peers and targets with their hosts. Addresses need no look-up and are returned;
    /// what was looked up before goes on undisturbed.
    pub fn follow<'a>(
        &mut self,
        hosts: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> BTreeMap<String, IpAddr> {
        while self.tasks.try_join_next().is_some() {}
        let mut literal = BTreeMap::new();
        let mut wanted = BTreeMap::new();
        for (name, host) in hosts {
            match host.parse::<IpAddr>() {
                Ok(address) => drop(literal.insert(name.to_owned(), address.to_canonical())),
                Err(_) => drop(wanted.insert(name.to_owned(), host.to_owned())),
            }
        }
        self.hosts.retain(|name, (host, task)| {
            let stays = wanted.get(name) == Some(host);
            if !stays {
                task.abort();
            }
            stays
        });
        for (name, host) in wanted {
            if !self.hosts.contains_key(&name) {
                let look_up =
                    look_up(name.clone(), host.clone(), self.found.clone(), Arc::clone(&self.turns));
                let task = self.tasks.spawn(look_up);
                self.hosts.insert(name, (host, task));
            }
        }
        literal
    }
}

async fn look_up(name: String, host: String, found: mpsc::Sender<Resolved>, turns: Arc<Semaphore>) {
    loop {
        let addresses = {
            let _turn = turns.acquire().await;
            match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host.as_str(), 0))).await {
                Ok(Ok(addresses)) => {
                    let mut known = Vec::new();
                    for address in addresses.map(|address| address.ip().to_canonical()) {
                        if !known.contains(&address) {
                            known.push(address);
                        }
                    }
                    if known.is_empty() { Err(format!("{host} has no address")) } else { Ok(known) }
                }
                Ok(Err(error)) => Err(format!("looking up {host}: {error}")),
                Err(_) => Err(format!("looking up {host}: no answer within {} s", RESOLVE_TIMEOUT.as_secs())),
            }
        };
        if found.send(Resolved { name: name.clone(), addresses }).await.is_err() {
            return;
        }
        tokio::time::sleep(RESOLVE_EVERY).await;
    }
}

/// The first address of a name, for a measurement that is made once.
///
/// # Errors
/// A sentence that names the host.
pub async fn once(host: &str) -> Result<Vec<IpAddr>, String> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![address.to_canonical()]);
    }
    let (send, mut found) = mpsc::channel(1);
    let mut tasks = JoinSet::new();
    tasks.spawn(look_up(host.to_owned(), host.to_owned(), send, Arc::new(Semaphore::new(1))));
    match found.recv().await {
        Some(resolved) => resolved.addresses,
        None => Err(format!("looking up {host}: interrupted")),
    }
}
