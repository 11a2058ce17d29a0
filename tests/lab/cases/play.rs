//! Plays a scenario, and compares.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use pathmeter_lab::script::{Evidence, Pair, Phase, Script, Topology};
use pathmeter_lab::truth::{Counts, Echoes, Rules, Stage, forged};
use pathmeter_lab::{Cable, Net, Page, Way, eventually};
use serde_json::{Value, json};

use crate::agent::Agent;

/// Seeds the wires. The agents' own phases and jitter are theirs to choose: what is compared is the truth of this very run.
const SEED: u64 = 7;

/// Plays a scenario to its end.
///
/// # Panics
/// With every count that is not the truth's, or when the scenario did not do what it set out to.
pub(crate) fn play(script: &Script) {
    on_stage(script, Drill::default(), |stage| {
        stage.settle();
        for phase in &script.phases {
            stage.run(phase);
        }
        stage.settle_down();
        stage.finish().compare(script);
    });
}

/// Environment variables of the two agents.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Drill<'a> {
    pub(crate) prober: &'a [(&'a str, &'a str)],
    pub(crate) responder: &'a [(&'a str, &'a str)],
}

/// Builds a scenario's network, with its agents, for what happens there.
pub(crate) fn on_stage<T>(script: &Script, drill: Drill<'_>, act: impl FnOnce(&Measured<'_>) -> T) -> T {
    let net = script.topology.plan().build(SEED);
    let responder = Agent::start(net.node("b"), config(script, &net, "b"), drill.responder);
    let prober = Agent::start(net.node("a"), config(script, &net, "a"), drill.prober);
    act(&Measured { script, net: &net, prober: &prober, responder: &responder })
}

/// The configuration of one of the two agents.
pub(crate) fn config(script: &Script, net: &Net, name: &str) -> Value {
    let address = |node: &str| if script.ipv6 { net.v6(node) } else { net.v4(node) };
    let probe = serde_json::to_value(&script.probe).unwrap();
    let probes = (0..script.paths).map(|number| {
        let mut probe = probe.clone();
        probe["name"] = format!("echo-{number}").into();
        probe["kind"] = "echo".into();
        probe
    });
    let mut config = json!({
        "agent": {"name": name, "grace": "1s"},
        "peers": [{"name": "a", "address": address("a")}, {"name": "b", "address": address("b")}],
        "probes": if name == "a" { probes.collect() } else { Vec::new() },
    });
    if script.authenticated {
        config["key_file"] = "".into();
    }
    config
}

/// An agent that measures another across a network.
pub(crate) struct Measured<'a> {
    pub(crate) script: &'a Script,
    pub(crate) net: &'a Net,
    pub(crate) prober: &'a Agent<'a>,
    pub(crate) responder: &'a Agent<'a>,
}

/// What it said in the end, and what was true.
pub(crate) struct Ended {
    pub(crate) page: Page,
    pub(crate) responder: Page,
    pub(crate) truth: Counts,
    pub(crate) forged: [u64; 2],
}

impl<'a> Measured<'a> {
    pub(crate) fn rules(&self) -> Rules {
        let span = |key: &str, default: Duration| {
            let text = self.script.probe.get(key).and_then(|value| value.as_str());
            let span = text.map(|text| pathmeter_lab::script::Span::try_from(text.to_owned()).unwrap().0);
            span.unwrap_or(default)
        };
        Rules {
            prober: self.address("a"),
            responder: (self.address("b"), 9_862).into(),
            is_authenticated: self.script.authenticated,
            late_after: span("late_after", Duration::from_secs(1)),
            lost_after: span("lost_after", Duration::from_secs(3)),
        }
    }

    /// Everybody knows everybody before anything bad happens.
    pub(crate) fn settle(&self) {
        self.calm();
        let enough = 30 * self.flows() * u64::from(self.script.paths);
        self.prober
            .page_when("replies come", |page| page.count("pathmeter_echo_rtt_seconds_count", &[]) >= enough);
    }

    fn flows(&self) -> u64 {
        self.script.probe.get("flows").and_then(serde_yaml::Value::as_u64).unwrap_or(1)
    }

    /// Links that harm no datagram, otherwise like those of the first phase.
    fn calm(&self) {
        for (cable, wire) in self.net.wires() {
            let phase = self.script.phases.first().into_iter();
            let pair =
                phase.flat_map(|phase| &phase.wires).find(|(name, _)| name.0 == *cable).map(|(_, pair)| pair);
            let Pair { forward, reverse } = pair.cloned().unwrap_or_default();
            wire.become_like(&forward.calm(), &reverse.calm());
        }
    }

