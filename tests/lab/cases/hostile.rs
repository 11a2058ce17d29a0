//! Hosts that are busy, stopped, drowned, or wrong about the time. None of it is the network's fault, and none of it may
//! look as if it were.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use pathmeter_lab::script::{Evidence, Script};
use pathmeter_lab::{Burners, Namespace, Page, eventually};

use crate::agent::Agent;
use crate::play::{Drill, on_stage};

/// Two busy loops for each core, on the prober's and the responder's machine, which are one.
pub(crate) fn busy() {
    let script = Script::parse(
        "about: A busy machine loses nothing of its own.
topology: pair
probe: {interval: 5ms, flows: 4, late_after: 500ms, lost_after: 2s}
phases:
  - datagrams: 2000
    wires: {a-b: {forward: {delay: 5ms, loss: 3%}, reverse: {delay: 5ms, loss: 2%, duplicates: 1%}}}
expect: {lost_forward: 25..110, lost_reverse: 15..85, late: 0}",
    )
    .unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        let burners = Burners::per_core(2);
        stage.run(&script.phases[0]);
        stage.settle_down();
        drop(burners);
        stage.finish().compare(&script);
    });
}

/// A stop that is shorter than `lost_after`, with room for what comes meanwhile.
const STOP: Duration = Duration::from_secs(2);

const STOPPED: &str = "about: Whoever is stopped for a while loses nothing that arrived.
topology: pair
probe: {interval: 20ms, flows: 2, late_after: 500ms, lost_after: 3s}
phases:
  - datagrams: 100
    wires: {a-b: {forward: {delay: 30ms, loss: 5%}, reverse: {delay: 30ms, loss: 5%}}}
expect: {late: 0}";

/// The prober's process does not run for a while: slots pass by unsent, and replies wait.
pub(crate) fn stopped_prober() {
    let script = Script::parse(STOPPED).unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        stage.run(&script.phases[0]);
        let unsent = |agent: &Agent<'_>| agent.page().count("pathmeter_echo_unsent_total", &[]);
        let before = unsent(stage.prober);
        stop(stage.prober, STOP);
        stage.run(&script.phases[0]);
        stage.settle_down();
        let ended = stage.finish();
        ended.compare(&script);
        // 100 slots in 2 s; one or two may fall to either side.
        let missed = unsent(stage.prober) - before;
        assert!(missed >= 90, "{missed} slots are said to have passed by");
    });
}

/// The responder's process does not run for a while: requests wait, and the time that they wait is not the network's.
pub(crate) fn stopped_responder() {
    let script = Script::parse(STOPPED).unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        stage.run(&script.phases[0]);
        stop(stage.responder, STOP);
        stage.run(&script.phases[0]);
        stage.settle_down();
        let ended = stage.finish();
        ended.compare(&script);
        // A hundred datagrams waited, the first for 2 s and the last hardly at all.
        let turnaround = ended.page.seconds("pathmeter_echo_responder_turnaround_seconds_sum", &[]);
        assert!(turnaround > 60.0, "{turnaround} s of turnaround");
        let rtt = ended.page.seconds("pathmeter_echo_rtt_seconds_sum", &[]);
        let mean = rtt / f64::from(u32::try_from(ended.truth.ok).unwrap());
        assert!((0.06..0.12).contains(&mean), "round trips of {mean} s on average, truly 60 ms");
    });
}

/// The longest stop that drowns a queue: shorter than `lost_after`, so that everything that was not drowned is answered.
const FLOOD: Duration = Duration::from_millis(2_000);

/// The responder does not run, and its socket is full long before it does: what its kernel drops is the host's.
pub(crate) fn full_queue_at_the_responder() {
    let script = Script::parse(
        "about: What the responder's kernel drops is no loss of the network.
topology: pair
paths: 8
probe: {interval: 1ms, late_after: 500ms, lost_after: 3s}
phases: []",
    )
    .unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        stop(stage.responder, FLOOD);
        stage.settle_down();
        let page = stage.finish().page;
        drowned(stage.net.node("b"), stage.responder, &page);
    });
}

/// The prober does not run while hundreds of replies come: what its kernel drops is the host's.
pub(crate) fn full_queue_at_the_prober() {
    let script = Script::parse(
        "about: What the prober's kernel drops is no loss of the network.
topology: pair
paths: 8
probe: {interval: 1ms, late_after: 2500ms, lost_after: 3s}
phases:
  - datagrams: 20000
    wires: {a-b: {forward: {delay: 1100ms}, reverse: {delay: 1100ms}}}",
    )
    .unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        stage.run(&script.phases[0]);
        stop(stage.prober, FLOOD);
        stage.settle_down();
        let page = stage.finish().page;
        drowned(stage.net.node("a"), stage.prober, &page);
    });
}

