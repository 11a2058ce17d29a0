//! The leases that this host grants, and the bytes that their runs may use.

mod messages;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pathmeter_proto::bandwidth::lease::{
    ACTIVATION_MAX, AttachError, LeaseId, LeaseResponse, LeaseTable, Place, RunTerms,
};
use pathmeter_proto::bandwidth::ledger::{BudgetError, ByteLedger, Reservation};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::load::TRAIN_RATE_MIN;
use pathmeter_proto::time::{Timestamp, WallTime};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::config::BandwidthRules;
use crate::config::bandwidth::Method;

pub use messages::{Grant, LeaseAnswer, LeaseRequest, RefusalReason};

/// Maximum data connections of a run.
pub(crate) const DATA_CONNECTIONS_MAX: u16 = 16;

/// A run that has a lease.
#[derive(Debug, Clone)]
pub(super) struct LeasedRun {
    pub(super) request: LeaseRequest,
    pub(super) bytes_max: u64,
    pub(super) rate_max: Option<u64>,
    pub(super) secret: [u8; 16],
}

/// The leases of this host. Shared by the HTTP API, which grants them, and the thread that runs them.
#[derive(Debug)]
pub struct Leases {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rules: BandwidthRules,
    agent_port: u16,
    is_stopping: bool,
    /// No lease is granted before this time.
    stopped_until: Timestamp,
    table: LeaseTable,
    ledger: ByteLedger,
    /// Whether the ledger has changed since it was last stored.
    is_ledger_changed: bool,
    /// Leases that are granted or waited for, with what is known of them.
    known: BTreeMap<LeaseId, Known>,
}

#[derive(Debug)]
struct Known {
    /// The address of the client, or the path of a run of this agent: its name in the ledger.
    client: String,
    run: LeasedRun,
    /// Bytes of the budget; `None` while the client waits.
    reservation: Option<Reservation>,
    /// Bytes that the run has used.
    used: u64,
    /// Whether the run has begun: it settles its budget itself when it ends.
    has_begun: bool,
}

/// The smallest limit of a rate in bytes per second: that of the configuration.
const RUN_RATE_MIN: u64 = 12_500;

/// A run that may use fewer bytes says nothing about a path. Chosen: 0.1 s at 100 Mbit/s.
const RUN_BYTES_MIN: u64 = 1_250_000;

/// Bytes of a run of trains at least. Chosen: four short ones.
const TRAIN_BYTES_MIN: u64 = 100_000;

/// How long no run is begun after an operator has stopped all. Chosen: time to switch runs off.
pub(crate) const STOP_TIME: Duration = Duration::from_secs(60);

/// The bytes that bandwidth runs have used on a day, as they are stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLedger {
    /// The day, counted from 1970 in UTC.
    day: u64,
    /// Bytes of all runs.
    host: u64,
    /// Bytes of each path or client.
    paths: BTreeMap<String, u64>,
}

/// How long a lease lasts longer than its run sends: to open connections, and to receive what is on the way.
const DRAIN_TIME: Duration = Duration::from_secs(5);

impl Default for Leases {
    fn default() -> Self {
        Self::new(BandwidthRules::default(), 0)
    }
}

impl Leases {
    /// No leases yet. `agent_port`: where runs connect to.
    #[must_use]
    pub fn new(rules: BandwidthRules, agent_port: u16) -> Self {
        let table = LeaseTable::new(rules.runs_max.into());
        let (ledger, known) = (ByteLedger::default(), BTreeMap::new());
        Self {
            state: Mutex::new(State {
                rules,
                agent_port,
                is_stopping: false,
                stopped_until: Timestamp::default(),
                table,
                ledger,
                is_ledger_changed: false,
                known,
            }),
        }
    }

    /// Changes the rules. Runs that are switched off stop at once; others continue.
    pub fn set_rules(&self, rules: BandwidthRules) {
        let mut state = self.state();
        state.table.set_runs_max(rules.runs_max.into());
        if !rules.enabled {
            state.table.release_all();
        }
        state.rules = rules;
    }

    /// Stops all runs, and refuses others for a minute. Returns the number of runs that were stopped.
    pub fn stop_all(&self) -> usize {
        let (mut state, now) = (self.state(), Clock::now());
        let running = state.table.running(now);
        state.table.release_all();
        state.stopped_until = now + STOP_TIME;
        running
    }

    /// Grants no more leases, and stops all runs.
    pub fn shut_down(&self) {
        let mut state = self.state();
        state.is_stopping = true;
        state.table.release_all();
    }

