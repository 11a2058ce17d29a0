//! Runs a scenario and compares the exported metrics with the true counts.

use std::net::IpAddr;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use pathmeter_lab::scenario::{Evidence, LinkPair, Phase, Scenario, TimeSpan, Topology};
use pathmeter_lab::truth::{EchoFormat, Echoes, Rules, TrueCounts, WireGroup, forged};
use pathmeter_lab::{Cable, MetricsPage, Net, WireDirection, eventually};
use serde_json::{Value, json};

use crate::agent::NodeAgent;

/// Why a run is inconclusive and has to be repeated.
#[derive(Debug)]
pub(crate) struct Inconclusive(pub(crate) String);

/// Runs the phases of a scenario.
///
/// # Panics
/// With every count that differs from the true count.
pub(crate) fn run(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        testbed.wait_until_decided();
        testbed.finish().compare(scenario)
    })
}

/// Environment variables of the two agents.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AgentEnvironments<'a> {
    pub(crate) prober: &'a [(&'a str, &'a str)],
    pub(crate) responder: &'a [(&'a str, &'a str)],
}

/// Builds a scenario's network with an agent on `a` that measures the agent on `b`, and passes it to `act`.
pub(crate) fn with_testbed<T>(
    scenario: &Scenario,
    environments: AgentEnvironments<'_>,
    act: impl FnOnce(&Testbed<'_>) -> T,
) -> T {
    let net = scenario.topology.plan().build(seed());
    remove_impairments(scenario, &net);
    let responder = NodeAgent::start(net.node("b"), config(scenario, &net, "b"), environments.responder);
    let prober = NodeAgent::start(net.node("a"), config(scenario, &net, "a"), environments.prober);
    act(&Testbed { scenario, net: &net, prober: &prober, responder: &responder })
}

/// The seed of the wires: `LAB_SEED=n`, default 7. The agents choose their own phases and jitter, so runs
/// with one seed still differ; each run is compared with its own truth.
pub(crate) fn seed() -> u64 {
    std::env::var("LAB_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7)
}

/// Sets links without impairments, otherwise like those of the first phase.
pub(crate) fn remove_impairments(scenario: &Scenario, net: &Net) {
    for (cable, wire) in net.wires() {
        let wires = scenario.phases.first().into_iter().flat_map(|phase| &phase.wires);
        let pair = wires.into_iter().find(|(name, _)| name.0 == *cable).map(|(_, pair)| pair);
        let LinkPair { forward, reverse } = pair.cloned().unwrap_or_default();
        wire.set_links(&forward.without_impairments(), &reverse.without_impairments());
    }
}

/// Sets the links of a phase.
pub(crate) fn apply(phase: &Phase, net: &Net) {
    for (name, pair) in &phase.wires {
        let Cable(first, second) = &name.0;
        net.wire(first, second).set_links(&pair.forward.link(), &pair.reverse.link());
    }
}

/// The configuration of one of the two agents.
fn config(scenario: &Scenario, net: &Net, name: &str) -> Value {
    let address = |node: &str| if scenario.ipv6 { net.v6(node) } else { net.v4(node) };
    let probe = serde_json::to_value(&scenario.probe).unwrap();
    let probes = (0..scenario.paths).map(|path| {
        let mut probe = probe.clone();
        probe["name"] = name_of(path).into();
        probe["kind"] = "echo".into();
        if !is_icmp(scenario) {
            probe["source_port"] = ports(path).start.into();
        }
        probe
    });
    let mut config = json!({
        "agent": {"name": name, "grace": "1s"},
        "peers": [{"name": "a", "address": address("a")}, {"name": "b", "address": address("b")}],
        "probes": if name == "a" { probes.collect() } else { Vec::new() },
    });
    if scenario.authenticated {
        config["key_file"] = "".into();
    }
    config
}

/// Whether the probe uses ICMP, whose replies carry no data from the responder.
fn is_icmp(scenario: &Scenario) -> bool {
    scenario.probe.get("protocol").and_then(serde_yaml::Value::as_str) == Some("icmp")
}

fn name_of(path: u16) -> String {
    format!("echo-{path}")
}

/// The source ports of a path: more than it has flows.
fn ports(path: u16) -> Range<u16> {
    40_000 + 100 * path..40_000 + 100 * (path + 1)
}

/// An agent that measures another agent across a network.
pub(crate) struct Testbed<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) net: &'a Net,
    pub(crate) prober: &'a NodeAgent<'a>,
    pub(crate) responder: &'a NodeAgent<'a>,
}

