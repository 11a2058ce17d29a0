//! The leases that this host grants, and the bytes that their runs may use.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::bandwidth::lease::{
    ACTIVATION_MAX, AttachError, LeaseId, LeaseResponse, LeaseTable, Place, RunTerms,
};
use pathmeter_proto::bandwidth::ledger::{BudgetError, ByteLedger, Reservation};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::time::{Timestamp, WallTime};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::config::BandwidthRules;
use crate::config::bandwidth::Method;

/// The body of a request for a lease. Fields may be added, for compatibility between versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The lease or place of an earlier response; `None` in the first request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// How the run measures.
    pub method: Method,
    /// The direction that it loads: `forward` is from the client to this agent.
    #[serde(with = "direction")]
    pub direction: RunDirection,
    /// Number of data connections, 1 to 16.
    pub connections: u16,
    /// Bytes of payload after which it ends; `None`: as many as this agent allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<u64>,
    /// Seconds of sending after which it ends.
    pub seconds_max: u64,
    /// Bytes of payload per second that it may use; `None`: as many as the responder allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
    /// DSCP of what this agent sends, 0 to 63.
    #[serde(default)]
    pub dscp: u8,
}

/// Maximum data connections of a run.
pub(crate) const DATA_CONNECTIONS_MAX: u16 = 16;

/// The response to a request for a lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum LeaseAnswer {
    /// The run may begin.
    Granted(Grant),
    /// Other runs come first. The client must repeat its request with `lease`.
    Waiting {
        /// The place in the queue.
        lease: String,
        /// 1 for the next one.
        position: usize,
        /// The time until the run can begin if those before it take as long as they may.
        expected_start_seconds: f64,
        /// When the request must be repeated.
        repeat_after_seconds: f64,
    },
    /// The run is refused.
    Refused {
        /// The cause.
        reason: RefusalReason,
        /// The cause and the remedy in words.
        detail: String,
        /// When a request may succeed; `None`: not without a change of this agent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_seconds: Option<f64>,
    },
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// Identifies the lease, as 16 hexadecimal digits.
    pub lease: String,
    /// The secret that the connections of the run prove, as 32 hexadecimal digits.
    pub secret: String,
    /// The port to connect to.
    pub agent_port: u16,
    /// When the lease expires if no connection is opened.
    pub activate_within_seconds: f64,
    /// Bytes of payload that the run may use.
    pub bytes_max: u64,
    /// Bytes of payload per second that the run may use; `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
}

impl Grant {
    /// The lease and its secret; `None` if they are malformed.
    #[must_use]
    pub fn decode(&self) -> Option<(LeaseId, [u8; 16])> {
        let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex(&self.lease) || !is_hex(&self.secret) || self.secret.len() != 32 {
            return None;
        }
        let lease = u64::from_str_radix(&self.lease, 16).ok()?;
        let secret = u128::from_str_radix(&self.secret, 16).ok()?;
        Some((LeaseId(lease), secret.to_be_bytes()))
    }
}

/// Why a lease is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// The client is not a peer, is not in an allowed network, and did not prove the key.
    NotAllowed,
    /// Runs are switched off.
    Disabled,
    /// The agent is about to stop.
    Stopping,
    /// An operator has stopped all runs.
    Stopped,
    /// A value of the request is outside of what this agent allows.
    Invalid,
    /// The budget of the day has too few bytes left.
    Budget,
    /// Too many clients wait.
    QueueFull,
    /// A reason that this version does not know.
    #[serde(other)]
    Other,
}

