//! Hosts that are busy, stopped, overloaded, or whose clocks are wrong. None of it may be reported as a fault
//! of the network.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use pathmeter_lab::scenario::Scenario;
use pathmeter_lab::{CpuLoad, MetricsPage, Namespace};

use crate::agent::NodeAgent;
use crate::testbed::{AgentEnvironments, Inconclusive, Outcome, Testbed, with_testbed};

/// Runs with two busy loops per core, which prober and responder share.
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

/// Shorter than `lost_after`; the socket buffer holds everything that arrives meanwhile.
const STOP_DURATION: Duration = Duration::from_secs(2);

/// Slots pass unsent, and replies wait in the socket buffer.
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
        // 100 slots in 2 s; a few may fall to either side.
        let missed = unsent() - before;
        assert!(missed >= 90, "only {missed} slots were reported as unsent");
        Ok(())
    })
}

/// Requests wait in the socket buffer, and that time is not network time.
pub(crate) fn stopped_responder(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        stop_for(testbed.responder, STOP_DURATION);
        testbed.run_phases();
        testbed.wait_until_decided();
        let outcome = testbed.finish();
        outcome.compare(scenario)?;
        // 100 datagrams waited, the first for 2 s and the last hardly at all.
        let turnaround = outcome.page.seconds("pathmeter_echo_responder_turnaround_seconds_sum", &[]);
        assert!(turnaround > 60.0, "{turnaround} s of turnaround");
        at_least_60_ms(&outcome);
        Ok(())
    })
}

/// No round trip is shorter than the delay of the wires, 30 ms each way.
fn at_least_60_ms(outcome: &Outcome) {
    assert_eq!(
        outcome.page.count("pathmeter_echo_rtt_seconds_bucket", &["le=\"0.05\""]),
        0,
        "{}",
        outcome.page
    );
    assert!(outcome.page.seconds("pathmeter_echo_rtt_minimum_seconds", &[]) >= 0.06, "{}", outcome.page);
}

/// Shorter than `lost_after`, so that every datagram that was not dropped is answered.
const OVERFLOW_STOP: Duration = Duration::from_secs(2);

/// The responder's socket buffer overflows while its process is stopped.
pub(crate) fn overflowed_responder(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        stop_for(testbed.responder, OVERFLOW_STOP);
        testbed.wait_until_decided();
        check_overflow(&testbed.finish(), testbed.net.node("b"), testbed.responder, SENDS_CUT_SHORT_MAX);
        Ok(())
    })
}

/// Thousands of replies arrive while the prober's process is stopped.
pub(crate) fn overflowed_prober(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        stop_for(testbed.prober, OVERFLOW_STOP);
        testbed.wait_until_decided();
        check_overflow(&testbed.finish(), testbed.net.node("a"), testbed.prober, SENDS_CUT_SHORT_MAX);
        Ok(())
    })
}

/// Most datagrams that a stop can delay between reading the clock and the kernel: what a loop sends at once.
/// Their round trips contain the stop, so they are late. A reply carries that time as T3. The time of a
/// request is replaced by the kernel's, but not if that finds the receive buffer full, which it shares with
/// replies.
const SENDS_CUT_SHORT_MAX: u64 = 8;

/// The agent reports as many host drops as the kernel counted, no loss, and at most `late_max` late replies.
fn check_overflow(outcome: &Outcome, host: &Namespace, agent: &NodeAgent<'_>, late_max: u64) {
    let page = &outcome.page;
    let truth = receive_buffer_errors(host);
    assert!(truth > 100, "{truth} datagrams were dropped, which proves nothing");
    let reported = ["host_dropped", "lost", "withdrawn"]
        .map(|verdict| page.count(&format!("pathmeter_echo_{verdict}_total"), &[]));
    assert_eq!(reported, [truth, 0, 0], "dropped by a host, lost, withdrawn\n{page}");
    let late = page.count("pathmeter_echo_late_total", &[]);
    assert!(late <= late_max, "{late} replies are late, at most {late_max} are allowed\n{page}");
    let answered = page.count("pathmeter_echo_rtt_seconds_count", &[]);
    assert_eq!(answered + truth, outcome.truth.sent, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
    let at_its_sockets = agent.page().count("pathmeter_socket_rx_dropped_total", &[]);
    assert_eq!(at_its_sockets, truth, "drops that the agent of that host reports");
}

/// Datagrams that the kernel of a namespace dropped because a UDP receive buffer was full.
fn receive_buffer_errors(node: &Namespace) -> u64 {
    let text = node.within(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|line| line.starts_with("Udp:")).map(|line| line.split(' ').collect()).collect();
    let place = lines[0].iter().position(|name| *name == "RcvbufErrors").unwrap();
    lines[1][place].parse().unwrap()
}

fn stop_for(agent: &NodeAgent<'_>, span: Duration) {
    agent.signal(Signal::SIGSTOP);
    // The stop itself is under test and has no condition to wait for.
    thread::sleep(span);
    agent.signal(Signal::SIGCONT);
}

const CLOCK: &str = "PATHMETER_CLOCK_FAULTS";
const STEPS: &str = "pathmeter_clock_steps_total";
const SUSPENDS: &str = "pathmeter_host_suspends_total";

/// Runs the phases until both loops of an agent have counted `count` clock events, none of which may have
/// come before.
fn run_phases_until(testbed: &Testbed<'_>, agent: &NodeAgent<'_>, name: &str, count: u64) {
    let counts = |page: &MetricsPage| {
        ["loop=\"prober\"", "loop=\"responder\""].map(|label| page.count(name, &[label]))
    };
    assert_eq!(counts(&agent.page()), [0, 0], "{name} before the test");
    for _ in 0..60 {
        testbed.run_phases();
        if counts(&agent.page()) == [count, count] {
            return;
        }
    }
    panic!("timed out waiting for {count} of {name}\n{}", agent.page());
}

/// Steps and slews of the prober's wall clock, then of the responder's, while links are impaired.
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

/// The prober's host is suspended, then the responder's.
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

/// Requests in flight are withdrawn, whatever their outcome. Everything else is reported as usual.
fn without_those_in_flight(outcome: &Outcome) {
    let page = &outcome.page;
    let truth = &outcome.truth;
    let exported = ["withdrawn", "lost", "late", "host_dropped"]
        .map(|verdict| page.count(&format!("pathmeter_echo_{verdict}_total"), &[]));
    let [withdrawn, lost, late, host_dropped] = exported;
    let answered = page.count("pathmeter_echo_rtt_seconds_count", &[]);
    // A round trip takes 30 ms and a datagram leaves every 5 ms. Requests that were lost up to a second
    // earlier are in flight too.
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

/// Every error planted in the exported metrics is detected.
pub(crate) fn planted(scenario: &Scenario) -> Result<(), Inconclusive> {
    with_testbed(scenario, AgentEnvironments::default(), |testbed| {
        testbed.wait_until_measuring();
        testbed.run_phases();
        testbed.wait_until_decided();
        let outcome = testbed.finish();
        outcome.compare(scenario)?;
        for (what, with_planted_errors) in outcome.with_planted_errors() {
            assert!(!with_planted_errors.differences(scenario.evidence).is_empty(), "undetected: {what}");
        }
        Ok(())
    })
}
