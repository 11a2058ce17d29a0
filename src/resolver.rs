//! Resolves the host names of peers and targets periodically.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::ready;
use futures_util::stream;
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::poller::{Backoff, KeyedPoller, NextPoll};

/// Chosen: DNS records of peers usually have a TTL of minutes, and an outdated address is used for at most
/// this time. A failed name is retried after the same time, because the resolver of the host repeats queries
/// itself.
const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(30), retry: Duration::from_secs(30) };

/// Timeout of a lookup.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum concurrent lookups; each occupies a thread.
const CONCURRENT_LOOKUPS_MAX: usize = 8;

/// Maximum concurrent lookups of names; each occupies a socket. Chosen: enough for the routers of a usual
/// route at once.
const CONCURRENT_REVERSE_LOOKUPS_MAX: usize = 32;

/// The addresses of a host, the preferred one first and never empty; or why there are none.
pub type Resolution = Result<Vec<IpAddr>, String>;

/// Resolves hosts in the background.
#[derive(Debug)]
pub struct Resolver {
    poller: KeyedPoller<String, String, Resolution>,
}

impl Resolver {
    /// A resolver without hosts, and the receiver of its results, each with the name of the peer or target.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, Resolution)>) {
        let (poller, results) = KeyedPoller::new(|_| BACKOFF);
        (Self { poller: poller.with_concurrency(CONCURRENT_LOOKUPS_MAX) }, results)
    }

    /// Resolves exactly these hosts; each comes with the name of its peer or target. Hosts that are IP
    /// addresses require no lookup and are returned.
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
            let mut unique = Vec::new();
            for address in addresses.map(|address| address.ip().to_canonical()) {
                if !unique.contains(&address) {
                    unique.push(address);
                }
            }
            if unique.is_empty() { Err(format!("{host} has no address")) } else { Ok(unique) }
        }
        Ok(Err(error)) => Err(format!("looking up {host}: {error}")),
        Err(_) => Err(format!("looking up {host}: timed out after {} s", RESOLVE_TIMEOUT.as_secs())),
    }
}

/// The host names of addresses, as far as the DNS has them within `timeout`. Never an error: names are only
/// shown.
pub async fn names_of(addresses: Vec<IpAddr>, timeout: Duration) -> BTreeMap<IpAddr, String> {
    let Some(resolver) = TokioResolver::builder_tokio().ok().and_then(|builder| builder.build().ok()) else {
        return BTreeMap::new();
    };
    let lookups = addresses.into_iter().map(async |address| {
        let lookup = resolver.reverse_lookup(address).await.ok()?;
        let name = lookup.answers().iter().find_map(|record| {
            let RData::PTR(name) = &record.data else { return None };
            Some(name.0.to_utf8())
        })?;
        Some((address, name.trim_end_matches('.').to_owned()))
    });
    let found = stream::iter(lookups).buffer_unordered(CONCURRENT_REVERSE_LOOKUPS_MAX);
    found.take_until(sleep(timeout)).filter_map(ready).collect().await
}

/// Resolves a host once.
///
/// # Errors
/// The cause, with the name of the host.
pub async fn once(host: &str) -> Resolution {
    match host.parse::<IpAddr>() {
        Ok(address) => Ok(vec![address.to_canonical()]),
        Err(_) => look_up(host).await,
    }
}