/// The exported metrics at the end of a run, and the true counts.
#[derive(Clone)]
pub(crate) struct Outcome {
    pub(crate) page: MetricsPage,
    pub(crate) responder: MetricsPage,
    /// True counts of all paths together.
    pub(crate) truth: TrueCounts,
    /// True counts of each path, by its label.
    paths: Vec<(String, TrueCounts)>,
    forged: [u64; 2],
    lost_after: Duration,
    format: EchoFormat,
}

impl<'a> Testbed<'a> {
    pub(crate) fn rules(&self) -> Rules {
        let span = |key: &str| {
            let text = self.scenario.probe.get(key).and_then(serde_yaml::Value::as_str);
            let text = text.unwrap_or_else(|| panic!("a scenario sets {key}"));
            TimeSpan::try_from(text.to_owned()).unwrap().0
        };
        Rules {
            prober: self.address("a"),
            responder: (self.address("b"), if is_icmp(self.scenario) { 0 } else { 9_862 }).into(),
            format: match (is_icmp(self.scenario), self.scenario.authenticated) {
                (true, _) => EchoFormat::Icmp,
                (false, true) => EchoFormat::Authenticated,
                (false, false) => EchoFormat::Open,
            },
            late_after: span("late_after"),
            lost_after: span("lost_after"),
            hidden_routers: match self.scenario.topology {
                // After the router of the path comes the one where all paths meet.
                Topology::Diamond(_) => [2, 1],
                Topology::Pair | Topology::Chain(_) | Topology::Mesh(_) => [0, 0],
            },
        }
    }

    fn address(&self, node: &str) -> IpAddr {
        if self.scenario.ipv6 { self.net.v6(node) } else { self.net.v4(node) }
    }

    /// Waits until both agents measure, before links are impaired.
    pub(crate) fn wait_until_measuring(&self) {
        let (begin, duration) = (Instant::now(), self.rules().late_after);
        let target = 30 * self.flows() * u64::from(self.scenario.paths);
        self.prober.page_when("replies come", |page| {
            // The first datagrams of a session record give no evidence about the losses around them.
            page.count("pathmeter_echo_rtt_seconds_count", &[]) >= target && begin.elapsed() > duration
        });
    }

    fn flows(&self) -> u64 {
        self.scenario.probe.get("flows").and_then(serde_yaml::Value::as_u64).unwrap_or(1)
    }

    /// Runs all phases.
    pub(crate) fn run_phases(&self) {
        self.scenario.phases.iter().for_each(|phase| self.run_phase(phase));
    }

    /// Runs one phase.
    pub(crate) fn run_phase(&self, phase: &Phase) {
        apply(phase, self.net);
        self.wait_for(self.entered() + phase.datagrams);
    }

    fn wait_for(&self, entered: usize) {
        let mut seen = 0;
        while self.entered() < entered {
            seen = eventually("datagrams enter the wires", || Some(self.entered()).filter(|now| *now > seen));
        }
    }

    /// The number of datagrams that have left the prober's host.
    fn entered(&self) -> usize {
        self.wire_groups()[0].iter().map(|wire| wire.entered(WireDirection::Forward)).sum()
    }

    /// Removes impairments and waits until every request that met one has its verdict and the evidence about
    /// it has arrived.
    pub(crate) fn wait_until_decided(&self) {
        remove_impairments(self.scenario, self.net);
        let (target, begin) = (self.entered() + 200 * usize::try_from(self.flows()).unwrap(), Instant::now());
        let duration = self.rules().lost_after + self.rules().late_after;
        self.wait_for(target);
        while begin.elapsed() < duration {
            self.wait_for(self.entered() + 1);
        }
    }

