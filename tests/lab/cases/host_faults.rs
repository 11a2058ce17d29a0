//! Hosts that are busy, stopped, drowned, or wrong about the time. None of it is the network's fault, and none of it may
//! look as if it were.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use pathmeter_lab::scenario::Scenario;
use pathmeter_lab::{CpuLoad, Namespace, Page};

use crate::agent::NodeAgent;
use crate::testbed::{AgentEnvironments, Inconclusive, Outcome, Testbed, with_testbed};

/// Two busy loops for each core, on the prober's and the responder's machine, which are one.
pub(crate) fn busy(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        let burners = CpuLoad::per_core(2);
        testbed.run_phases();
        testbed.wait_until_decided();
        drop(burners);
        testbed.finish().compare(scenario)
    })
}

/// A stop that is shorter than `lost_after`, with room for what comes meanwhile.
const STOP_DURATION: Duration = Duration::from_secs(2);

/// Slots pass by unsent, and replies wait.
pub(crate) fn stopped_prober(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        let unsent = || testbed.prober.page().count("pathmeter_echo_unsent_total", &[]);
        testbed.wait_until_measuring();
        testbed.run_phases();
        let before = unsent();
        stop_for(testbed.prober, STOP_DURATION);
        testbed.run_phases();
        testbed.wait_until_decided();
        testbed.finish().compare(scenario)?;
        // A hundred slots in 2 s; a few may fall to either side.
        let missed = unsent() - before;
        assert!(missed >= 90, "{missed} slots are said to have passed by");
        Ok(())
    })
}

/// Requests wait, and the time that they wait is not the network's.
pub(crate) fn stopped_responder(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        stop_for(testbed.responder, STOP_DURATION);
        testbed.run_phases();
        testbed.wait_until_decided();
        let outcome = testbed.finish();
        outcome.compare(scenario)?;
        // A hundred datagrams waited, the first for 2 s and the last hardly at all.
        let turnaround = outcome.page.seconds("pathmeter_echo_responder_turnaround_seconds_sum", &[]);
        assert!(turnaround > 60.0, "{turnaround} s of turnaround");
        at_least_60_ms(&outcome);
        Ok(())
    })
}

/// No round trip is shorter than what the wires take, 30 ms each way.
fn at_least_60_ms(outcome: &Outcome) {
    assert_eq!(
        outcome.page.count("pathmeter_echo_rtt_seconds_bucket", &["le=\"0.05\""]),
        0,
        "{}",
        outcome.page
    );
    assert!(outcome.page.seconds("pathmeter_echo_rtt_minimum_seconds", &[]) >= 0.06, "{}", outcome.page);
}

/// Shorter than `lost_after`, so that everything that was not drowned is answered.
const OVERFLOW_STOP: Duration = Duration::from_secs(2);

/// The responder's socket is full long before the responder runs again.
pub(crate) fn overflowed_responder(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        stop_for(testbed.responder, OVERFLOW_STOP);
        testbed.wait_until_decided();
        check_overflow(&testbed.finish(), testbed.net.node("b"), testbed.responder, REPLIES_CUT_SHORT_MAX);
        Ok(())
    })
}

/// Thousands of replies come while the prober does not run.
pub(crate) fn overflowed_prober(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        stop_for(testbed.prober, OVERFLOW_STOP);
        testbed.wait_until_decided();
        check_overflow(&testbed.finish(), testbed.net.node("a"), testbed.prober, 0);
        Ok(())
    })
}

/// Replies that a stop can hold back between the reading of T3, which is in them, and the kernel: what the responder sends
/// at once. Their round trips contain the stop, so they are late.
const REPLIES_CUT_SHORT_MAX: u64 = 8;

