//! A full mesh of hosts that measure each other.

use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pathmeter_lab::scenario::{Phase, Scenario};
use pathmeter_lab::truth::{EchoFormat, Echoes, Rules, TrueCounts};
use pathmeter_lab::{Cable, MetricsPage, Net, Wire, WireDirection, eventually};
use pathmeter_proto::time::nanos;
use serde_json::json;

use crate::agent::NodeAgent;
use crate::testbed::{Inconclusive, apply, remove_impairments, seed};

const NAMES: [&str; 3] = ["a", "b", "c"];
const LATE_AFTER: Duration = Duration::from_millis(500);
const LOST_AFTER: Duration = Duration::from_secs(3);

/// Time until every request in flight has its verdict.
const SETTLE_TIME: Duration = Duration::from_millis(3_500);

/// Datagrams in flight when links change may meet the new links.
const TRANSIT_TIME: Duration = Duration::from_millis(100);

/// All agents report the impaired uplink correctly, for every pair.
pub(crate) fn one_bad_uplink(scenario: &Scenario) -> Result<(), Inconclusive> {
    let [phase] = &scenario.phases[..] else { panic!("one phase, with one wire") };
    let Cable(bad, core) = &phase.wires.keys().next().expect("one wire").0;
    let net = scenario.topology.plan().build(seed());
    remove_impairments(scenario, &net);
    let agents = NAMES.map(|name| NodeAgent::start(net.node(name), config(scenario, &net, name), &[]));
    let before = wait_until_settled(&agents);
    let begin = wall() - nanos(TRANSIT_TIME);
    let end = run_phase(scenario, phase, &net, net.wire(bad, core));
    for ((agent, before), from) in agents.iter().zip(&before).zip(NAMES) {
        let page = agent.page();
        let since = |name, labels: &[&str]| page.count(name, labels) - before.count(name, labels);
        for to in NAMES.into_iter().filter(|to| *to != from) {
            let truth = truth(&net, from, to, &(begin..end));
            let stood_still = Duration::from_nanos(truth.turnaround_max);
            if stood_still > LOST_AFTER / 2 {
                return Err(Inconclusive(format!("{to} did not run for {stood_still:?}")));
            }
            let peer = format!("peer=\"{to}\"");
            let lost = ["forward", "reverse", "unknown"].map(|direction| {
                since("pathmeter_echo_lost_total", &[&peer, &format!("direction=\"{direction}\"")])
            });
            let true_losses = [truth.lost_forward, truth.lost_reverse, 0];
            assert_eq!(lost, true_losses, "lost forward, reverse, unknown from {from} to {to}\n{page}");
            assert_eq!(truth.lost_forward > 0, from == bad, "from {from} to {to}");
            assert_eq!(truth.lost_reverse > 0, to == bad, "from {from} to {to}");
            let duplicates = since("pathmeter_echo_duplicates_total", &[&peer]);
            assert_eq!(duplicates, truth.duplicates, "duplicates from {from} to {to}\n{page}");
        }
        assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
    }
    Ok(())
}

/// Waits until requests to hosts whose agent had not started yet have their verdict.
fn wait_until_settled(agents: &[NodeAgent<'_>]) -> Vec<MetricsPage> {
    let started = Instant::now();
    let is_settled = |page: &MetricsPage| {
        page.count("pathmeter_echo_rtt_seconds_count", &[]) > 300 && started.elapsed() > SETTLE_TIME
    };
    agents.iter().map(|agent| agent.page_when("replies come", is_settled)).collect()
}

/// Runs the phase and waits until every request that met it has its verdict. Returns when the phase ended.
fn run_phase(scenario: &Scenario, phase: &Phase, net: &Net, wire: &Wire) -> u64 {
    let more = |count| wire.entered(WireDirection::Forward) + count;
    apply(phase, net);
    let enough = more(phase.datagrams);
    eventually("datagrams meet the bad link", || {
        (wire.entered(WireDirection::Forward) > enough).then_some(())
    });
    remove_impairments(scenario, net);
    let (remove_impairments, end) = (Instant::now(), wall());
    let enough = more(500);
    eventually("requests of the phase are decided", || {
        (remove_impairments.elapsed() > SETTLE_TIME && wire.entered(WireDirection::Forward) > enough)
            .then_some(())
    });
    end
}

fn config(scenario: &Scenario, net: &Net, name: &str) -> serde_json::Value {
    let peers: Vec<_> = NAMES.iter().map(|name| json!({"name": name, "address": net.v4(name)})).collect();
    let mut probe = serde_json::to_value(&scenario.probe).unwrap();
    probe["name"] = "mesh".into();
    json!({"agent": {"name": name, "grace": "1s"}, "peers": peers, "probes": [probe]})
}

/// Nanoseconds since 1970.
fn wall() -> u64 {
    nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

fn truth(net: &Net, from: &str, to: &str, time: &Range<u64>) -> TrueCounts {
    let rules = Rules {
        prober: net.v4(from),
        responder: (net.v4(to), 9_862).into(),
        format: EchoFormat::Open,
        late_after: LATE_AFTER,
        lost_after: LOST_AFTER,
        hidden_routers: [0, 0],
    };
    let wire_groups = [vec![net.wire(from, "core")], vec![net.wire(to, "core")]];
    Echoes::read(&wire_groups, &rules).within(time).counts(&rules)
}