/// As many datagrams are said to have been dropped by a host as its kernel dropped, and none to be lost.
fn drowned(host: &Namespace, agent: &Agent<'_>, page: &Page) {
    let truth = overruns(host);
    let said = page.count("pathmeter_echo_host_dropped_total", &[]);
    let lost = page.count("pathmeter_echo_lost_total", &[]);
    assert!(truth > 100, "{truth} datagrams found no room: that shows nothing");
    assert_eq!((said, lost), (truth, 0), "dropped by a host, and lost\n{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
    let at_its_sockets = agent.page().count("pathmeter_socket_rx_dropped_total", &[]);
    assert_eq!(at_its_sockets, truth, "what that host's agent says of its sockets");
}

/// What the kernel counts as "no room in the receive buffer" in a namespace, all UDP sockets.
fn overruns(node: &Namespace) -> u64 {
    let text = node.within(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|line| line.starts_with("Udp:")).map(|line| line.split(' ').collect()).collect();
    let place = lines[0].iter().position(|name| *name == "RcvbufErrors").unwrap();
    lines[1][place].parse().unwrap()
}

fn stop(agent: &Agent<'_>, span: Duration) {
    agent.signal(Signal::SIGSTOP);
    // The stop itself is what is tested, and has no condition to wait for.
    thread::sleep(span);
    agent.signal(Signal::SIGCONT);
}

const CLOCK: &str = "PATHMETER_CLOCK_DRILL";

const TIMES: &str = "about: A clock that is wrong changes no count.
topology: pair
probe: {interval: 5ms, flows: 2, late_after: 200ms, lost_after: 1s}
phases:
  - datagrams: 1500
    wires: {a-b: {forward: {delay: 20ms, loss: 3%}, reverse: {delay: 10ms, loss: 2%}}}
expect: {lost_forward: 15..85, lost_reverse: 10..70, late: 0}";

/// The wall clock is stepped by a second either way and slewed by 500 ppm either way, of the prober, then of the responder.
pub(crate) fn wrong_clocks() {
    let script = Script::parse(TIMES).unwrap();
    let schedule = "1s step +1s, 2s slew +500ppm, 4s step -1s, 5s slew -500ppm, 7s slew 0ppm";
    let environment = [(CLOCK, schedule)];
    let drills =
        [Drill { prober: &environment, responder: &[] }, Drill { prober: &[], responder: &environment }];
    for drill in drills {
        on_stage(&script, drill, |stage| {
            stage.settle();
            stage.run(&script.phases[0]);
            let agent = if drill.prober.is_empty() { stage.responder } else { stage.prober };
            let looks = |label: &str| agent.page().count("pathmeter_clock_steps_total", &[label]);
            for label in ["loop=\"prober\"", "loop=\"responder\""] {
                eventually("both steps are told", || (looks(label) == 2).then_some(()));
            }
            stage.settle_down();
            let ended = stage.finish();
            ended.compare(&script);
            let rtt = ended.page.seconds("pathmeter_echo_rtt_seconds_sum", &[]);
            let mean = rtt / f64::from(u32::try_from(ended.truth.ok).unwrap());
            assert!((0.03..0.09).contains(&mean), "round trips of {mean} s on average, truly 30 ms");
        });
    }
}

/// A suspend withdraws what is in flight, at the prober; at the responder nothing changes. Neither loses anything.
pub(crate) fn suspended() {
    let mut script = Script::parse(TIMES).unwrap();
    script.phases.clear();
    let environment = [(CLOCK, "3s suspend 30s")];
    for at_prober in [true, false] {
        let (prober, responder): (&[_], &[_]) =
            if at_prober { (&environment, &[]) } else { (&[], &environment) };
        on_stage(&script, Drill { prober, responder }, |stage| {
            stage.settle();
            let agent = if at_prober { stage.prober } else { stage.responder };
            agent.page_when("the suspend is told", |page| {
                page.count("pathmeter_host_suspends_total", &[]) == 2
            });
            stage.settle_down();
            let ended = stage.finish();
            let withdrawn = ended.page.count("pathmeter_echo_withdrawn_total", &[]);
            assert_eq!(withdrawn > 0, at_prober, "{withdrawn} withdrawn");
            let decided = ended.page.count("pathmeter_echo_rtt_seconds_count", &[]) + withdrawn;
            assert_eq!(decided, ended.truth.sent, "{}", ended.page);
            assert_eq!(ended.page.count("pathmeter_echo_lost_total", &[]), 0);
            assert_eq!(ended.page.count("pathmeter_echo_late_total", &[]), 0);
            assert_eq!(ended.page.count("pathmeter_accounting_errors_total", &[]), 0);
        });
    }
}

/// An error in the accounts, planted on purpose, is found: whichever count is wrong, and by however little.
pub(crate) fn planted() {
    let script = Script::parse(TIMES).unwrap();
    on_stage(&script, Drill::default(), |stage| {
        stage.settle();
        stage.run(&script.phases[0]);
        stage.settle_down();
        let ended = stage.finish();
        ended.compare(&script);
        for wrong in ended.with_each_count_off_by_one() {
            let (name, ended) = wrong;
            assert!(!ended.differences(Evidence::Full).is_empty(), "one {name} too many goes unnoticed");
        }
    });
}