    /// Number of runs, and of clients that wait.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let (state, now) = (self.state(), Clock::now());
        (state.table.running(now), state.table.waiting(now))
    }

    /// Answers a request for a lease of an authorised client.
    pub fn request(&self, client: IpAddr, request: LeaseRequest) -> LeaseAnswer {
        let (now, wall) = (Clock::now(), wall_time());
        self.state().request(now, wall, client.to_canonical().to_string(), request)
    }

    /// Answers a request of this agent itself for a run of a path: it takes part in the run too.
    pub fn request_own(&self, path: &str, request: LeaseRequest) -> LeaseAnswer {
        let (now, wall) = (Clock::now(), wall_time());
        self.state().request(now, wall, path.to_owned(), request)
    }

    /// Takes back a lease of this agent that no connection has attached to, because the peer has no room. The
    /// agent lets other runs pass, and keeps its place.
    pub fn defer(&self, lease: LeaseId) {
        let mut state = self.state();
        state.table.defer(Clock::now(), lease);
        state.give_back(lease);
    }

    /// The bytes that were used today, to be stored; `None` if they have not changed since the last call.
    #[must_use]
    pub fn changed_ledger(&self) -> Option<StoredLedger> {
        let mut state = self.state();
        if !std::mem::take(&mut state.is_ledger_changed) {
            return None;
        }
        let ledger = &state.ledger;
        let paths = ledger.paths().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
        Some(StoredLedger { day: ledger.day(), host: ledger.host(), paths })
    }

    /// The ledger could not be stored: it is returned again.
    pub fn ledger_not_stored(&self) {
        self.state().is_ledger_changed = true;
    }

    /// Continues with a ledger that was stored. Bytes that were reserved then count as used.
    pub fn restore_ledger(&self, stored: StoredLedger) {
        let StoredLedger { day, host, paths } = stored;
        self.state().ledger = ByteLedger::restore(day, host, paths);
    }

    /// Where runs connect to.
    pub(super) fn agent_port(&self) -> u16 {
        self.state().agent_port
    }

    /// Bytes that are left today for the runs of a path, or with a client.
    pub fn bytes_left(&self, path: &str) -> Option<u64> {
        let state = self.state();
        state.ledger.left(wall_time(), state.rules.budget(), path)
    }

    /// The run of a lease; `None` if it is not valid.
    pub(super) fn leased(&self, lease: LeaseId) -> Option<LeasedRun> {
        let state = self.state();
        state
            .table
            .is_valid(Clock::now(), lease)
            .then(|| state.known.get(&lease))?
            .map(|known| known.run.clone())
    }

    /// Attaches connection `number`; returns when the run must have ended.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&self, lease: LeaseId, number: u16) -> Result<Timestamp, AttachError> {
        let mut state = self.state();
        let until = state.table.attach(Clock::now(), lease, number)?;
        if let Some(known) = state.known.get_mut(&lease) {
            known.has_begun = true;
        }
        Ok(until)
    }

    /// Whether a lease is valid.
    #[must_use]
    pub fn is_valid(&self, lease: LeaseId) -> bool {
        self.state().table.is_valid(Clock::now(), lease)
    }

    /// Counts bytes that a run has used. Returns whether it may use more.
    pub fn count_bytes(&self, lease: LeaseId, bytes: u64) -> bool {
        let mut state = self.state();
        let Some(known) = state.known.get_mut(&lease) else { return false };
        known.used = known.used.saturating_add(bytes);
        known.used <= known.run.bytes_max
    }

    /// Ends a lease and settles its budget.
    pub fn end(&self, lease: LeaseId) {
        let mut state = self.state();
        state.table.release(lease);
        state.settle(lease);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn request(
        &mut self,
        now: Timestamp,
        wall: WallTime,
        client: String,
        request: LeaseRequest,
    ) -> LeaseAnswer {
        self.forget_ended(now);
        if let Err(refusal) = self.check(now, &request) {
            return refusal;
        }
        let known = request.lease.as_deref().and_then(|text| u64::from_str_radix(text, 16).ok()).map(LeaseId);
        // A client can only repeat its own request.
        let known = known.filter(|id| {
            self.known
                .get(id)
                .is_some_and(|known| known.client == client && same_run(&known.run.request, &request))
        });
        // What was granted before the hours began may still run.
        let is_granted = known.is_some_and(|id| self.table.is_valid(now, id));
        if !is_granted && let Err(refusal) = self.check_hours(wall) {
            return refusal;
        }
        let id = match known {
            Some(id) => id,
            None => match self.enter(client, request) {
                Ok(id) => id,
                Err(refusal) => return refusal,
            },
        };
        let Some(known) = self.known.get(&id) else { return no_random_bytes() };
        let terms = RunTerms {
            // The control connection is one more.
            connections: known.run.request.connections + 1,
            duration_max: Duration::from_secs(known.run.request.seconds_max) + DRAIN_TIME,
        };
        match self.table.request(now, id, terms) {
            LeaseResponse::Granted { .. } => self.granted(wall, id),
            LeaseResponse::Waiting(Place { position, expected_start, repeat_after }) => {
                LeaseAnswer::Waiting {
                    lease: hex(id),
                    position,
                    expected_start_seconds: expected_start.as_secs_f64(),
                    repeat_after_seconds: repeat_after.as_secs_f64(),
                }
            }
            LeaseResponse::Full { retry_after } => {
                self.known.remove(&id);
                LeaseAnswer::Refused {
                    reason: RefusalReason::QueueFull,
                    detail: "too many clients wait for a run".to_owned(),
                    retry_after_seconds: Some(retry_after.as_secs_f64()),
                }
            }
        }
    }

    /// Checks a request against the rules.
    fn check(&self, now: Timestamp, request: &LeaseRequest) -> Result<(), LeaseAnswer> {
        let refused =
            |reason, detail: String| Err(LeaseAnswer::Refused { reason, detail, retry_after_seconds: None });
        if self.is_stopping {
            return refused(RefusalReason::Stopping, "this agent is about to stop".to_owned());
        }
        if !self.rules.enabled {
            return refused(RefusalReason::Disabled, "this agent has bandwidth.enabled: false".to_owned());
        }
        if now < self.stopped_until {
            return Err(LeaseAnswer::Refused {
                reason: RefusalReason::Stopped,
                detail: "an operator has stopped all runs of this agent".to_owned(),
                retry_after_seconds: Some(self.stopped_until.since(now).as_secs_f64()),
            });
        }
        if Dscp::new(request.dscp).is_none() {
            return refused(RefusalReason::Invalid, format!("dscp: {}; 0 to 63 are allowed", request.dscp));
        }
        let outside = |what: &str, found: u64, least: u64, most: u64| {
            let detail = format!("{what}: {found}; this agent allows {least} to {most}");
            refused(RefusalReason::Invalid, detail)
        };
        let (seconds_max, connections) = (self.rules.run_time_max.as_secs(), u64::from(request.connections));
        if !(1..=u64::from(DATA_CONNECTIONS_MAX)).contains(&connections) {
            return outside("connections", connections, 1, DATA_CONNECTIONS_MAX.into());
        }
        if !(1..=seconds_max).contains(&request.seconds_max) {
            return outside("seconds", request.seconds_max, 1, seconds_max);
        }
        if request.method.is_udp() && connections != 1 {
            return refused(
                RefusalReason::Invalid,
                format!("connections: {connections}; runs over UDP have 1"),
            );
        }
        if request.method == Method::Train
            && let Some(bytes) = request.bytes_max.filter(|bytes| *bytes < TRAIN_BYTES_MIN)
        {
            return outside("bytes", bytes, TRAIN_BYTES_MIN, self.rules.run_bytes_max);
        }
        let rates = [request.rate_bytes_per_second, self.rules.rate_max.map(|bits| bits / 8)];
        if request.method == Method::Train
            && let Some(rate) = rates.into_iter().flatten().min().filter(|rate| *rate < TRAIN_RATE_MIN)
        {
            return outside("rate_bytes_per_second", rate, TRAIN_RATE_MIN, u64::MAX);
        }
        if request.method == Method::Check {
            let Some(rate) = request.rate_bytes_per_second else {
                let detail = "rate_bytes_per_second: missing; a check needs a rate".to_owned();
                return refused(RefusalReason::Invalid, detail);
            };
            // A lower rate would tell nothing about the one that the check asks for.
            if let Some(most) = self.rules.rate_max.map(|bits| bits / 8).filter(|most| rate > *most) {
                return outside("rate_bytes_per_second", rate, RUN_RATE_MIN, most);
            }
        }
        if let Some(bytes) = request.bytes_max.filter(|bytes| !(1..=self.rules.run_bytes_max).contains(bytes))
        {
            return outside("bytes", bytes, 1, self.rules.run_bytes_max);
        }
        if let Some(rate) = request.rate_bytes_per_second.filter(|rate| *rate < RUN_RATE_MIN) {
            return outside("rate_bytes_per_second", rate, RUN_RATE_MIN, u64::MAX);
        }
        Ok(())
    }

    fn check_hours(&self, wall: WallTime) -> Result<(), LeaseAnswer> {
        let Some(left) = self.rules.quiet_hours.iter().filter_map(|hours| hours.remaining(wall)).max() else {
            return Ok(());
        };
        Err(LeaseAnswer::Refused {
            reason: RefusalReason::QuietHours,
            detail: "this agent begins no runs in its bandwidth.quiet_hours".to_owned(),
            retry_after_seconds: Some(left.as_secs_f64()),
        })
    }

    /// Remembers a new request. Returns its random identifier.
    fn enter(&mut self, client: String, request: LeaseRequest) -> Result<LeaseId, LeaseAnswer> {
        let mut random = [0; 24];
        if getrandom::fill(&mut random).is_err() {
            return Err(no_random_bytes());
        }
        let (id, secret) = random.split_at(8);
        let id = LeaseId(u64::from_be_bytes(id.try_into().expect("eight bytes")));
        let rate_max = [request.rate_bytes_per_second, self.rules.rate_max.map(|bits| bits / 8)]
            .into_iter()
            .flatten()
            .min();
        let secret = secret.try_into().expect("sixteen bytes");
        let bytes_max = request.bytes_max.unwrap_or(self.rules.run_bytes_max);
        let run = LeasedRun { bytes_max, rate_max, secret, request };
        self.known.insert(id, Known { client, run, reservation: None, used: 0, has_begun: false });
        Ok(id)
    }

    /// Reserves the bytes of a granted lease, or takes the lease back.
    fn granted(&mut self, wall: WallTime, id: LeaseId) -> LeaseAnswer {
        let Some(known) = self.known.get_mut(&id) else { return no_random_bytes() };
        if known.reservation.is_none() {
            let (path, budget) = (known.client.clone(), self.rules.budget());
            if known.run.request.bytes_max.is_none()
                && let Some(left) = self.ledger.left(wall, budget, &path)
            {
                known.run.bytes_max = known.run.bytes_max.min(left.max(RUN_BYTES_MIN));
            }
            let bytes = known.run.bytes_max;
            match self.ledger.reserve(wall, budget, &path, bytes) {
                Ok(reservation) => {
                    known.reservation = Some(reservation);
                    self.is_ledger_changed = true;
                }
                Err(error) => {
                    self.table.release(id);
                    self.known.remove(&id);
                    return out_of_budget(error, bytes, wall);
                }
            }
        }
        LeaseAnswer::Granted(Grant {
            lease: hex(id),
            secret: known.run.secret.iter().map(|byte| format!("{byte:02x}")).collect(),
            agent_port: self.agent_port,
            activate_within_seconds: ACTIVATION_MAX.as_secs_f64(),
            bytes_max: known.run.bytes_max,
            rate_bytes_per_second: known.run.rate_max,
        })
    }

    /// Settles the budget of leases that have expired, and forgets clients that no longer wait.
    fn forget_ended(&mut self, now: Timestamp) {
        let is_over = |(id, known): &(&LeaseId, &Known)| !known.has_begun && !self.table.is_known(now, **id);
        let ended: Vec<LeaseId> = self.known.iter().filter(is_over).map(|(id, _)| *id).collect();
        for id in ended {
            self.settle(id);
        }
    }

    /// Gives back the bytes of a lease that waits again.
    fn give_back(&mut self, id: LeaseId) {
        let reservation = self.known.get_mut(&id).and_then(|known| known.reservation.take());
        if let Some(reservation) = reservation {
            self.ledger.settle(reservation, 0);
            self.is_ledger_changed = true;
        }
    }

    fn settle(&mut self, id: LeaseId) {
        if let Some(Known { reservation: Some(reservation), used, .. }) = self.known.remove(&id) {
            self.ledger.settle(reservation, used);
            self.is_ledger_changed = true;
        }
    }
}

/// Whether two requests are for the same run.
fn same_run(first: &LeaseRequest, second: &LeaseRequest) -> bool {
    let without_lease = |request: &LeaseRequest| LeaseRequest { lease: None, ..request.clone() };
    without_lease(first) == without_lease(second)
}

fn out_of_budget(error: BudgetError, bytes: u64, wall: WallTime) -> LeaseAnswer {
    LeaseAnswer::Refused {
        reason: RefusalReason::Budget,
        detail: format!("the run may use {bytes} bytes, but {error}"),
        retry_after_seconds: Some(ByteLedger::renewed_in(wall).as_secs_f64()),
    }
}

fn no_random_bytes() -> LeaseAnswer {
    LeaseAnswer::Refused {
        reason: RefusalReason::Other,
        detail: "the kernel of this host provides no random bytes".to_owned(),
        retry_after_seconds: None,
    }
}

fn hex(id: LeaseId) -> String {
    format!("{:016x}", id.0)
}

fn wall_time() -> WallTime {
    let (at, offset) = (Clock::now(), Clock::new().offset());
    offset.wall(at)
}
