//! Connection probes.

use super::*;

const CONNECTED: &str = "pathmeter_echo_connect_duration_seconds_count";
const FAILED: &str = "pathmeter_echo_connect_failures_total";
const STAGES: &str = "pathmeter_echo_handshake_duration_seconds_count";

/// A path with frequent connection probes and almost no messages.
fn timed(dial: Dial) -> RunningPath {
    RunningPath::timing(dial, Some(Duration::from_millis(20)), |spec| spec.interval = PATIENT)
}

fn stage(page: &MetricsPage, stage: &str) -> u64 {
    page.count(STAGES, &[&format!("stage=\"{stage}\"")])
}

#[test]
fn each_protocol_reports_exactly_its_own_stages() {
    for (test_protocol, own) in [
        (TestProtocol::Tcp, "greeting"),
        (TestProtocol::WebSocket, "websocket"),
        (TestProtocol::Http, "first_byte"),
    ] {
        let server = Server::start(move |_, stream| {
            if let Some(host) = Host::begin(test_protocol, stream) {
                host.answer_all();
            }
        });
        for host in [None, Some("localhost".to_owned())] {
            let is_named = host.is_some();
            let mut path = timed(Dial { host, ..test_protocol.dial(server.address) });
            let page = eventually("timed connections", || {
                let page = path.scrape();
                (page.count(CONNECTED, &[]) >= 3 && stage(&page, own) >= 3).then_some(page)
            });
            for other in ["resolve", "tls", "greeting", "websocket", "first_byte"] {
                let is_there = other == own || (other == "resolve" && is_named);
                assert_eq!(stage(&page, other) > 0, is_there, "{test_protocol:?}, {other}\n{page}");
            }
            assert_eq!(page.count(FAILED, &[]), 0, "{page}");
            path.handle.remove(ID);
            path.stop();
        }
    }
}

#[test]
fn failed_connection_is_counted_by_reason_and_not_timed() {
    let (_socket, closed) = closed_port();
    let silent = Server::start(|_, stream| hold(stream));
    let unnamed =
        Dial { host: Some("no-such-host.invalid".to_owned()), ..TestProtocol::Tcp.dial(silent.address) };
    for (dial, reason) in [
        (TestProtocol::Tcp.dial(closed), "refused"),
        (TestProtocol::Tcp.dial(silent.address), "timeout"),
        (unnamed, "unresolved"),
    ] {
        let mut path = RunningPath::timing(dial, Some(Duration::from_millis(20)), |spec| {
            spec.interval = PATIENT;
            // A lookup that fails may take long.
            spec.lost_after = if reason == "unresolved" { PATIENT } else { BRIEF };
            spec.late_after = spec.lost_after;
        });
        let label = format!("reason=\"{reason}\"");
        let page = eventually("failures are counted", || {
            let page = path.scrape();
            (page.count(FAILED, &[&label]) >= 2).then_some(page)
        });
        assert_eq!(page.count(FAILED, &[]), page.count(FAILED, &[&label]), "{page}");
        assert_eq!(stage(&page, "greeting"), 0, "{page}");
        path.handle.remove(ID);
        path.stop();
    }
}

#[test]
fn leaving_peer_is_not_probed() {
    let server = Server::start(|_, stream| {
        if let Some(host) = Host::begin(TestProtocol::Tcp, stream) {
            host.answer_all();
        }
    });
    let mut path = timed(TestProtocol::Tcp.dial(server.address));
    eventually("timed connections", || (path.scrape().count(CONNECTED, &[]) >= 3).then_some(()));
    path.handle.peer_leaving(vec![ID], Clock::now());
    eventually("the goodbye is received", || path.series.is_draining().then_some(()));
    let before = server.accepted();
    // One attempt may be in progress.
    let deadline = std::time::Instant::now() + Duration::from_millis(500);
    eventually("half a second passes", || (std::time::Instant::now() > deadline).then_some(()));
    assert!(server.accepted() <= before + 1, "{} after {before}", server.accepted());
    path.handle.remove(ID);
    path.stop();
}