    /// Plays a part.
    pub(crate) fn run(&self, phase: &Phase) {
        for (name, pair) in &phase.wires {
            let Cable(first, second) = &name.0;
            self.net.wire(first, second).become_like(&pair.forward.link(), &pair.reverse.link());
        }
        let until = self.entered() + phase.datagrams;
        let mut seen = 0;
        while self.entered() < until {
            seen = eventually("datagrams enter the wires", || Some(self.entered()).filter(|now| *now > seen));
        }
    }

    /// Datagrams that have left the prober's host.
    fn entered(&self) -> usize {
        self.stages()[0].iter().map(|wire| wire.entered(Way::Forward)).sum()
    }

    fn address(&self, node: &str) -> IpAddr {
        if self.script.ipv6 { self.net.v6(node) } else { self.net.v4(node) }
    }

    /// Harmless links again, until everything that met a bad one has its verdict and there is evidence about it.
    pub(crate) fn settle_down(&self) {
        self.calm();
        let (until, begin) = (self.entered() + 200 * usize::try_from(self.flows()).unwrap(), Instant::now());
        let patience = self.rules().lost_after + self.rules().late_after;
        let mut seen = 0;
        while self.entered() < until || begin.elapsed() < patience {
            seen = eventually("datagrams enter the wires", || Some(self.entered()).filter(|now| *now > seen));
        }
    }

    /// Ends the measurement by letting nothing more out of the prober's host, and says what came of it.
    pub(crate) fn finish(&self) -> Ended {
        self.net.sever("a", "b");
        let mut last = None;
        let page = eventually("all is decided", || {
            let page = self.prober.page();
            let sent = page.count("pathmeter_echo_sent_total", &[]);
            let is_over =
                page.count("pathmeter_echo_in_flight", &[]) == 0 && last.replace(sent) == Some(sent);
            thread::sleep(Duration::from_millis(50));
            is_over.then_some(page)
        });
        let stages = self.stages();
        let rules = self.rules();
        let truth = Echoes::read(&stages, &rules).counts(&rules);
        let forged = match self.script.topology {
            Topology::Pair => forged(self.net.wire("a", "b"), &rules),
            Topology::Chain(_) | Topology::Diamond(_) | Topology::Mesh(_) => [0, 0],
        };
        Ended { page, responder: self.responder.page(), truth, forged }
    }

    /// The wires from the prober to the responder.
    pub(crate) fn stages(&self) -> Vec<Stage<'a>> {
        let wire = |first: &str, second: &str| self.net.wire(first, second);
        match self.script.topology {
            Topology::Pair | Topology::Chain(0) => vec![vec![wire("a", "b")]],
            Topology::Chain(routers) => vec![vec![wire("a", "r1")], vec![wire(&format!("r{routers}"), "b")]],
            Topology::Diamond(_) => vec![self.net.wires().map(|(_, wire)| wire).collect()],
            Topology::Mesh(_) => vec![vec![wire("a", "core")], vec![wire("b", "core")]],
        }
    }
}

const FORWARD: &str = "direction=\"forward\"";
const REVERSE: &str = "direction=\"reverse\"";
const UNKNOWN: &str = "direction=\"unknown\"";

/// By how much the mean difference between neighbouring round trips may be off, in nanoseconds. What a busy host's
/// kernel takes between its stamp and the wire's counts against us here.
const IPDV_ERROR: u64 = 200_000;

impl Ended {
    /// Compares what was exported with what was true.
    pub(crate) fn compare(&self, script: &Script) {
        let Self { page, responder, truth, .. } = self;
        truth
            .fits(&script.expect)
            .unwrap_or_else(|error| panic!("the scenario shows nothing: {error}\n{truth:#?}"));
        assert_eq!(truth.doubtful, 0, "round trips at a limit: the scenario proves nothing\n{truth:#?}");
        let mut differences = self.differences(script.evidence);
        for (way, truth) in [FORWARD, REVERSE].into_iter().zip(script.hops.into_iter().flatten()) {
            let said = page.count("pathmeter_echo_hops", &[way]);
            if said != truth {
                differences.push(format!("hops {way}: says {said}, truly {truth}"));
            }
        }
        assert!(
            differences.is_empty(),
            "{}\n{}\n--- truth: {truth:#?}\n--- prober\n{page}\n--- responder\n{responder}",
            script.about,
            differences.join("\n")
        );
    }

