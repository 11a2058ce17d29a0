//! Service discovery: polls providers for peers and targets, and agents without a name for theirs.

mod dns;
mod files;
mod http;
mod identify;

use std::time::Duration;

use tokio::sync::mpsc;

use crate::config::Provider;
use crate::config::discovery::Source;
use crate::config::file_sd::Member;
use crate::http::client::TlsClient;
use crate::poller::{Backoff, KeyedPoller, NextPoll};

pub use identify::{AgentIdentifier, IdentifyResult, UnidentifiedAgent};

/// All members that a provider lists, sorted; or why that is not known.
pub type ProviderUpdate = Result<Vec<Member>, String>;

/// Polls providers in the background.
#[derive(Debug)]
pub struct ProviderPoller {
    poller: KeyedPoller<String, PollTask, ProviderUpdate>,
}

/// Which provider is polled, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct PollTask {
    /// The provider.
    pub provider: Provider,
    /// With TLS; `None`: without, or not over HTTP.
    pub secure: Option<TlsClient>,
}

/// The answer of a provider.
struct MemberList {
    members: Vec<Member>,
    /// How long it is valid.
    valid: Duration,
}

/// The first pause after a failure, where the provider is not polled more often anyway. Chosen: a server that
/// is being restarted is back then.
const RETRY: Duration = Duration::from_secs(10);

impl ProviderPoller {
    /// A poller of nothing yet, and where updates come out: each with the name of its provider.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<(String, ProviderUpdate)>) {
        let (poller, updates) = KeyedPoller::new(|task: &PollTask| {
            let interval = task.provider.refresh;
            Backoff { interval, retry: interval.min(RETRY) }
        });
        (Self { poller }, updates)
    }

    /// Polls exactly these from now on. Those that are the same as before are not disturbed.
    pub fn follow(&mut self, tasks: impl IntoIterator<Item = PollTask>) {
        let wanted = tasks.into_iter().map(|task| (task.provider.name.clone(), task)).collect();
        self.poller.follow(wanted, |_, task| poll(task.clone()));
    }
}

async fn poll(PollTask { provider, secure }: PollTask) -> (ProviderUpdate, NextPoll) {
    let Provider { source, refresh, .. } = provider;
    let answer = match source {
        Source::Files(patterns) => files::read(patterns, refresh).await,
        Source::Http { url, credentials, .. } => http::ask(&url, secure, credentials, refresh).await,
        Source::Dns { name, records } => dns::ask(&name, records, refresh).await,
    };
    match answer {
        Ok(MemberList { mut members, valid }) => {
            members.sort_unstable();
            members.dedup();
            (Ok(members), NextPoll::After(valid))
        }
        Err(error) => (Err(error), NextPoll::Retry),
    }
}
