//! Hosts that all measure each other.

use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pathmeter_lab::truth::{Echoes, Rules};
use pathmeter_lab::{Net, Plan, Way, eventually};
use pathmeter_proto::sim::{Link, Loss};
use pathmeter_proto::time::nanos;
use serde_json::json;

use crate::agent::Agent;

const NAMES: [&str; 3] = ["a", "b", "c"];
const LATE_AFTER: Duration = Duration::from_millis(200);
const LOST_AFTER: Duration = Duration::from_secs(1);

/// One host's uplink loses what it sends, and doubles what it gets. Paths from it lose forward, paths to it lose in reverse,
/// and the path between the others loses nothing.
pub(crate) fn one_bad_uplink() {
    let net = Plan::mesh(NAMES.len()).build(7);
    let agents = NAMES.map(|name| Agent::start(net.node(name), config(&net, name), &[]));
    // Who started first asked hosts on which there was nobody yet.
    let started = Instant::now();
    let patience = LOST_AFTER + LATE_AFTER;
    let before = agents.each_ref().map(|agent| {
        agent.page_when("replies come", |page| {
            page.count("pathmeter_echo_rtt_seconds_count", &[]) > 300 && started.elapsed() > patience
        })
    });
    let begin = wall();
    let mut lossy = Link::perfect(0);
    lossy.loss = Loss::Random(0.04);
    let mut doubling = Link::perfect(0);
    doubling.duplicates = 0.02;
    let wire = net.wire("b", "core");
    wire.become_like(&lossy, &doubling);
    let enough = wire.entered(Way::Forward) + 3_000;
    eventually("datagrams meet the bad link", || (wire.entered(Way::Forward) > enough).then_some(()));
    wire.become_like(&Link::perfect(0), &Link::perfect(0));
    let (calm, end) = (Instant::now(), wall());
    let enough = wire.entered(Way::Forward) + 500;
    eventually("what met it is decided", || {
        (calm.elapsed() > patience && wire.entered(Way::Forward) > enough).then_some(())
    });
    for ((agent, before), from) in agents.iter().zip(&before).zip(NAMES) {
        let page = agent.page();
        let since = |name, labels: &[&str]| page.count(name, labels) - before.count(name, labels);
        for to in NAMES.into_iter().filter(|to| *to != from) {
            let truth = truth(&net, from, to, &(begin..end));
            let peer = format!("peer=\"{to}\"");
            let lost = |direction| since("pathmeter_echo_lost_total", &[&peer, direction]);
            let said =
                [lost("direction=\"forward\""), lost("direction=\"reverse\""), lost("direction=\"unknown\"")];
            assert_eq!(said, [truth.lost[0], truth.lost[1], 0], "lost from {from} to {to}\n{page}");
            assert_eq!(truth.lost[0] > 0, from == "b", "from {from} to {to}");
            assert_eq!(truth.lost[1] > 0, to == "b", "from {from} to {to}");
            let duplicates = since("pathmeter_echo_duplicates_total", &[&peer]);
            assert_eq!(duplicates, truth.duplicates, "duplicates from {from} to {to}\n{page}");
        }
        assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
    }
}

fn config(net: &Net, name: &str) -> serde_json::Value {
    let peers: Vec<_> = NAMES.iter().map(|name| json!({"name": name, "address": net.v4(name)})).collect();
    json!({
        "agent": {"name": name, "grace": "1s"},
        "peers": peers,
        "probes": [{"name": "mesh", "interval": "5ms", "flows": 2, "late_after": "200ms", "lost_after": "1s"}],
    })
}

/// Nanoseconds since 1970.
fn wall() -> u64 {
    nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

struct Truth {
    lost: [u64; 2],
    duplicates: u64,
}

fn truth(net: &Net, from: &str, to: &str, time: &Range<u64>) -> Truth {
    let address = |name: &str| -> IpAddr { net.v4(name) };
    let rules = Rules {
        prober: address(from),
        responder: (address(to), 9_862).into(),
        is_authenticated: false,
        late_after: LATE_AFTER,
        lost_after: LOST_AFTER,
    };
    let stages = [vec![net.wire(from, "core")], vec![net.wire(to, "core")]];
    let counts = Echoes::read(&stages, &rules).within(time).counts(&rules);
    Truth { lost: [counts.lost_forward, counts.lost_reverse], duplicates: counts.duplicates }
}
