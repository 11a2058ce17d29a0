//! Several ways of equal cost, one of which is bad.

use pathmeter_lab::script::{Pair, Phase, Script};
use pathmeter_lab::truth::Echoes;
use pathmeter_lab::{Cable, Way};

use crate::play::{Drill, Inconclusive, on_stage};

/// What the script does to a way is done to one that takes some of the flows, and not all.
pub(crate) fn one_bad_way(script: &Script) -> Result<(), Inconclusive> {
    let [Phase { datagrams, wires }] = &script.phases[..] else { panic!("one phase, with one wire") };
    let pair: &Pair = wires.values().next().expect("one wire");
    on_stage(script, Drill::default(), |stage| {
        stage.settle();
        // Which way takes which flow is the routers' choice.
        let taken = stage.net.wires().map(|(cable, wire)| (wire.entered(Way::Forward), cable));
        let (_, chosen) = taken.filter(|(count, _)| *count > 0).min().expect("one of the ways is taken");
        let Cable(first, second) = chosen;
        let name = format!("{first}-{second}").try_into().unwrap();
        stage.run(&Phase { datagrams: *datagrams, wires: [(name, pair.clone())].into() });
        stage.settle_down();
        let ended = stage.finish();
        ended.compare(script)?;
        let rules = stage.rules();
        let flows = Echoes::read(&stage.stages(), &rules).flows(&rules);
        let is_lossy = |(lost, all): &&(u64, u64)| *lost >= 2 && *lost * 100 >= *all;
        let truth = flows.values().filter(is_lossy).count() as u64;
        assert!(truth > 0 && truth < 16, "{truth} of 16 flows are lossy: that shows nothing");
        assert_eq!(ended.page.count("pathmeter_echo_flows", &[]), 16);
        assert_eq!(ended.page.count("pathmeter_echo_flows_lossy", &[]), truth, "{flows:?}\n{}", ended.page);
        assert!(!ended.page.text().contains("flow=\""), "a flow has series of its own");
        Ok(())
    })
}
