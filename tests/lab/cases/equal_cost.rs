//! Several equal-cost paths, one of which is impaired.

use pathmeter_lab::scenario::{LinkPair, Phase, Scenario};
use pathmeter_lab::truth::Echoes;
use pathmeter_lab::{Cable, WireDirection};

use crate::testbed::{AgentEnvironments, Inconclusive, with_testbed};

/// Impairs, as the scenario says, a path that carries some of the flows but not all.
pub(crate) fn one_bad_path(scenario: &Scenario) -> Result<(), Inconclusive> {
    let [Phase { datagrams, wires }] = &scenario.phases[..] else { panic!("one phase, with one wire") };
    let pair: &LinkPair = wires.values().next().expect("one wire");
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        // The routers choose which path carries which flow.
        let taken = testbed.net.wires().map(|(cable, wire)| (wire.entered(WireDirection::Forward), cable));
        let (_, chosen) =
            taken.filter(|(count, _)| *count > 0).min().expect("one of the paths carries flows");
        let Cable(first, second) = chosen;
        let name = format!("{first}-{second}").try_into().unwrap();
        testbed.run_phase(&Phase { datagrams: *datagrams, wires: [(name, pair.clone())].into() });
        testbed.wait_until_decided();
        let outcome = testbed.finish();
        outcome.compare(scenario)?;
        let rules = testbed.rules();
        let flows = Echoes::read(&testbed.wire_groups(), &rules).flows(&rules);
        let is_lossy = |(lost, all): &&(u64, u64)| *lost >= 2 && *lost * 100 >= *all;
        let truth = flows.values().filter(is_lossy).count() as u64;
        assert!(truth > 0 && truth < 16, "{truth} of 16 flows are lossy, which proves nothing");
        assert_eq!(outcome.page.count("pathmeter_echo_flows", &[]), 16);
        assert_eq!(
            outcome.page.count("pathmeter_echo_flows_lossy", &[]),
            truth,
            "{flows:?}\n{}",
            outcome.page
        );
        assert!(!outcome.page.text().contains("flow=\""), "a flow has series of its own");
        Ok(())
    })
}
