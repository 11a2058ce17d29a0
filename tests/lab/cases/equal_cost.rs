//! Several ways of equal cost, one of which is bad.

use pathmeter_lab::script::{LinkText, Pair, Phase, Script};
use pathmeter_lab::truth::Echoes;
use pathmeter_lab::{Cable, Way};

use crate::play::{Drill, on_stage};

/// One of four ways loses 5 %. The path's series say how many of its flows do, and no flow has series of its own.
pub(crate) fn one_way_of_four_is_lossy() {
    let script = Script::parse(
        "about: Some flows lose and some do not.
topology: diamond 4
probe: {interval: 2ms, flows: 16, late_after: 200ms, lost_after: 1s}
phases: []",
    )
    .unwrap();
    let lossy: LinkText = serde_yaml::from_str("{delay: 0ms, loss: 5%}").unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        // Which way takes which flow is the routers' choice; one that takes a few of them is to be bad.
        let carried = |(cable, wire): (&Cable, _)| -> Option<(usize, Cable)> {
            let wire: &pathmeter_lab::Wire = wire;
            Some((wire.entered(Way::Forward), cable.clone())).filter(|(count, _)| *count > 0)
        };
        let (_, chosen) = stage.net.wires().filter_map(carried).min().expect("one of the ways is taken");
        let Cable(first, second) = &chosen;
        let pair = Pair { forward: lossy.clone(), reverse: LinkText::default() };
        let name = format!("{first}-{second}").try_into().unwrap();
        stage.run(&Phase { datagrams: 6_000, wires: [(name, pair)].into() });
        stage.settle_down();
        let ended = stage.finish();
        ended.compare(&script);
        let rules = stage.rules();
        let flows = Echoes::read(&stage.stages(), &rules).flows(&rules);
        let is_lossy = |(lost, all): &&(u64, u64)| *lost >= 2 && *lost * 100 >= *all;
        let truth = flows.values().filter(is_lossy).count() as u64;
        assert!(truth > 0 && truth < 16, "{truth} of 16 flows are lossy: that shows nothing");
        assert_eq!(ended.page.count("pathmeter_echo_flows", &[]), 16);
        assert_eq!(ended.page.count("pathmeter_echo_flows_lossy", &[]), truth, "{flows:?}\n{}", ended.page);
        assert!(!ended.page.text().contains("flow=\""), "a flow has series of its own");
    });
}
