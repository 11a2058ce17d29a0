//! Asks those who know of peers and targets, again and again, without disturbing anything.

mod dns;
mod files;
mod http;
mod introductions;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use crate::config::Provider;
use crate::config::discovery::Source;
use crate::config::inventory::Member;
use crate::http::client::Secure;

pub use introductions::{Introduced, Introductions, Stranger};

/// What came of asking a provider.
#[derive(Debug)]
pub struct Finding {
    /// Its name.
    pub provider: String,
    /// Everybody it knows of, sorted; or why it did not say.
    pub members: Result<Vec<Member>, String>,
}

/// Asks providers in the background.
#[derive(Debug)]
pub struct Scout {
    tasks: JoinSet<()>,
    found: mpsc::Sender<Finding>,
    asked: BTreeMap<String, (Errand, AbortHandle)>,
}

/// Whom to ask, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Errand {
    /// Whom.
    pub provider: Provider,
    /// With TLS; `None`: without, or not over HTTP.
    pub secure: Option<Secure>,
}

/// What a provider said, and when it is to be asked again.
struct Answer {
    members: Vec<Member>,
    again: Duration,
}

/// Who did not answer is asked again after this, or earlier where it would be anyway.
const AGAIN: Duration = Duration::from_secs(10);

impl Scout {
    /// A scout that tells `found`.
    #[must_use]
    pub fn new(found: mpsc::Sender<Finding>) -> Self {
        Self { tasks: JoinSet::new(), found, asked: BTreeMap::new() }
    }

    /// Asks exactly these. Those that are the same as before go on undisturbed.
    pub fn follow(&mut self, errands: impl IntoIterator<Item = Errand>) {
        while self.tasks.try_join_next().is_some() {}
        let wanted: BTreeMap<String, Errand> =
            errands.into_iter().map(|errand| (errand.provider.name.clone(), errand)).collect();
        self.asked.retain(|name, (errand, task)| {
            let stays = wanted.get(name) == Some(errand);
            if !stays {
                task.abort();
            }
            stays
        });
        for (name, errand) in wanted {
            if !self.asked.contains_key(&name) {
                let task = self.tasks.spawn(run(errand.clone(), self.found.clone()));
                self.asked.insert(name, (errand, task));
            }
        }
    }
}

async fn run(Errand { provider, secure }: Errand, found: mpsc::Sender<Finding>) {
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
            Ok(Answer { mut members, again }) => {
                members.sort_unstable();
                members.dedup();
                (Ok(members), again)
            }
            Err(why) => (Err(why), refresh.min(AGAIN)),
        };
        if found.send(Finding { provider: name.clone(), members }).await.is_err() {
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
