//! Resolves the names of peers and targets to addresses, again and again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::poller::{Backoff, KeyedPoller, NextPoll};

/// Chosen: DNS entries of peers live for minutes, and a wrong one is used for this long at most. A name that
/// cannot be resolved waits as long: the resolver of the host has repeated its queries already.
const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(30), retry: Duration::from_secs(30) };

/// A look-up that takes longer has failed.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Look-ups at once; each occupies a thread.
const RESOLVE_AT_ONCE: usize = 8;

/// The addresses of a host, the preferred one first; or why there are none.
pub type Resolution = Result<Vec<IpAddr>, String>;

/// Resolves hosts in the background.
#[derive(Debug)]
pub struct Resolver {
    poller: KeyedPoller<String, String, Resolution>,
}

impl Resolver {
    /// A resolver of nothing yet, and where resolutions come out: each with the name of its peer or target.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, Resolution)>) {
        let (poller, results) = KeyedPoller::new(|_| BACKOFF);
        (Self { poller: poller.at_most(RESOLVE_AT_ONCE) }, results)
    }

    /// Resolves exactly these from now on: names of peers and targets with their hosts. Hosts that are
    /// addresses need no look-up and are returned.
    pub fn follow<'a>(
        &mut self,
        hosts: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> BTreeMap<String, IpAddr> {
        let mut literal = BTreeMap::new();
        let mut wanted = BTreeMap::new();
        for (name, host) in hosts {
            match host.parse::<IpAddr>() {
                Ok(address) => drop(literal.insert(name.to_owned(), address.to_canonical())),
                Err(_) => drop(wanted.insert(name.to_owned(), host.to_owned())),
            }
        }
        self.poller.follow(wanted, |_, host| {
            let host = host.clone();
            async move {
                let resolution = look_up(&host).await;
                let next = NextPoll::of(&resolution);
                (resolution, next)
            }
        });
        literal
    }
}

async fn look_up(host: &str) -> Resolution {
    match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host, 0))).await {
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
}

/// Resolves a host once, for a request or a measurement that is made now.
///
/// # Errors
/// A sentence that names the host.
pub async fn once(host: &str) -> Resolution {
    match host.parse::<IpAddr>() {
        Ok(address) => Ok(vec![address.to_canonical()]),
        Err(_) => look_up(host).await,
    }
}