mod direction {
    use pathmeter_proto::bandwidth::RunDirection;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    pub(super) fn serialize<S: Serializer>(direction: &RunDirection, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(direction.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RunDirection, D::Error> {
        let text = String::deserialize(from)?;
        let known = [RunDirection::Forward, RunDirection::Reverse];
        let found = known.into_iter().find(|direction| direction.as_str() == text);
        found.ok_or_else(|| de::Error::unknown_variant(&text, &["forward", "reverse"]))
    }
}

/// A run that has a lease.
#[derive(Debug, Clone)]
pub(super) struct LeasedRun {
    pub(super) request: LeaseRequest,
    pub(super) bytes_max: u64,
    pub(super) rate_max: Option<u64>,
    pub(super) secret: [u8; 16],
}

impl Default for Leases {
    fn default() -> Self {
        Self::new(BandwidthRules::default(), 0)
    }
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
        if let Some(bytes) = request.bytes_max.filter(|bytes| !(1..=self.rules.run_bytes_max).contains(bytes))
        {
            return outside("bytes", bytes, 1, self.rules.run_bytes_max);
        }
        if let Some(rate) = request.rate_bytes_per_second.filter(|rate| *rate < RUN_RATE_MIN) {
            return outside("rate_bytes_per_second", rate, RUN_RATE_MIN, u64::MAX);
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::super::tests::{request, rules};
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn refusal(answer: LeaseAnswer) -> (RefusalReason, String) {
        match answer {
            LeaseAnswer::Refused { reason, detail, .. } => (reason, detail),
            answer @ (LeaseAnswer::Granted(_) | LeaseAnswer::Waiting { .. }) => panic!("{answer:?}"),
        }
    }

    fn place(answer: &LeaseAnswer) -> String {
        match answer {
            LeaseAnswer::Waiting { lease, .. } => lease.clone(),
            LeaseAnswer::Granted(_) | LeaseAnswer::Refused { .. } => panic!("{answer:?}"),
        }
    }

    fn forward(bytes: u64) -> LeaseRequest {
        request(RunDirection::Forward, 2, bytes)
    }

    #[test]
    fn request_is_json_with_the_documented_names() {
        let request = LeaseRequest { rate_bytes_per_second: Some(5), ..forward(1_000) };
        let text = r#"{"method":"tcp","direction":"forward","connections":2,"bytes_max":1000,"seconds_max":20,"rate_bytes_per_second":5,"dscp":1}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        assert_eq!(serde_json::from_str::<LeaseRequest>(text).unwrap(), request);
        let unknown = text.replace("forward", "sideways");
        assert!(serde_json::from_str::<LeaseRequest>(&unknown).is_err());
        let answer = LeaseAnswer::Refused {
            reason: RefusalReason::QueueFull,
            detail: "x".to_owned(),
            retry_after_seconds: None,
        };
        let text = r#"{"state":"refused","reason":"queue_full","detail":"x"}"#;
        assert_eq!(serde_json::to_string(&answer).unwrap(), text);
        let newer = text.replace("queue_full", "something_new");
        assert_eq!(refusal(serde_json::from_str(&newer).unwrap()).0, RefusalReason::Other);
    }

    #[test]
    fn run_that_is_larger_than_allowed_is_refused_with_the_limit() {
        let leases = Leases::new(rules("run_bytes_max: 1MB, run_time_max: 10s"), 9863);
        let refused = |request: LeaseRequest| refusal(leases.request(CLIENT, request));
        let allowed = LeaseRequest { seconds_max: 10, ..forward(1_000_000) };
        for (request, detail) in [
            (LeaseRequest { connections: 0, ..allowed.clone() }, "connections: 0; this agent allows 1 to 16"),
            (
                LeaseRequest { connections: 17, ..allowed.clone() },
                "connections: 17; this agent allows 1 to 16",
            ),
            (LeaseRequest { seconds_max: 11, ..allowed.clone() }, "seconds: 11; this agent allows 1 to 10"),
            (LeaseRequest { seconds_max: 0, ..allowed.clone() }, "seconds: 0; this agent allows 1 to 10"),
            (
                LeaseRequest { bytes_max: Some(1_000_001), ..allowed.clone() },
                "bytes: 1000001; this agent allows 1 to 1000000",
            ),
            (
                LeaseRequest { bytes_max: Some(0), ..allowed.clone() },
                "bytes: 0; this agent allows 1 to 1000000",
            ),
        ] {
            assert_eq!(refused(request), (RefusalReason::Invalid, detail.to_owned()));
        }
        assert!(matches!(leases.request(CLIENT, allowed), LeaseAnswer::Granted(_)));
    }

    #[test]
    fn runs_that_are_switched_off_end_and_are_refused() {
        let leases = Leases::new(rules(""), 9863);
        leases.request(CLIENT, forward(1_000));
        leases.request(CLIENT, forward(1_000));
        assert_eq!(leases.counts(), (1, 1));
        leases.set_rules(rules("enabled: false"));
        assert_eq!(leases.counts(), (0, 0));
        assert_eq!(refusal(leases.request(CLIENT, forward(1_000))).0, RefusalReason::Disabled);
        leases.set_rules(rules(""));
        leases.request(CLIENT, forward(1_000));
        leases.shut_down();
        assert_eq!(leases.counts(), (0, 0));
        assert_eq!(refusal(leases.request(CLIENT, forward(1_000))).0, RefusalReason::Stopping);
    }

    #[test]
    fn stopped_runs_do_not_begin_again_at_once() {
        let leases = Leases::new(rules(""), 9863);
        leases.request(CLIENT, forward(1_000));
        assert!(matches!(leases.request(OTHER, forward(1_000)), LeaseAnswer::Waiting { .. }));
        assert_eq!(leases.stop_all(), 1);
        let LeaseAnswer::Refused { reason, retry_after_seconds, .. } = leases.request(OTHER, forward(1_000))
        else {
            panic!("a run begins")
        };
        assert_eq!(reason, RefusalReason::Stopped);
        assert!(retry_after_seconds.is_some_and(|seconds| seconds > 50.0), "{retry_after_seconds:?}");
        let unknown = LeaseRequest { dscp: 64, ..forward(1_000) };
        assert_eq!(refusal(leases.request(OTHER, unknown)).0, RefusalReason::Stopped);
        let fresh = Leases::new(rules(""), 9863);
        let unknown = LeaseRequest { dscp: 64, ..forward(1_000) };
        assert_eq!(refusal(fresh.request(OTHER, unknown)).1, "dscp: 64; 0 to 63 are allowed");
    }

    #[test]
    fn run_that_is_stopped_still_counts_what_it_has_sent() {
        let leases = Leases::new(rules("bytes_per_day: 10MB, path_bytes_per_day: 10MB"), 9863);
        let LeaseAnswer::Granted(grant) = leases.request(CLIENT, forward(5_000_000)) else { panic!() };
        let (id, _) = grant.decode().unwrap();
        leases.attach(id, 0).unwrap();
        leases.set_rules(rules("enabled: false"));
        leases.set_rules(rules("bytes_per_day: 10MB, path_bytes_per_day: 10MB"));
        leases.request(OTHER, forward(1));
        leases.count_bytes(id, 4_000_000);
        leases.end(id);
        assert_eq!(leases.bytes_left(&CLIENT.to_string()), Some(5_999_999));
    }

    #[test]
    fn place_in_the_queue_belongs_to_the_client_that_has_it() {
        let leases = Leases::new(rules(""), 9863);
        leases.request(OTHER, forward(1_000));
        let first = place(&leases.request(CLIENT, forward(1_000)));
        let repeated = LeaseRequest { lease: Some(first.clone()), ..forward(1_000) };
        assert_eq!(place(&leases.request(CLIENT, repeated.clone())), first);
        assert_ne!(place(&leases.request(OTHER, repeated.clone())), first);
        let changed = LeaseRequest { bytes_max: Some(2_000), ..repeated };
        assert_ne!(place(&leases.request(CLIENT, changed)), first);
        assert_eq!(leases.counts(), (1, 3));
    }

    #[test]
    fn bytes_of_the_day_are_limited_and_unused_ones_are_given_back() {
        let leases = Leases::new(rules("bytes_per_day: 10MB, path_bytes_per_day: 6MB, runs_max: 5"), 9863);
        let granted = |client, bytes: Option<u64>| {
            let request = LeaseRequest { bytes_max: bytes, ..forward(1) };
            match leases.request(client, request) {
                LeaseAnswer::Granted(grant) => grant,
                answer @ (LeaseAnswer::Waiting { .. } | LeaseAnswer::Refused { .. }) => panic!("{answer:?}"),
            }
        };
        let first = granted(CLIENT, Some(4_000_000));
        let (reason, detail) = refusal(leases.request(CLIENT, forward(3_000_000)));
        assert_eq!(reason, RefusalReason::Budget);
        let expected =
            "the run may use 3000000 bytes, but the budget of this path has 2000000 bytes left today";
        assert_eq!(detail, expected);
        assert_eq!(granted(CLIENT, None).bytes_max, 2_000_000, "what is left");
        assert_eq!(granted(OTHER, None).bytes_max, 4_000_000, "what is left for the host");
        assert_eq!(refusal(leases.request(OTHER, forward(1))).0, RefusalReason::Budget);
        let (id, _) = first.decode().unwrap();
        assert!(leases.count_bytes(id, 1_000_000));
        leases.end(id);
        assert_eq!(granted(OTHER, None).bytes_max, 2_000_000, "the path has 2 MB left, the host 3 MB");
    }

    #[test]
    fn grant_has_a_secret_of_its_own() {
        let leases = Leases::new(rules("runs_max: 2, rate_max: 80Mbit/s"), 9863);
        let answers = [CLIENT, OTHER].map(|client| leases.request(client, forward(1_000)));
        let [LeaseAnswer::Granted(first), LeaseAnswer::Granted(second)] = answers else {
            panic!("{answers:?}")
        };
        assert_eq!((first.agent_port, first.rate_bytes_per_second), (9863, Some(10_000_000)));
        let ((id, secret), (other_id, other_secret)) = (first.decode().unwrap(), second.decode().unwrap());
        assert!(id != other_id && secret != other_secret);
        assert_eq!(leases.leased(id).unwrap().secret, secret);
        for lease in ["", "+1", "xyz", &"1".repeat(17)] {
            assert_eq!(Grant { lease: lease.to_owned(), ..first.clone() }.decode(), None, "{lease}");
        }
        let short = Grant { secret: first.secret[1..].to_owned(), ..first };
        assert_eq!(short.decode(), None);
    }
}
