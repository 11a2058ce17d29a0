//! Measurements stay correct when the clocks of either host step, slew or suspend.

use crate::fixture::{Agent, CommandOutput, Host, MetricsPage, pathmeter};

/// Steps are longer than any deadline, so that a step in a single round trip would be visible. The events are
/// far enough apart for a loop to read the clocks between any two of them, even on a busy machine.
const CLOCK_FAULTS: &str =
    "700ms step +1000s, 1200ms slew +500ppm, 1700ms suspend 2000s, 2200ms slew 0ppm, 2700ms step -1000s";

const VARIABLE: &str = "PATHMETER_CLOCK_FAULTS";

/// Asserts that no round trip contains a step: the shortest one would take 1000 s.
fn assert_round_trips_are_correct(page: &MetricsPage) {
    let count = page.count("pathmeter_echo_rtt_seconds_count", &[]);
    let sum = page.seconds("pathmeter_echo_rtt_seconds_sum", &[]);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let bound = count as f64 * 0.1;
    assert!(count > 0 && sum < bound, "{count} round trips took {sum} s\n{page}");
    for name in
        ["late_total", "lost_total", "host_dropped_total", "mismatched_total", "user_timestamps_total"]
    {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
    let lag = page.seconds("pathmeter_echo_responder_transmit_lag_seconds_sum", &[]);
    assert!(lag < 100.0, "replies left the responder {lag} s late\n{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

/// Asserts that no turnaround was invalid. A step that shortened a round trip would make it shorter than the
/// turnaround.
fn assert_turnarounds_are_valid(page: &MetricsPage) {
    assert_eq!(page.count("pathmeter_echo_responder_turnaround_invalid_total", &[]), 0, "{page}");
}

/// Whether both loops have counted exactly the clock events that there were.
fn has_seen_all_clock_events(page: &MetricsPage) -> bool {
    [r#"loop="prober""#, r#"loop="responder""#].into_iter().all(|which| {
        let steps = page.count("pathmeter_clock_steps_total", &[which]);
        let suspends = page.count("pathmeter_host_suspends_total", &[which]);
        assert!(steps <= 2 && suspends <= 1, "{which}\n{page}");
        (steps, suspends) == (2, 1)
    })
}

fn verdicts(page: &MetricsPage) -> u64 {
    page.count("pathmeter_echo_verdicts_total", &[])
}

/// Whether every request has its verdict.
fn is_decided(page: &MetricsPage) -> bool {
    page.count("pathmeter_echo_sent_total", &[]) == verdicts(page)
}

/// Two agents: the first measures the second at this interval, with these clock faults.
fn agents(interval: &str, prober: Option<&str>, responder: Option<&str>) -> [(Agent, Host); 2] {
    let (a, b) = (Host::claim(), Host::claim());
    let allow = format!("responder: {{allow: [{a}/32]}}");
    let [prober, responder] = [prober, responder]
        .map(|faults| faults.map(|faults| (VARIABLE, faults)).into_iter().collect::<Vec<_>>());
    let other = Agent::start_with(&b, &b.config("b", &allow), &responder);
    let more = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         probes: [{{name: fast, interval: {interval}, source: {a}, late_after: 60s, lost_after: 60s}}]"
    );
    let agent = Agent::start_with(&a, &a.config("a", &more), &prober);
    [(agent, a), (other, b)]
}

#[test]
fn clock_events_of_the_prober_change_no_round_trip() {
    let [(agent, _a), (_other, _b)] = agents("20ms", Some(CLOCK_FAULTS), None);
    let after_events = agent.page_when("all clock events were seen", has_seen_all_clock_events);
    let page = agent.page_when("replies after the clock events, and nothing in flight", |page| {
        verdicts(page) >= verdicts(&after_events) + 20 && is_decided(page)
    });
    assert!(has_seen_all_clock_events(&page));
    assert_round_trips_are_correct(&page);
    assert_turnarounds_are_valid(&page);
    let withdrawn = page.count("pathmeter_echo_withdrawn_total", &[]);
    assert!(withdrawn <= 25, "a suspend withdraws what is in flight, not what half a second sends\n{page}");
    assert!(page.count("pathmeter_echo_very_late_total", &[]) <= withdrawn, "{page}");
}

#[test]
fn clock_events_of_the_responder_do_not_affect_the_prober() {
    let [(agent, _a), (other, _b)] = agents("20ms", None, Some(CLOCK_FAULTS));
    let after_events = other.page_when("all clock events were seen", has_seen_all_clock_events);
    assert_eq!(after_events.count("pathmeter_accounting_errors_total", &[]), 0, "{after_events}");
    let before = verdicts(&agent.page());
    let page = agent.page_when("replies after the clock events, and nothing in flight", |page| {
        verdicts(page) >= before + 20 && is_decided(page)
    });
    assert_round_trips_are_correct(&page);
    assert_turnarounds_are_valid(&page);
    for name in [
        "pathmeter_echo_very_late_total",
        "pathmeter_echo_withdrawn_total",
        "pathmeter_clock_steps_total",
        "pathmeter_host_suspends_total",
    ] {
        assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
    }
}

#[test]
fn datagrams_in_flight_during_clock_steps_are_measured_correctly() {
    // So many steps that some happen while datagrams are in flight and timestamps are unread. All in one
    // direction: a loop that sleeps through two of them must not find the clock where it was.
    let steps = |start: u64| {
        let step = |number: u64| format!("{}ms step +1000s", start + 47 * number);
        (0..40).map(step).collect::<Vec<_>>().join(", ")
    };
    let [(agent, _a), (other, _b)] = agents("2ms", Some(&steps(300)), Some(&steps(310)));
    // A loop that did not run for a while detects several steps at once. It cannot place timestamps between
    // them, so a turnaround may be invalid. That is counted and has no other effect.
    let has_stepped = |page: &MetricsPage| page.count("pathmeter_clock_steps_total", &[]) >= 4;
    other.page_when("steps of the responder", has_stepped);
    agent.page_when("steps of the prober", has_stepped);
    let page = agent.page_when("a thousand verdicts", |page| verdicts(page) >= 1_000);
    assert_round_trips_are_correct(&page);
    for name in ["withdrawn_total", "very_late_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
}

#[test]
fn invalid_clock_faults_end_the_program_with_a_reason() {
    let mut command = pathmeter(&["completions", "bash"]);
    let output = CommandOutput::of(command.env(VARIABLE, "1s step +1s, 2s slew fast"));
    assert_eq!(output.code, Some(1), "{output}");
    let expected = "error: PATHMETER_CLOCK_FAULTS: event 2, `2s slew fast`: `fast` is not a rate \
                    (allowed: -100000ppm to +100000ppm)\n";
    assert_eq!(output.stderr, expected);
}
