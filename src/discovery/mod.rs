//! Asks those who know of peers and targets, again and again, without disturbing anything.

mod dns;
mod files;
mod http;
mod identify;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::config::Provider;
use crate::config::discovery::Source;
use crate::config::inventory::Member;
use crate::http::client::Secure;

pub use identify::{AgentIdentifier, IdentifyResult, UnidentifiedAgent};

/// What came of asking a provider.
#[derive(Debug)]
pub struct ProviderUpdate {
    /// Its name.
    pub provider: String,
    /// Everybody it knows of, sorted; or why it did not say.
    pub members: Result<Vec<Member>, String>,
}

/// Asks providers in the background.
#[derive(Debug)]
pub struct ProviderPoller {
    tasks: JoinSet<()>,
    found: mpsc::Sender<ProviderUpdate>,
    asked: BTreeMap<String, (PollTask, AbortHandle)>,
}

/// Whom to ask, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct PollTask {
    /// Whom.
    pub provider: Provider,
    /// With TLS; `None`: without, or not over HTTP.
    pub secure: Option<Secure>,
}

/// What a provider said, and when it is to be asked again.
struct MemberList {
    members: Vec<Member>,
    again: Duration,
}

/// Who did not answer is asked again after this, or earlier where it would be anyway.
const AGAIN: Duration = Duration::from_secs(10);

impl ProviderPoller {
    /// A scout that tells `found`.
    #[must_use]
    pub fn new(found: mpsc::Sender<ProviderUpdate>) -> Self {
        Self { tasks: JoinSet::new(), found, asked: BTreeMap::new() }
    }

    /// Asks exactly these. Those that are the same as before go on undisturbed.
    pub fn follow(&mut self, tasks: impl IntoIterator<Item = PollTask>) {
        while self.tasks.try_join_next().is_some() {}
        let wanted: BTreeMap<String, PollTask> =
            tasks.into_iter().map(|poll_task| (poll_task.provider.name.clone(), poll_task)).collect();
        self.asked.retain(|name, (poll_task, task)| {
            let stays = wanted.get(name) == Some(poll_task);
            if !stays {
                task.abort();
            }
            stays
        });
        for (name, poll_task) in wanted {
            if !self.asked.contains_key(&name) {
                let task = self.tasks.spawn(run(poll_task.clone(), self.found.clone()));
                self.asked.insert(name, (poll_task, task));
            }
        }
    }
}

async fn run(PollTask { provider, secure }: PollTask, found: mpsc::Sender<ProviderUpdate>) {
    let Provider { name, source, refresh, .. } = provider;
    loop {
        let answer = match &source {
            Source::Files(patterns) => files::read(patterns.clone(), refresh).await,
            Source::Http { url, credentials, .. } => {
                http::ask(url, secure.clone(), credentials.clone(), refresh).await
            }
            Source::Dns { name, records } => dns::ask(name, *records, refresh).await,
        };
        let (members, again) = match answer {
            Ok(MemberList { mut members, again }) => {
                members.sort_unstable();
                members.dedup();
                (Ok(members), again)
            }
            Err(why) => (Err(why), refresh.min(AGAIN)),
        };
        if found.send(ProviderUpdate { provider: name.clone(), members }).await.is_err() {
            return;
        }
        tokio::time::sleep(uneven(again)).await;
    }
}

/// Up to a tenth shorter, so that a fleet that was started together does not ask together for ever.
fn uneven(pause: Duration) -> Duration {
    pause - some_of(pause / 10)
}

/// A random part of a time. Without randomness it is nothing, and everybody asks at once, which is only less polite.
pub(crate) fn some_of(time: Duration) -> Duration {
    let mut draw = [0; 2];
    let _ = getrandom::fill(&mut draw);
    time * u32::from(u16::from_be_bytes(draw)) / 65_536
}