    /// Ends the measurement by making the prober's kernel refuse to send, and collects the outcome.
    pub(crate) fn finish(&self) -> Outcome {
        self.net.add_unreachable_route("a", "b");
        let mut last = None;
        let page = eventually("every request has its verdict", || {
            let page = self.prober.page();
            let sent = page.count("pathmeter_echo_sent_total", &[]);
            let refused = page.count("pathmeter_echo_send_errors_total", &["error=\"unreachable\""]) > 0;
            let is_decided = page.count("pathmeter_echo_in_flight", &[]) == 0;
            let is_over = refused && is_decided && last.replace(sent) == Some(sent);
            thread::sleep(Duration::from_millis(50));
            is_over.then_some(page)
        });
        let rules = self.rules();
        let echoes = Echoes::read(&self.wire_groups(), &rules);
        let paths = (0..self.scenario.paths).map(|path| {
            // The kernel chooses ICMP identifiers, so there is only one path.
            let ports = if rules.format == EchoFormat::Icmp { 0..u16::MAX } else { ports(path) };
            (format!("probe=\"{}\"", name_of(path)), echoes.from_ports(&ports).counts(&rules))
        });
        let forged = match self.scenario.topology {
            Topology::Pair => forged(self.net.wire("a", "b"), &rules),
            Topology::Chain(_) | Topology::Diamond(_) | Topology::Mesh(_) => [0, 0],
        };
        Outcome {
            page,
            responder: self.responder.page(),
            truth: echoes.counts(&rules),
            paths: paths.collect(),
            forged,
            lost_after: rules.lost_after,
            format: rules.format,
        }
    }

    /// The wires from the prober to the responder.
    pub(crate) fn wire_groups(&self) -> Vec<WireGroup<'a>> {
        let wire = |first: &str, second: &str| self.net.wire(first, second);
        match self.scenario.topology {
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

/// Allowed errors in nanoseconds: for each round trip or difference between two, and for their sum besides.
/// The first covers the time between the kernel's timestamp and the wire's; the second covers moments in
/// which a busy machine, or its hypervisor, does not run at all.
pub(crate) const TIME_ERROR: u64 = 20_000;
pub(crate) const PAUSES: u64 = 300_000_000;

/// An expected count: page, metric name, labels, true value.
type ExpectedCount<'a> = (&'a MetricsPage, &'static str, Vec<&'a str>, u64);

impl Outcome {
    /// Compares the exported metrics with the true counts.
    ///
    /// # Errors
    /// When the run is inconclusive: the machine did not run for too long, or the impairments had too little
    /// effect.
    pub(crate) fn compare(&self, scenario: &Scenario) -> Result<(), Inconclusive> {
        let Self { page, responder, truth, .. } = self;
        let stall = Duration::from_nanos(truth.turnaround_max);
        if stall > self.lost_after / 2 {
            return Err(Inconclusive(format!("the responder did not run for {stall:?}")));
        }
        if truth.undecidable > 0 {
            return Err(Inconclusive(format!("{} round trips ended at a limit", truth.undecidable)));
        }
        truth.check(&scenario.expect).map_err(Inconclusive)?;
        let differences = self.differences(scenario.evidence);
        assert!(
            differences.is_empty(),
            "LAB_SEED={}: {}\n{}\n--- truth: {truth:#?}\n--- prober\n{page}\n--- responder\n{responder}",
            seed(),
            scenario.about,
            differences.join("\n")
        );
        eprintln!("{}", self.row());
        Ok(())
    }

    /// A line of the true counts, all of which were exported exactly.
    fn row(&self) -> String {
        let TrueCounts { sent, ok, late, lost_forward, lost_reverse, duplicates, reordered, .. } = self.truth;
        format!(
            "as exported: {sent} sent, {ok} ok, {late} late, {lost_forward} lost forward, {lost_reverse} lost in reverse, \
             {duplicates} duplicates, {reordered} reordered"
        )
    }

