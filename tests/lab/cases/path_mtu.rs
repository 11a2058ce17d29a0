//! Links that large datagrams do not fit through.

use std::time::Duration;

use pathmeter_lab::Page;
use pathmeter_lab::script::Script;
use pathmeter_proto::sim::Link;

use crate::play::{Drill, Measured, on_stage};

/// A size that nobody answers is asked for again and again before it counts as refused.
const PATIENCE: Duration = Duration::from_secs(90);

/// A link swallows what is too long, without a word. It is found to the byte, again when it is narrower, and again when it is
/// wider; what it does in the other direction makes no difference; and the echoes, which fit, tell nothing of it.
pub(crate) fn black_hole() {
    let script = Script::parse(
        "about: A clamped MTU is found, and no echo is lost to it.
topology: pair
probe: {interval: 20ms, flows: 2, late_after: 200ms, lost_after: 300ms, path_mtu: {interval: 1s, ceiling: 1500B}}
phases: []",
    )
    .unwrap();
    on_stage(&script, Drill::default(), |stage| {
        let clamp = |forward, reverse| {
            let link = |mtu| {
                let mut link = Link::perfect(1_000_000);
                link.mtu = mtu;
                link
            };
            stage.net.wire("a", "b").become_like(&link(forward), &link(reverse));
        };
        clamp(Some(1_437), Some(1_250));
        becomes(stage, 1_437);
        clamp(Some(1_337), None);
        becomes(stage, 1_337);
        clamp(None, None);
        let page = becomes(stage, 1_500);
        assert_eq!(page.count("pathmeter_path_mtu_changes_total", &[]), 2);
        let log = stage.prober.log();
        assert!(log.contains("the path MTU shrank"), "{log}");
        assert!(log.contains("the path MTU grew"), "{log}");
        let events: serde_json::Value =
            serde_json::from_str(&stage.prober.get("/api/v1/events").body).unwrap();
        let steps = events["events"].as_array().unwrap().iter().map(|event| {
            assert_eq!(
                (&event["event"], &event["peer"]),
                (&"path_mtu_changed".into(), &"b".into()),
                "{events}"
            );
            (event["from"].as_u64(), event["to"].as_u64())
        });
        let expected = [(None, Some(1_437)), (Some(1_437), Some(1_337)), (Some(1_337), Some(1_500))];
        assert_eq!(steps.collect::<Vec<_>>(), expected);
        stage.settle_down();
        stage.finish().compare(&script);
    });
}

/// A router in the middle has a narrower link, and says so. Of either family.
pub(crate) fn router_that_speaks() {
    for family in ["ipv6: false", "ipv6: true"] {
        let script = Script::parse(&format!(
            "about: A router's word leads to the path MTU at once.
{family}
topology: chain 2
probe: {{interval: 20ms, late_after: 200ms, lost_after: 1s, path_mtu: {{interval: 1s, ceiling: 9000B}}}}
phases: []"
        ))
        .unwrap();
        on_stage(&script, Drill::default(), |stage| {
            // The cable between the two routers, from both ends.
            for router in ["r1", "r2"] {
                stage.net.node(router).ip("link set e1 mtu 1428");
            }
            becomes(stage, 1_428);
            stage.settle_down();
            stage.finish().compare(&script);
        });
    }
}

fn becomes(stage: &Measured<'_>, bytes: u64) -> Page {
    let is_known = |page: &Page| page.has("pathmeter_path_mtu_bytes", &[]);
    let is_so = |page: &Page| is_known(page) && page.count("pathmeter_path_mtu_bytes", &[]) == bytes;
    stage.prober.page_within(PATIENCE, &format!("a path MTU of {bytes} is found"), is_so)
}
