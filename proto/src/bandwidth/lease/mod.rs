//! Leases: which runs may use this host, and in which order others wait.
//!
//! A client requests a lease and repeats the request while it waits, which keeps its place in the queue. A
//! granted lease becomes active when the first connection of the run attaches to it. It ends with the run, or
//! at its deadline: the death of a client occupies the host for a known time. The runs that this host starts
//! itself need a lease of its own table too, so that a host never takes part in more than `runs_max` runs.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use crate::time::Timestamp;

/// Identifies a lease, or a place in the queue. The table's user chooses it at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// What a run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunTerms {
    /// Number of connections, at most 64.
    pub connections: u16,
    /// How long it may take from the first connection to the last.
    pub duration_max: Duration,
}

/// Maximum clients that wait. Chosen: each takes about 200 bytes; further ones are refused.
pub const WAITING_MAX: usize = 1_000;

/// How long a client may take to attach after its lease was granted; then the lease expires. Chosen: several
/// round trips of a slow path, with retransmissions.
pub const ACTIVATION_MAX: Duration = Duration::from_secs(5);

/// A client that has not repeated its request this long after it was due no longer waits. Chosen: more than
/// the deadline of a request.
pub const ABSENT_AFTER: Duration = Duration::from_secs(5);

/// A client whose request is overdue by more than this lets others pass, but keeps its place. Chosen: a few
/// round trips, with the delay of a busy host.
const OVERDUE_AFTER: Duration = Duration::from_millis(500);

/// Limits of the time after which a client repeats its request: the shorter one for those that are next, and
/// so much more for each round of runs before a client. 1,000 clients send 220 requests per second.
const REPEAT_MIN: Duration = Duration::from_millis(200);
const REPEAT_MAX: Duration = Duration::from_secs(5);

/// The response to a request for a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseResponse {
    /// The run may begin. The first connection must attach by this time.
    Granted {
        /// When the lease expires without one.
        until: Timestamp,
    },
    /// Other runs come first.
    Waiting(Place),
    /// Too many clients wait.
    Full {
        /// When a request may succeed.
        retry_after: Duration,
    },
}

/// A place in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// 1 for the next one.
    pub position: usize,
    /// The time until the run can begin if all runs before it take as long as they may. It is usually less.
    pub expected_start: Duration,
    /// When the client must repeat its request to keep its place.
    pub repeat_after: Duration,
}

/// Why a connection cannot attach to a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// There is no such lease: it was not granted, has expired, or has ended.
    #[error("the lease is not valid: it was not granted, or it has ended")]
    Invalid,
    /// A connection with this number has attached before, or the number is beyond the terms.
    #[error("the lease has no connection of this number left")]
    Taken,
}

/// The leases and the queue of a host.
#[derive(Debug)]
pub struct LeaseTable {
    runs_max: usize,
    leases: BTreeMap<LeaseId, Lease>,
    /// The waiting clients, by their place.
    queue: BTreeMap<u64, Waiting>,
    places: BTreeMap<LeaseId, u64>,
    next_place: u64,
}

#[derive(Debug)]
struct Lease {
    terms: RunTerms,
    until: Timestamp,
    /// The numbers of connections that have attached.
    attached: BTreeSet<u16>,
}

#[derive(Debug)]
struct Waiting {
    id: LeaseId,
    terms: RunTerms,
    /// When its next request is due.
    due: Timestamp,
    /// Whether it had its turn and gave it back: it holds up no other client.
    has_passed: bool,
}

/// The place of the first client. Those that are put in front of the queue have smaller ones.
const FIRST_PLACE: u64 = u64::MAX / 2;

impl LeaseTable {
    /// A table for `runs_max` runs at a time.
    #[must_use]
    pub fn new(runs_max: usize) -> Self {
        let (leases, queue, places) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { runs_max, leases, queue, places, next_place: FIRST_PLACE }
    }

    /// Changes the number of runs at a time. Runs beyond it continue.
    pub fn set_runs_max(&mut self, runs_max: usize) {
        self.runs_max = runs_max;
    }

    /// Requests a lease, or repeats the request.
    ///
    /// The lease is granted if fewer than `runs_max` runs use the host, and if enough of these are left for
    /// the clients before it whose own repetition is not overdue.
    pub fn request(&mut self, now: Timestamp, id: LeaseId, terms: RunTerms) -> LeaseResponse {
        self.expire(now);
        if let Some(lease) = self.leases.get(&id) {
            return LeaseResponse::Granted { until: lease.until };
        }
        let place = self.places.get(&id).copied().unwrap_or(self.next_place);
        let free = self.runs_max.saturating_sub(self.leases.len());
        let is_before = |(earlier, waiting): &(&u64, &Waiting)| {
            **earlier < place && !waiting.has_passed && now <= waiting.due + OVERDUE_AFTER
        };
        if self.queue.iter().filter(is_before).take(free).count() < free {
            self.leave_queue(id);
            let until = now + ACTIVATION_MAX;
            self.leases.insert(id, Lease { terms, until, attached: BTreeSet::new() });
            return LeaseResponse::Granted { until };
        }
        let position = self.queue.range(..place).count() + 1;
        let expected_start = self.expected_start(now, place);
        if !self.places.contains_key(&id) {
            if self.queue.len() >= WAITING_MAX {
                return LeaseResponse::Full { retry_after: self.expected_start(now, 0).max(REPEAT_MAX) };
            }
            self.next_place += 1;
            self.places.insert(id, place);
        }
        let rounds = u32::try_from(position.div_ceil(self.runs_max.max(1))).unwrap_or(u32::MAX);
        let repeat_after =
            (expected_start / 2).clamp(REPEAT_MIN, (REPEAT_MIN * rounds.min(25)).min(REPEAT_MAX));
        self.queue.insert(place, Waiting { id, terms, due: now + repeat_after, has_passed: false });
        LeaseResponse::Waiting(Place { position, expected_start, repeat_after })
    }