    /// All counts that must equal the true count.
    fn exact(&self) -> Vec<ExpectedCount<'_>> {
        let Self { page, responder, truth, paths, forged, .. } = self;
        // With ICMP the host answers, not the agent.
        let [requests, replies] = match self.format {
            EchoFormat::Icmp => [0, 0],
            EchoFormat::Open | EchoFormat::Authenticated => [
                truth.requests + truth.mtu_probes[0] + forged[0],
                truth.replies + truth.mtu_probes[1] + truth.replies_to_damaged,
            ],
        };
        let whole: [ExpectedCount<'_>; 6] = [
            (page, "pathmeter_echo_mismatched_total", vec![], forged[1] + truth.received_replies_to_damaged),
            (
                page,
                "pathmeter_echo_mismatched_total",
                vec!["reason=\"auth\""],
                forged[1] + truth.received_replies_to_damaged,
            ),
            (page, "pathmeter_accounting_errors_total", vec![], 0),
            (responder, "pathmeter_responder_requests_total", vec![], requests),
            (responder, "pathmeter_responder_replies_total", vec![], replies),
            (
                responder,
                "pathmeter_responder_rejected_total",
                vec![],
                forged[0]
                    .checked_sub(truth.replies_to_damaged)
                    .expect("a damaged request gets at most one reply"),
            ),
        ];
        let on_paths = paths.iter().flat_map(|(label, truth)| self.exact_on(label, truth));
        on_paths.chain(whole).collect()
    }

