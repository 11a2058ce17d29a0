//! Leases of bandwidth runs, with clients that come, wait, run and die at random moments.

use std::collections::BTreeMap;
use std::time::Duration;

use pathmeter_proto::bandwidth::lease::{
    ABSENT_AFTER, ACTIVATION_MAX, LeaseId, LeaseResponse, LeaseTable, RunTerms,
};
use pathmeter_proto::sim::Random;
use pathmeter_proto::time::Timestamp;

use crate::conservation::seeds;

const TERMS: RunTerms = RunTerms { connections: 2, duration_max: Duration::from_secs(10) };

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_nanos(seconds * 1_000_000_000)
}

/// A client of the simulation.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// Repeats its request at this time.
    Waits { next: Timestamp },
    /// Attaches at this time.
    Attaches { at: Timestamp },
    /// Detaches at this time.
    Runs { ends: Timestamp },
    /// Was killed, waiting or running.
    Dead,
}

/// Clients come, wait, run and die at random moments, and the table is checked after each event.
fn simulate(seed: u64) {
    let mut random = Random::new(seed);
    let runs_max = usize::try_from(random.between(1, 4)).unwrap();
    let death = if seed.is_multiple_of(3) { 0.0 } else { 0.1 };
    let mut table = LeaseTable::new(runs_max);
    let mut clients: BTreeMap<LeaseId, Client> = BTreeMap::new();
    let (mut now, end) = (at(0), at(300));
    let mut finished = 0_u32;
    let mut arrivals = 0;
    while now < end {
        now = now + Duration::from_millis(random.between(1, 40));
        if arrivals < 40 && random.chance(0.02) {
            let id = LeaseId(random.draw());
            clients.insert(id, Client::Waits { next: now });
            arrivals += 1;
        }
        for (id, client) in &mut clients {
            let previous = *client;
            *client = match previous {
                Client::Waits { next } if next <= now => match table.request(now, *id, TERMS) {
                    LeaseResponse::Granted { until } => {
                        assert_eq!(until, now + ACTIVATION_MAX, "seed {seed}");
                        Client::Attaches { at: now + Duration::from_millis(random.below(1_000)) }
                    }
                    LeaseResponse::Waiting(place) => {
                        assert!(place.position >= 1 && place.position <= 40, "seed {seed}");
                        Client::Waits { next: now + place.repeat_after }
                    }
                    LeaseResponse::Full { .. } => panic!("seed {seed}: 40 clients"),
                },
                Client::Attaches { at } if at <= now => {
                    assert!(table.attach(now, *id, 0).is_ok(), "seed {seed}");
                    Client::Runs { ends: now + Duration::from_millis(random.below(9_000)) }
                }
                Client::Runs { ends } if ends <= now => {
                    table.release(*id);
                    finished += 1;
                    Client::Dead
                }
                Client::Waits { .. } | Client::Attaches { .. } | Client::Runs { .. } | Client::Dead => {
                    previous
                }
            };
            if !matches!(client, Client::Dead) && random.chance(death / 100.0) {
                *client = Client::Dead;
            }
        }
        assert!(table.running(now) <= runs_max, "seed {seed}");
        let is_running = |client: &&Client| matches!(client, Client::Attaches { .. } | Client::Runs { .. });
        let alive = clients.values().filter(is_running).count();
        assert!(alive <= table.running(now), "seed {seed}: a run without a lease");
    }
    let left = clients.values().filter(|client| !matches!(client, Client::Dead)).count();
    if death == 0.0 {
        assert_eq!((finished, left), (arrivals, 0), "seed {seed}");
        assert_eq!(table.running(now), 0, "seed {seed}");
    }
    // All leases of dead clients, and all that wait, end within the time of one run.
    let later = now + TERMS.duration_max + ABSENT_AFTER + Duration::from_secs(10);
    assert_eq!(table.waiting(later) + table.running(later), 0, "seed {seed}");
}

#[test]
fn runs_never_exceed_the_limit_and_every_client_has_its_turn() {
    for seed in seeds(1_000) {
        simulate(seed);
    }
}

/// An agent of a mesh: its own table, and the run that it wants to make.
struct Agent {
    table: LeaseTable,
    wish: Option<Wish>,
    finished: u32,
}

/// A run that an agent wants to make to a peer.
#[derive(Debug, Clone, Copy)]
struct Wish {
    peer: usize,
    /// Of the lease in its own table, and in that of the peer.
    own: LeaseId,
    remote: LeaseId,
    stage: Stage,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Requests both leases at this time.
    Requests {
        next: Timestamp,
    },
    Runs {
        ends: Timestamp,
    },
}

/// Agents run to each other, each run with a lease at both ends: the own one first, which is given back if
/// the peer has other runs.
fn simulate_mesh(seed: u64) {
    let mut random = Random::new(seed);
    let count = usize::try_from(random.between(2, 5)).unwrap();
    let runs_max = usize::try_from(random.between(1, 2)).unwrap();
    let agent = |_| Agent { table: LeaseTable::new(runs_max), wish: None, finished: 0 };
    let mut agents: Vec<Agent> = (0..count).map(agent).collect();
    let (mut now, end) = (at(0), at(600));
    while now < end {
        now = now + Duration::from_millis(random.between(1, 30));
        for index in 0..count {
            let Some(wish) = agents[index].wish else {
                let peer = (index + 1 + usize::try_from(random.below(count as u64 - 1)).unwrap()) % count;
                let [own, remote] = [random.draw(), random.draw()].map(LeaseId);
                let stage = Stage::Requests { next: now };
                agents[index].wish = Some(Wish { peer, own, remote, stage });
                continue;
            };
            let stage = match wish.stage {
                Stage::Requests { next } if next <= now => {
                    let own = agents[index].table.request(now, wish.own, TERMS);
                    let response = match own {
                        LeaseResponse::Granted { .. } => {
                            agents[wish.peer].table.request(now, wish.remote, TERMS)
                        }
                        LeaseResponse::Waiting(_) | LeaseResponse::Full { .. } => own,
                    };
                    match response {
                        LeaseResponse::Granted { .. } => {
                            agents[index].table.attach(now, wish.own, 0).unwrap();
                            agents[wish.peer].table.attach(now, wish.remote, 0).unwrap();
                            Stage::Runs { ends: now + Duration::from_millis(random.between(100, 3_000)) }
                        }
                        LeaseResponse::Waiting(place) => {
                            agents[index].table.defer(now, wish.own);
                            let jitter = Duration::from_millis(random.below(100));
                            Stage::Requests { next: now + place.repeat_after + jitter }
                        }
                        LeaseResponse::Full { .. } => panic!("seed {seed}: few agents"),
                    }
                }
                Stage::Runs { ends } if ends <= now => {
                    agents[index].table.release(wish.own);
                    agents[wish.peer].table.release(wish.remote);
                    agents[index].wish = None;
                    agents[index].finished += 1;
                    continue;
                }
                stage @ (Stage::Requests { .. } | Stage::Runs { .. }) => stage,
            };
            agents[index].wish = Some(Wish { stage, ..wish });
        }
        for agent in &agents {
            assert!(agent.table.running(now) <= runs_max, "seed {seed}");
        }
    }
    // A run takes 1.6 s on average and two hosts, and each agent has a share of the time.
    let finished: Vec<u32> = agents.iter().map(|agent| agent.finished).collect();
    assert!(finished.iter().all(|runs| *runs >= 60), "seed {seed}: {finished:?}");
}

#[test]
fn agents_that_want_each_other_take_turns() {
    for seed in seeds(100) {
        simulate_mesh(seed);
    }
}
