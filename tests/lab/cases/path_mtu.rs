//! Links with a limited MTU.

use std::time::Duration;

use pathmeter_lab::MetricsPage;
use pathmeter_lab::scenario::Scenario;

use crate::testbed::{AgentEnvironments, Inconclusive, Testbed, with_testbed};

/// Longest search for a path MTU. A size without reply is probed several times before it counts as too large.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(90);

/// The MTUs of the phases are found one after the other and reported as events. An MTU in the reverse
/// direction makes no difference, and small echoes are not affected.
pub(crate) fn black_hole(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        let mut expected = Vec::new();
        let mut known = None;
        for phase in &scenario.phases {
            let pair = phase.wires.values().next().expect("one wire");
            let mtu = pair.forward.link().mtu.unwrap_or(1_500) as u64;
            testbed.run_phase(phase);
            let page = wait_for_mtu(testbed, mtu);
            assert_eq!(page.count("pathmeter_path_mtu_changes_total", &[]), expected.len() as u64);
            expected.push((known.replace(mtu), Some(mtu)));
        }
        let events: serde_json::Value =
            serde_json::from_str(&testbed.prober.get("/api/v1/events").body).unwrap();
        let changes = events["events"].as_array().unwrap().iter().map(|event| {
            assert_eq!(
                (&event["event"], &event["peer"]),
                (&"path_mtu_changed".into(), &"b".into()),
                "{events}"
            );
            (event["from"].as_u64(), event["to"].as_u64())
        });
        assert_eq!(changes.collect::<Vec<_>>(), expected);
        let log = testbed.prober.log();
        let assert_logged = |words: &str| assert!(log.contains(words), "{words}\n{log}");
        for pair in expected.windows(2) {
            assert_logged(if pair[0].1 > pair[1].1 { "path MTU decreased" } else { "path MTU increased" });
        }
        testbed.wait_until_decided();
        testbed.finish().compare(scenario)
    })
}

/// The cable between two routers has a smaller MTU at both ends.
pub(crate) fn router(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        for router in ["r1", "r2"] {
            testbed.net.node(router).ip("link set e1 mtu 1428");
        }
        wait_for_mtu(testbed, 1_428);
        testbed.wait_until_decided();
        testbed.finish().compare(scenario)
    })
}

fn wait_for_mtu(testbed: &Testbed<'_>, bytes: u64) -> MetricsPage {
    let is_known = |page: &MetricsPage| page.has("pathmeter_path_mtu_bytes", &[]);
    let is_so = |page: &MetricsPage| is_known(page) && page.count("pathmeter_path_mtu_bytes", &[]) == bytes;
    testbed.prober.page_within(DISCOVERY_TIMEOUT, &format!("a path MTU of {bytes} is found"), is_so)
}