    /// Every count that must be exactly the truth's: where it is exported, and what it should be.
    fn exact(&self) -> Vec<(&Page, &'static str, &'static [&'static str], u64)> {
        let Self { page, responder, truth, forged } = self;
        let lost = truth.lost_forward + truth.lost_reverse;
        vec![
            (page, "pathmeter_echo_sent_total", &[], truth.sent),
            (page, "pathmeter_echo_requests_total", &[], truth.sent),
            (page, "pathmeter_echo_rtt_seconds_count", &[], truth.ok + truth.late),
            (page, "pathmeter_echo_late_total", &[], truth.late),
            (page, "pathmeter_echo_lost_total", &[], lost),
            (page, "pathmeter_echo_host_dropped_total", &[], 0),
            (page, "pathmeter_echo_withdrawn_total", &[], 0),
            (page, "pathmeter_echo_duplicates_total", &[], truth.duplicates),
            (page, "pathmeter_echo_reordered_total", &[], truth.reordered),
            (page, "pathmeter_echo_very_late_total", &[], truth.very_late),
            (page, "pathmeter_echo_mismatched_total", &[], forged[1] + truth.stray_answers),
            (page, "pathmeter_echo_loss_bursts_total", &[], truth.bursts),
            (page, "pathmeter_echo_loss_burst_length_count", &[], truth.bursts),
            (page, "pathmeter_echo_loss_burst_length_sum", &[], lost),
            (page, "pathmeter_echo_dscp_remarked_total", &[FORWARD], truth.remarked[0]),
            (page, "pathmeter_echo_dscp_remarked_total", &[REVERSE], truth.remarked[1]),
            (page, "pathmeter_echo_ecn_ce_total", &[FORWARD], truth.congested[0]),
            (page, "pathmeter_echo_ecn_ce_total", &[REVERSE], truth.congested[1]),
            (page, "pathmeter_echo_ipdv_seconds_count", &[], truth.neighbours),
            (page, "pathmeter_accounting_errors_total", &[], 0),
            (
                responder,
                "pathmeter_responder_requests_total",
                &[],
                truth.requests + truth.sized[0] + forged[0],
            ),
            (
                responder,
                "pathmeter_responder_replies_total",
                &[],
                truth.replies + truth.sized[1] + truth.strays,
            ),
            (responder, "pathmeter_responder_rejected_total", &[], forged[0] - truth.strays),
        ]
    }

    /// A sentence for each count that is not the truth's.
    pub(crate) fn differences(&self, evidence: Evidence) -> Vec<String> {
        let Self { page, truth, .. } = self;
        let differs = |(page, name, labels, truth): &(&Page, &str, &[&str], u64)| {
            let said = page.count(name, labels);
            (said != *truth).then(|| format!("{name}{labels:?}: says {said}, truly {truth}"))
        };
        let mut differences: Vec<String> = self.exact().iter().filter_map(differs).collect();
        let direction = |label: &str| page.count("pathmeter_echo_lost_total", &[label]);
        let (said, true_ones) =
            ([direction(FORWARD), direction(REVERSE)], [truth.lost_forward, truth.lost_reverse]);
        let fits = match evidence {
            Evidence::Full => said == true_ones,
            Evidence::Partial => said.iter().zip(&true_ones).all(|(said, truth)| said <= truth),
        };
        if !fits {
            let unknown = direction(UNKNOWN);
            differences.push(format!(
                "lost forward and in reverse: says {said:?} ({unknown} unknown), truly {true_ones:?}"
            ));
        }
        differences.extend(self.ipdv_differs());
        differences
    }

    fn ipdv_differs(&self) -> Option<String> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of seconds")]
        let said = (self.page.seconds("pathmeter_echo_ipdv_seconds_sum", &[]) * 1e9) as u64;
        let Counts { ipdv, ipdv_doubt, neighbours, .. } = self.truth;
        let allowed = ipdv_doubt + neighbours * IPDV_ERROR;
        let error = said.abs_diff(ipdv);
        (error > allowed)
            .then(|| format!("sum of differences: says {said} ns, truly {ipdv}, {allowed} allowed"))
    }
}

impl Ended {
    /// Copies of this, each with one count that is one too high, and which.
    pub(crate) fn with_each_count_off_by_one(&self) -> Vec<(String, Self)> {
        let off = |(page, name, labels, _): (&Page, &'static str, &[&str], u64)| {
            let mut wrong = Self {
                page: self.page.clone(),
                responder: self.responder.clone(),
                truth: self.truth.clone(),
                forged: self.forged,
            };
            let changed = page.with_one_more(name, labels);
            if std::ptr::eq(page, &raw const self.page) {
                wrong.page = changed
            } else {
                wrong.responder = changed
            }
            (format!("{name}{labels:?}"), wrong)
        };
        self.exact().into_iter().map(off).collect()
    }
}
