//! Stores events, traces and budgets in the state directory, and restores them at the start.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::api::status::StateDirStatus;
use crate::bulk::Leases;
use crate::event_log::EventLog;
use crate::metrics::Exporter;
use crate::state_dir::{EntryFile, StateDir, StateDirError};
use crate::trace_log::TraceLog;

/// The events, traces and budgets of the agent, and where they are stored.
#[derive(Debug)]
pub(super) struct StoredState {
    events: Arc<EventLog>,
    traces: Arc<TraceLog>,
    leases: Arc<Leases>,
    exporter: Arc<Exporter>,
    store: Store,
    status: StateDirStatus,
}

/// Files are written by one thread at a time, not by that of the daemon, which a slow disk would delay.
#[derive(Debug)]
enum Store {
    /// In memory only.
    None,
    Idle(Box<Files>),
    Writing(JoinHandle<Written>),
}

type Written = (Box<Files>, io::Result<()>);

#[derive(Debug)]
struct Files {
    events: EntryFile,
    traces: EntryFile,
    /// Each entry is the whole ledger; the last one counts.
    ledger: EntryFile,
    /// The numbers of the latest stored ones.
    stored: (u64, u64),
    dir: StateDir,
}

/// Limit of each of the two files of events. Chosen: holds as many events as are shown, of usual length.
pub(crate) const EVENTS_BYTES_MAX: u64 = 1 << 20;

/// Limit of each of the two files of traces. Chosen: holds as many traces as are shown, with twelve hops.
pub(crate) const TRACES_BYTES_MAX: u64 = 2 << 20;

/// Limit of each of the two files of ledgers. Chosen: holds a ledger of 10,000 paths.
pub(crate) const LEDGER_BYTES_MAX: u64 = 2 << 20;

/// How long the last write may take when the agent stops.
const LAST_WRITE_MAX: Duration = Duration::from_secs(1);

impl StoredState {
    /// Restores what is stored in `dir`. If it cannot be used, the agent measures all the same, and stores
    /// nothing.
    pub(super) fn restore(
        dir: Option<&Path>,
        events: Arc<EventLog>,
        traces: Arc<TraceLog>,
        leases: Arc<Leases>,
        exporter: Arc<Exporter>,
    ) -> Self {
        let mut status = StateDirStatus { directory: dir.map(Path::to_owned), error: None };
        let store = match dir.map(|dir| Files::open(dir, &events, &traces, &leases)) {
            Some(Ok(files)) => {
                let (events, traces) = files.stored;
                info!(directory = %files.dir.path().display(), events, traces, "events, traces and budgets restored");
                Store::Idle(Box::new(files))
            }
            Some(Err(error)) => {
                error!(%error, "events, traces and budgets are not stored");
                status.error = Some(error.to_string());
                Store::None
            }
            None => {
                info!("no state_dir: events, traces and budgets are kept in memory only");
                Store::None
            }
        };
        Self { events, traces, leases, exporter, store, status }
    }

    /// What the API shows.
    pub(super) fn status(&self) -> StateDirStatus {
        self.status.clone()
    }

    /// Begins to store what is new, unless the last write has not ended. Returns whether the status has
    /// changed.
    pub(super) fn store(&mut self) -> bool {
        let had_error = self.status.error.is_some();
        self.store = match std::mem::replace(&mut self.store, Store::None) {
            Store::Writing(mut writing) => match (&mut writing).now_or_never() {
                Some(written) => self.written(written),
                None => Store::Writing(writing),
            },
            Store::Idle(files) => self.write(files),
            Store::None => Store::None,
        };
        had_error != self.status.error.is_some()
    }

    /// Begins to write what is new, if anything is.
    fn write(&self, mut files: Box<Files>) -> Store {
        let ledger = self.leases.changed_ledger();
        if ledger.is_none() && !files.is_behind(&self.events, &self.traces) {
            return Store::Idle(files);
        }
        let (events, traces) = (Arc::clone(&self.events), Arc::clone(&self.traces));
        let leases = Arc::clone(&self.leases);
        Store::Writing(spawn_blocking(move || {
            // The ledger is first: a run may use what it says is left.
            let stored = ledger.map_or(Ok(()), |ledger| files.ledger.append(&[ledger]));
            if stored.is_err() {
                leases.ledger_not_stored();
            }
            let outcome = stored.and_then(|()| files.write(&events, &traces));
            (files, outcome)
        }))
    }

    fn written(&mut self, written: Result<Written, JoinError>) -> Store {
        let (files, outcome) = match written {
            Ok(written) => written,
            Err(error) => {
                error!(%error, "events, traces and budgets are no longer stored");
                self.status.error = Some(error.to_string());
                return Store::None;
            }
        };
        match outcome {
            Ok(()) if self.status.error.is_some() => {
                info!("events, traces and budgets are stored again");
                self.status.error = None;
            }
            Ok(()) => {}
            Err(error) => {
                self.exporter.process.state_write_failed();
                if self.status.error.is_none() {
                    warn!(%error, "events, traces and budgets cannot be stored; retrying");
                }
                self.status.error = Some(error.to_string());
            }
        }
        Store::Idle(files)
    }

    /// Stores what is new before the agent ends, if the disk is fast enough.
    pub(super) async fn finish(&mut self) {
        let _ = timeout(LAST_WRITE_MAX, async {
            self.written_last().await;
            self.store();
            self.written_last().await;
        })
        .await;
    }

    /// Waits for the end of a write.
    async fn written_last(&mut self) {
        if let Store::Writing(writing) = &mut self.store {
            let written = writing.await;
            self.store = self.written(written);
        }
    }
}

impl Files {
    fn open(
        dir: &Path,
        events: &EventLog,
        traces: &TraceLog,
        leases: &Leases,
    ) -> Result<Self, StateDirError> {
        let dir = StateDir::open(dir)?;
        let (event_file, earlier_events) = dir.entry_file("events", EVENTS_BYTES_MAX)?;
        events.restore(earlier_events.entries);
        let (trace_file, earlier_traces) = dir.entry_file("traces", TRACES_BYTES_MAX)?;
        traces.restore(earlier_traces.entries);
        let (ledger, mut earlier_ledgers) = dir.entry_file("ledger", LEDGER_BYTES_MAX)?;
        if let Some(last) = earlier_ledgers.entries.pop() {
            leases.restore_ledger(last);
        }
        for (what, lines) in [
            ("events", earlier_events.unreadable),
            ("traces", earlier_traces.unreadable),
            ("ledger", earlier_ledgers.unreadable),
        ] {
            if lines > 0 {
                let directory = dir.path().display();
                warn!(%directory, what, lines, "lines of a file in state_dir are unreadable and left out");
            }
        }
        let stored = (events.latest(), traces.latest());
        Ok(Self { events: event_file, traces: trace_file, ledger, stored, dir })
    }

    fn is_behind(&self, events: &EventLog, traces: &TraceLog) -> bool {
        self.stored != (events.latest(), traces.latest())
    }

    fn write(&mut self, events: &EventLog, traces: &TraceLog) -> io::Result<()> {
        let (event, trace) = &mut self.stored;
        let new = events.after(*event);
        let lasting: Vec<_> = new.iter().filter(|event| event.is_lasting()).collect();
        self.events.append(&lasting)?;
        *event = new.last().map_or(*event, |last| last.number);
        let new = traces.after(*trace);
        let new: Vec<_> = new.iter().map(AsRef::as_ref).collect();
        self.traces.append(&new)?;
        *trace = new.last().map_or(*trace, |last| last.number);
        Ok(())
    }
}
