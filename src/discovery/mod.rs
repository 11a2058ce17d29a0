//! Service discovery: polls providers for peers and targets, and requests the identities of agents without a
//! name.

mod dns;
mod files;
mod http;
mod identify;

use std::time::Duration;

use tokio::sync::mpsc;

use crate::config::Provider;
use crate::config::discovery::ProviderSource;
use crate::config::file_sd::Member;
use crate::http::client::TlsClient;
use crate::poller::{Backoff, KeyedPoller, NextPoll};

pub use identify::{AgentIdentifier, IdentifyResult, UnidentifiedAgent};

/// All members that a provider lists, sorted and without duplicates, or why the poll failed.
pub type ProviderUpdate = Result<Vec<Member>, String>;

/// Polls providers in the background.
#[derive(Debug)]
pub struct ProviderPoller {
    poller: KeyedPoller<String, PollTask, ProviderUpdate>,
}

/// A provider to poll, with its TLS client.
#[derive(Debug, Clone, PartialEq)]
pub struct PollTask {
    /// The provider.
    pub provider: Provider,
    /// The TLS client; `None`: the provider does not use HTTPS.
    pub secure: Option<TlsClient>,
}

/// The members that a provider lists.
struct MemberList {
    members: Vec<Member>,
    /// The time until the next poll.
    valid: Duration,
}

/// The first pause after a failure, unless the interval of the provider is shorter. Chosen: a restart of a
/// server takes less time.
const RETRY: Duration = Duration::from_secs(10);

impl ProviderPoller {
    /// A poller without providers, and the receiver of its updates, each with the name of the provider.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, ProviderUpdate)>) {
        let (poller, updates) = KeyedPoller::new(|task: &PollTask| {
            let interval = task.provider.refresh;
            Backoff { interval, retry: interval.min(RETRY) }
        });
        (Self { poller }, updates)
    }

    /// Polls exactly these providers. Polls of unchanged providers are not restarted.
    pub fn follow(&mut self, tasks: impl IntoIterator<Item = PollTask>) {
        let wanted = tasks.into_iter().map(|task| (task.provider.name.clone(), task)).collect();
        self.poller.follow(wanted, |_, task| poll(task.clone()));
    }
}

async fn poll(PollTask { provider, secure }: PollTask) -> (ProviderUpdate, NextPoll) {
    let Provider { source, refresh, .. } = provider;
    let result = match source {
        ProviderSource::Files(patterns) => files::read(patterns, refresh).await,
        ProviderSource::Http { url, credentials, .. } => {
            http::request(&url, secure, credentials, refresh).await
        }
        ProviderSource::Dns { name, records } => dns::query(&name, records, refresh).await,
    };
    match result {
        Ok(MemberList { mut members, valid }) => {
            members.sort_unstable();
            members.dedup();
            (Ok(members), NextPoll::After(valid))
        }
        Err(error) => (Err(error), NextPoll::Retry),
    }
}