    /// Attaches connection `number` of a run, from 0. The first one starts the time of the run. Returns when
    /// the run must have ended.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&mut self, now: Timestamp, id: LeaseId, number: u16) -> Result<Timestamp, AttachError> {
        self.expire(now);
        let lease = self.leases.get_mut(&id).ok_or(AttachError::Invalid)?;
        if number >= lease.terms.connections || lease.attached.contains(&number) {
            return Err(AttachError::Taken);
        }
        if lease.attached.is_empty() {
            lease.until = now + lease.terms.duration_max;
        }
        lease.attached.insert(number);
        Ok(lease.until)
    }

    /// Ends a lease, or leaves the queue. Without effect if it has ended already.
    pub fn release(&mut self, id: LeaseId) {
        self.leases.remove(&id);
        self.leave_queue(id);
    }

    /// Takes back a lease that no connection has attached to. Its owner waits again, before all others, but
    /// lets them pass until it requests the lease again. Without this, two hosts whose runs wait for each
    /// other would deadlock.
    pub fn defer(&mut self, now: Timestamp, id: LeaseId) {
        let Some(lease) = self.leases.remove(&id) else { return };
        let first = self.queue.first_key_value().map_or(self.next_place, |(place, _)| *place);
        let place = first - 1;
        self.places.insert(id, place);
        let due = now + REPEAT_MIN;
        self.queue.insert(place, Waiting { id, terms: lease.terms, due, has_passed: true });
    }

    /// Ends all leases and empties the queue.
    pub fn release_all(&mut self) {
        self.leases.clear();
        self.queue.clear();
        self.places.clear();
    }

    /// Whether a lease is valid. Its run must stop when it is not.
    #[must_use]
    pub fn is_valid(&self, now: Timestamp, id: LeaseId) -> bool {
        self.leases.get(&id).is_some_and(|lease| now < lease.until)
    }

    /// Whether a lease is valid or waited for.
    #[must_use]
    pub fn is_known(&self, now: Timestamp, id: LeaseId) -> bool {
        let waiting = self.places.get(&id).and_then(|place| self.queue.get(place));
        self.is_valid(now, id) || waiting.is_some_and(|waiting| now <= waiting.due + ABSENT_AFTER)
    }

    /// Number of leases: granted ones and runs in progress.
    #[must_use]
    pub fn running(&self, now: Timestamp) -> usize {
        self.leases.values().filter(|lease| now < lease.until).count()
    }

    /// Number of waiting clients.
    #[must_use]
    pub fn waiting(&self, now: Timestamp) -> usize {
        self.queue.values().filter(|waiting| now <= waiting.due + ABSENT_AFTER).count()
    }

    /// When the client at `place` can start if all runs before it take as long as they may.
    fn expected_start(&self, now: Timestamp, place: u64) -> Duration {
        let running = self.leases.values().map(|lease| {
            // A granted lease has its whole run before it.
            let before = if lease.attached.is_empty() { lease.terms.duration_max } else { Duration::ZERO };
            Reverse(lease.until + before)
        });
        let mut ends: BinaryHeap<_> = running.collect();
        while ends.len() < self.runs_max {
            ends.push(Reverse(now));
        }
        while ends.len() > self.runs_max.max(1) {
            // After runs_max was reduced: a run that ends early makes no room.
            ends.pop();
        }
        for (_, waiting) in self.queue.range(..place) {
            if let Some(Reverse(start)) = ends.pop() {
                ends.push(Reverse(start + waiting.terms.duration_max));
            }
        }
        ends.peek().map_or(REPEAT_MAX, |Reverse(start)| start.since(now))
    }

    fn expire(&mut self, now: Timestamp) {
        self.leases.retain(|_, lease| now < lease.until);
        self.queue.retain(|_, waiting| {
            let is_present = now <= waiting.due + ABSENT_AFTER;
            if !is_present {
                self.places.remove(&waiting.id);
            }
            is_present
        });
    }

    fn leave_queue(&mut self, id: LeaseId) {
        if let Some(place) = self.places.remove(&id) {
            self.queue.remove(&place);
        }
    }
}