    /// All counts of a path that must equal the true count.
    fn exact_on<'a>(&'a self, label: &'a str, truth: &TrueCounts) -> Vec<ExpectedCount<'a>> {
        let lost = truth.lost_forward + truth.lost_reverse;
        let counts: [(&'static str, &[&'static str], u64); 22] = [
            ("pathmeter_echo_sent_total", &[], truth.sent),
            ("pathmeter_echo_verdicts_total", &[], truth.sent),
            ("pathmeter_echo_rtt_seconds_count", &[], truth.ok + truth.late),
            ("pathmeter_echo_late_total", &[], truth.late),
            ("pathmeter_echo_lost_total", &[], lost),
            ("pathmeter_echo_host_dropped_total", &[], 0),
            ("pathmeter_echo_withdrawn_total", &[], 0),
            ("pathmeter_echo_duplicates_total", &[], truth.duplicates),
            ("pathmeter_echo_reordered_total", &[], truth.reordered),
            ("pathmeter_echo_very_late_total", &[], truth.very_late),
            ("pathmeter_echo_loss_bursts_total", &[], truth.bursts),
            ("pathmeter_echo_loss_burst_length_count", &[], truth.bursts),
            ("pathmeter_echo_loss_burst_length_sum", &[], lost),
            ("pathmeter_echo_dscp_remarked_total", &[FORWARD], truth.remarked[0]),
            ("pathmeter_echo_dscp_remarked_total", &[REVERSE], truth.remarked[1]),
            ("pathmeter_echo_ecn_ce_total", &[FORWARD], truth.congested[0]),
            ("pathmeter_echo_ecn_ce_total", &[REVERSE], truth.congested[1]),
            ("pathmeter_echo_hops", &[FORWARD], truth.hops[0]),
            ("pathmeter_echo_hops", &[REVERSE], truth.hops[1]),
            ("pathmeter_echo_ipdv_seconds_count", &[], truth.consecutive_ok),
            ("pathmeter_echo_user_timestamps_total", &[], 0),
            ("pathmeter_echo_responder_turnaround_invalid_total", &[], 0),
        ];
        let with_label = |(name, labels, truth): (&'static str, &[&'static str], u64)| {
            (&self.page, name, labels.iter().copied().chain([label]).collect(), truth)
        };
        // ICMP replies carry no TTL of the request.
        let is_exported =
            |(name, ..): &(&str, _, _)| self.format != EchoFormat::Icmp || *name != "pathmeter_echo_hops";
        counts.into_iter().filter(is_exported).map(with_label).collect()
    }

    /// Describes each count that differs from the true count.
    pub(crate) fn differences(&self, evidence: Evidence) -> Vec<String> {
        let differs = |(page, name, labels, truth): &ExpectedCount<'_>| {
            let exported = page.count(name, labels);
            (exported != *truth).then(|| format!("{name}{labels:?}: exported {exported}, true {truth}"))
        };
        let mut differences: Vec<String> = self.exact().iter().filter_map(differs).collect();
        for (label, truth) in &self.paths {
            differences.extend(self.directions_differ(label, truth, evidence));
            let exported = self.nanos("pathmeter_echo_ipdv_seconds_sum", label);
            differences.extend(differ(
                "sum of differences between consecutive round trips",
                exported,
                (truth.ipdv, truth.ipdv_uncertainty, truth.consecutive_ok),
            ));
            let exported = self.nanos("pathmeter_echo_rtt_seconds_sum", label);
            let answered = truth.ok + truth.late;
            differences.extend(differ(
                "sum of round trips",
                exported,
                (truth.round_trips, truth.round_trips_uncertainty, answered),
            ));
        }
        differences
    }

    fn directions_differ(&self, label: &str, truth: &TrueCounts, evidence: Evidence) -> Option<String> {
        let [forward, reverse, unknown] = [FORWARD, REVERSE, UNKNOWN]
            .map(|direction| self.page.count("pathmeter_echo_lost_total", &[label, direction]));
        let truly = [truth.lost_forward, truth.lost_reverse];
        let fits = match evidence {
            Evidence::Full => [forward, reverse] == truly,
            Evidence::Partial => forward <= truly[0] && reverse <= truly[1],
            Evidence::None => [forward, reverse] == [0, 0],
        };
        let exported = format!("{forward} forward, {reverse} reverse, {unknown} unknown");
        (!fits).then(|| format!("lost on {label}: exported {exported}, true {truly:?}"))
    }

    fn nanos(&self, name: &str, label: &str) -> u64 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of seconds")]
        let nanos = (self.page.seconds(name, &[label]) * 1e9) as u64;
        nanos
    }

    /// Copies of this outcome with one error each in the exported metrics, with a description of the error.
    pub(crate) fn with_planted_errors(&self) -> Vec<(String, Self)> {
        let with = |what: String, spoil: &dyn Fn(&mut Self)| {
            let mut wrong = self.clone();
            spoil(&mut wrong);
            (what, wrong)
        };
        let mut all = Vec::new();
        for (page, name, labels, truth) in self.exact() {
            let is_ours = std::ptr::eq(page, &raw const self.page);
            for more in [1, -1].into_iter().filter(|more| *more == 1 || truth > 0) {
                all.push(with(format!("{name}{labels:?} {more:+}"), &|wrong| {
                    let page = if is_ours { &mut wrong.page } else { &mut wrong.responder };
                    page.change(name, &labels, f64::from(more));
                }));
            }
        }
        for (label, _) in &self.paths {
            let lost = "pathmeter_echo_lost_total";
            for (from, to) in [(FORWARD, REVERSE), (REVERSE, UNKNOWN), (FORWARD, UNKNOWN)] {
                all.push(with(format!("a loss {to} instead of {from}"), &|wrong| {
                    wrong.page.change(lost, &[label, from], -1.0);
                    wrong.page.change(lost, &[label, to], 1.0);
                }));
            }
            for time in ["pathmeter_echo_rtt_seconds_sum", "pathmeter_echo_ipdv_seconds_sum"] {
                all.push(with(format!("a second more in {time}"), &|wrong| {
                    wrong.page.change(time, &[label], 1.0);
                }));
            }
        }
        if let [(first, _), (second, _), ..] = &self.paths[..] {
            for name in ["pathmeter_echo_lost_total", "pathmeter_echo_duplicates_total"] {
                all.push(with(format!("one of {name} on another path"), &|wrong| {
                    wrong.page.change(name, &[first], -1.0);
                    wrong.page.change(name, &[second], 1.0);
                }));
            }
        }
        all
    }
}

fn differ(what: &str, exported: u64, (truth, doubt, samples): (u64, u64, u64)) -> Option<String> {
    let allowed = doubt + samples * TIME_ERROR + PAUSES;
    (exported.abs_diff(truth) > allowed)
        .then(|| format!("{what}: exported {exported} ns, true {truth} ns, tolerance {allowed} ns"))
}
