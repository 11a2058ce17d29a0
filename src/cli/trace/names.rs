//! Names of routers, which are looked up while the trace runs.

use std::collections::BTreeMap;
use std::future::pending;
use std::net::IpAddr;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::resolver;

/// The names of routers, as far as they are known.
#[derive(Debug)]
pub(super) struct Names {
    /// `false`: no name is looked up.
    is_wanted: bool,
    /// `None`: the look-up has not ended.
    found: BTreeMap<IpAddr, Option<Name>>,
    lookups: JoinSet<(IpAddr, Name)>,
}

/// The result of a look-up; `None`: there is no name.
type Name = Option<String>;

/// How long to look up a name.
const TIMEOUT: Duration = Duration::from_secs(2);

impl Names {
    pub(super) fn new(is_wanted: bool) -> Self {
        Self { is_wanted, found: BTreeMap::new(), lookups: JoinSet::new() }
    }

    /// Begins to look up the name of a router, once.
    pub(super) fn request(&mut self, router: IpAddr) {
        if !self.is_wanted || self.found.contains_key(&router) {
            return;
        }
        self.found.insert(router, None);
        self.lookups.spawn(async move {
            let mut names = resolver::names_of(vec![router], TIMEOUT).await;
            (router, names.remove(&router))
        });
    }

    /// Waits until a look-up ends; for ever, if there is none.
    pub(super) async fn ended(&mut self) {
        match self.lookups.join_next().await {
            Some(Ok((router, name))) => {
                self.found.insert(router, Some(name));
            }
            // A look-up is neither cancelled, nor does it panic.
            Some(Err(_)) => {}
            None => pending().await,
        }
    }

    /// The address of a router, with its name if it has one; `None` while the name is looked up.
    pub(super) fn of(&self, router: IpAddr) -> Option<String> {
        match self.found.get(&router) {
            Some(None) => None,
            Some(Some(Some(name))) => Some(format!("{router} ({name})")),
            Some(Some(None)) | None => Some(router.to_string()),
        }
    }
}