/// As many datagrams are reported as dropped by a host as its kernel dropped, none as lost, at most `late_max` as late.
fn check_overflow(outcome: &Outcome, host: &Namespace, agent: &NodeAgent<'_>, late_max: u64) {
    let page = &outcome.page;
    let truth = receive_buffer_errors(host);
    assert!(truth > 100, "{truth} datagrams found no room: that shows nothing");
    let reported = ["host_dropped", "lost", "withdrawn"]
        .map(|verdict| page.count(&format!("pathmeter_echo_{verdict}_total"), &[]));
    assert_eq!(reported, [truth, 0, 0], "dropped by a host, lost, withdrawn\n{page}");
    let late = page.count("pathmeter_echo_late_total", &[]);
    assert!(late <= late_max, "{late} are late, at most {late_max} can be\n{page}");
    let answered = page.count("pathmeter_echo_rtt_seconds_count", &[]);
    assert_eq!(answered + truth, outcome.truth.sent, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
    let at_its_sockets = agent.page().count("pathmeter_socket_rx_dropped_total", &[]);
    assert_eq!(at_its_sockets, truth, "what that host's agent says of its sockets");
}

/// What the kernel counts as "no room in the receive buffer" in a namespace, all UDP sockets.
fn receive_buffer_errors(node: &Namespace) -> u64 {
    let text = node.within(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|line| line.starts_with("Udp:")).map(|line| line.split(' ').collect()).collect();
    let place = lines[0].iter().position(|name| *name == "RcvbufErrors").unwrap();
    lines[1][place].parse().unwrap()
}

fn stop_for(agent: &NodeAgent<'_>, span: Duration) {
    agent.signal(Signal::SIGSTOP);
    // The stop itself is what is tested, and has no condition to wait for.
    thread::sleep(span);
    agent.signal(Signal::SIGCONT);
}

const CLOCK: &str = "PATHMETER_CLOCK_FAULTS";
const STEPS: &str = "pathmeter_clock_steps_total";
const SUSPENDS: &str = "pathmeter_host_suspends_total";

/// Plays the phases until both loops of an agent have counted so many of something, none of which may have come before.
fn run_phases_until(testbed: &Testbed<'_>, agent: &NodeAgent<'_>, name: &str, count: u64) {
    let counts =
        |page: &Page| ["loop=\"prober\"", "loop=\"responder\""].map(|label| page.count(name, &[label]));
    assert_eq!(counts(&agent.page()), [0, 0], "{name} before it matters");
    for _ in 0..60 {
        testbed.run_phases();
        if counts(&agent.page()) == [count, count] {
            return;
        }
    }
    panic!("waited in vain for {count} of {name}\n{}", agent.page());
}

/// Steps and slews of the prober's wall clock, then of the responder's, while datagrams are on bad links.
pub(crate) fn wrong_clocks(scenario: &Scenario) -> Result<(), Inconclusive> {
    let schedule = "6s step +1s, 7s slew +500ppm, 8s step -1s, 9s slew -500ppm, 11s slew 0ppm";
    let environment = [(CLOCK, schedule)];
    for is_prober in [true, false] {
        let environments = at(is_prober, &environment);
        with_testbed(scenario, environments, |testbed| {
            testbed.wait_until_measuring();
            run_phases_until(testbed, if is_prober { testbed.prober } else { testbed.responder }, STEPS, 2);
            testbed.run_phases();
            testbed.wait_until_decided();
            let outcome = testbed.finish();
            outcome.compare(scenario)?;
            assert_eq!(
                outcome.page.count("pathmeter_echo_rtt_seconds_bucket", &["le=\"0.02\""]),
                0,
                "round trips take 30 ms\n{}",
                outcome.page
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// The prober's host sleeps, then the responder's.
pub(crate) fn suspended(scenario: &Scenario) -> Result<(), Inconclusive> {
    let environment = [(CLOCK, "6s suspend 30s")];
    for is_prober in [true, false] {
        with_testbed(scenario, at(is_prober, &environment), |testbed| {
            testbed.wait_until_measuring();
            run_phases_until(
                testbed,
                if is_prober { testbed.prober } else { testbed.responder },
                SUSPENDS,
                1,
            );
            testbed.run_phases();
            testbed.wait_until_decided();
            let outcome = testbed.finish();
            if !is_prober {
                return outcome.compare(scenario);
            }
            without_those_in_flight(&outcome);
            Ok(())
        })?;
    }
    Ok(())
}

/// What was in flight is withdrawn, whatever became of it. Everything else is as it was.
fn without_those_in_flight(outcome: &Outcome) {
    let page = &outcome.page;
    let truth = &outcome.truth;
    let exported = ["withdrawn", "lost", "late", "host_dropped"]
        .map(|verdict| page.count(&format!("pathmeter_echo_{verdict}_total"), &[]));
    let [withdrawn, lost, late, host_dropped] = exported;
    let answered = page.count("pathmeter_echo_rtt_seconds_count", &[]);
    // A round trip takes 30 ms and a datagram leaves every 5 ms; those that were lost less than a second before are in
    // flight too.
    assert!((1..100).contains(&withdrawn), "{page}");
    assert_eq!(answered + lost + withdrawn, truth.sent, "{page}");
    assert_eq!((late, host_dropped), (0, 0), "{page}");
    assert!(answered <= truth.ok && answered + withdrawn >= truth.ok, "{page}\n{truth:#?}");
    assert!(lost <= truth.lost_forward + truth.lost_reverse, "{page}\n{truth:#?}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
}

fn at<'a>(is_prober: bool, environment: &'a [(&'a str, &'a str)]) -> AgentEnvironments<'a> {
    match is_prober {
        true => AgentEnvironments { prober: environment, responder: &[] },
        false => AgentEnvironments { prober: &[], responder: environment },
    }
}

/// An error in what was exported, planted on purpose, is found.
pub(crate) fn planted(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        testbed.wait_until_decided();
        let outcome = testbed.finish();
        outcome.compare(scenario)?;
        for (what, with_planted_errors) in outcome.with_planted_errors() {
            assert!(!with_planted_errors.differences(scenario.evidence).is_empty(), "{what} goes unnoticed");
        }
        Ok(())
    })
}
