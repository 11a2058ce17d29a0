//! Links that large datagrams do not fit through.

use std::time::Duration;

use pathmeter_lab::Page;
use pathmeter_lab::script::Script;

use crate::play::{Drill, Inconclusive, Measured, on_stage};

/// A size that nobody answers is asked for again and again before it counts as refused.
const PATIENCE: Duration = Duration::from_secs(90);

/// The MTUs of the phases are found one after the other, and told as events. What the reverse direction does makes no
/// difference, and the echoes, which fit, are as ever.
pub(crate) fn black_hole(script: &Script) -> Result<(), Inconclusive> {
    on_stage(script, Drill::default(), |stage| {
        let mut expected = Vec::new();
        let mut known = None;
        for phase in &script.phases {
            let pair = phase.wires.values().next().expect("one wire");
            let mtu = pair.forward.link().mtu.unwrap_or(1_500) as u64;
            stage.run(phase);
            let page = becomes(stage, mtu);
            assert_eq!(page.count("pathmeter_path_mtu_changes_total", &[]), expected.len() as u64);
            expected.push((known.replace(mtu), Some(mtu)));
        }
        let events: serde_json::Value =
            serde_json::from_str(&stage.prober.get("/api/v1/events").body).unwrap();
        let told = events["events"].as_array().unwrap().iter().map(|event| {
            assert_eq!(
                (&event["event"], &event["peer"]),
                (&"path_mtu_changed".into(), &"b".into()),
                "{events}"
            );
            (event["from"].as_u64(), event["to"].as_u64())
        });
        assert_eq!(told.collect::<Vec<_>>(), expected);
        let log = stage.prober.log();
        let is_news = |words: &str| assert!(log.contains(words), "{words}\n{log}");
        for pair in expected.windows(2) {
            is_news(if pair[0].1 > pair[1].1 { "path MTU decreased" } else { "path MTU increased" });
        }
        stage.settle_down();
        stage.finish().compare(script)
    })
}

/// The cable between two routers has a smaller MTU, at both ends.
pub(crate) fn router(script: &Script) -> Result<(), Inconclusive> {
    on_stage(script, Drill::default(), |stage| {
        for router in ["r1", "r2"] {
            stage.net.node(router).ip("link set e1 mtu 1428");
        }
        becomes(stage, 1_428);
        stage.settle_down();
        stage.finish().compare(script)
    })
}

fn becomes(stage: &Measured<'_>, bytes: u64) -> Page {
    let is_known = |page: &Page| page.has("pathmeter_path_mtu_bytes", &[]);
    let is_so = |page: &Page| is_known(page) && page.count("pathmeter_path_mtu_bytes", &[]) == bytes;
    stage.prober.page_within(PATIENCE, &format!("a path MTU of {bytes} is found"), is_so)
}
