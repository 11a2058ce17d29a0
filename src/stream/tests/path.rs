//! The lifecycle of a path, independent of its connections.

use std::net::IpAddr;

use pathmeter_proto::machine::NotSent;

use super::*;
use crate::clock::Clock;

fn answering_server(test_protocol: TestProtocol) -> Server {
    Server::start(move |_, stream| {
        if let Some(host) = Host::begin(test_protocol, stream) {
            host.answer_all();
        }
    })
}

#[test]
fn unassigned_source_address_is_a_local_error_and_not_a_loss() {
    for test_protocol in TestProtocol::ALL {
        let server = answering_server(test_protocol);
        let unassigned: IpAddr = "192.0.2.1".parse().unwrap();
        let mut path =
            RunningPath::start(Dial { source: Some(unassigned), ..test_protocol.dial(server.address) });
        path.until("messages that are not sent", |observed| {
            observed.count(|report| *report == EchoReport::SendError(NotSent::Unreachable)) >= 5
        });
        let observed = path.stop();
        assert_eq!(
            (observed.sent(), observed.lost(), observed.connections),
            (0, 0, 0),
            "{test_protocol:?}: {observed:?}"
        );
        assert!(path.ended("local") >= 1 && path.ended_otherwise(&["local"]) == 0, "{test_protocol:?}");
        let page = path.scrape();
        assert!(page.count("pathmeter_echo_send_errors_total", &[r#"error="unreachable""#]) >= 5, "{page}");
        assert_eq!(server.accepted(), 0);
    }
}

#[test]
fn path_finishes_after_its_last_message() {
    for test_protocol in TestProtocol::ALL {
        let server = answering_server(test_protocol);
        let mut path = RunningPath::with(test_protocol.dial(server.address), |spec| spec.count = Some(10));
        path.until("the end of the path", |observed| observed.is_finished);
        let observed = path.stop();
        assert_eq!(observed.answered(), observed.sent(), "{test_protocol:?}: {observed:?}");
        let unsent: u64 = observed
            .reports
            .iter()
            .map(|report| if let EchoReport::Unsent(n) = report { *n } else { 0 })
            .sum();
        assert_eq!(observed.sent() as u64 + unsent, 10, "{test_protocol:?}");
        assert_eq!((observed.connections, observed.errors.len()), (1, 0), "{test_protocol:?}: {observed:?}");
    }
}

#[test]
fn goodbye_withdraws_unanswered_messages() {
    for test_protocol in TestProtocol::ALL {
        let [stall, silent, leave] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let (should_stall, is_silent) = (Arc::clone(&stall), Arc::clone(&silent));
        let is_leaving = Arc::clone(&leave);
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            while number > 0 || !should_stall.load(Ordering::SeqCst) {
                if host.take(true).is_none() {
                    return;
                }
            }
            is_silent.store(true, Ordering::SeqCst);
            while !is_leaving.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            if host.take(false).is_some() {
                close(host.into_stream());
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("answers", |observed| observed.answered() >= 5);
        stall.store(true, Ordering::SeqCst);
        eventually("the server stalls", || silent.load(Ordering::SeqCst).then_some(()));
        path.until("an unanswered message", |observed| observed.sent() > observed.answered());
        path.handle.peer_leaving(vec![ID, PathId(2)], Clock::now());
        eventually("the goodbye is received", || path.series.is_draining().then_some(()));
        leave.store(true, Ordering::SeqCst);
        path.until("a withdrawal and another connection", |observed| {
            // HTTP requests are sent again.
            (observed.withdrawn() >= 1 || test_protocol == TestProtocol::Http) && observed.connections >= 2
        });
        let answered = path.collect().answered();
        path.until("answers again", |observed| observed.answered() >= answered + 5);
        eventually("the peer is back", || (!path.series.is_draining()).then_some(()));
        let observed = path.stop();
        assert_eq!(observed.lost(), 0, "{test_protocol:?}: {observed:?}");
        assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (1, 0), "{test_protocol:?}");
    }
}

#[test]
fn removed_path_withdraws_messages_in_flight() {
    for test_protocol in TestProtocol::ALL {
        let server = Server::start(move |_, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            if host.answer(5).is_some() {
                hold(host.into_stream());
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("an unanswered message", |observed| {
            observed.sent() > observed.answered() && observed.answered() >= 5
        });
        path.handle.remove(ID);
        path.until("a withdrawal", |observed| observed.withdrawn() >= 1);
        eventually("the connection ends", || {
            (path.scrape().count("pathmeter_echo_connected", &[]) == 0).then_some(())
        });
        let observed = path.stop();
        assert_eq!((observed.answered(), observed.lost()), (5, 0), "{test_protocol:?}: {observed:?}");
        assert!(!observed.is_finished, "the path did not finish by itself");
    }
}

#[test]
fn stop_waits_for_messages_in_flight_within_its_grace_period() {
    for test_protocol in TestProtocol::ALL {
        let (release, is_held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (released, held) = (Arc::clone(&release), Arc::clone(&is_held));
        let server = Server::start(move |_, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            if host.answer(3).is_none() {
                return;
            }
            held.fetch_add(1, Ordering::SeqCst);
            while !released.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            host.answer_all();
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("an unanswered message", |observed| {
            observed.sent() > observed.answered() && observed.answered() >= 3
        });
        path.handle.stop(PATIENT);
        release.store(true, Ordering::SeqCst);
        let observed = path.end();
        assert_eq!(
            (observed.answered(), observed.withdrawn()),
            (observed.sent(), 0),
            "{test_protocol:?}: {observed:?}"
        );

        release.store(false, Ordering::SeqCst);
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("an unanswered message", |observed| {
            observed.sent() > observed.answered() && observed.answered() >= 3
        });
        path.handle.stop(Duration::from_millis(50));
        let observed = path.end();
        assert!(observed.withdrawn() >= 1, "{test_protocol:?}: {observed:?}");
        assert_eq!((observed.answered(), observed.lost()), (3, 0), "{test_protocol:?}: {observed:?}");
        release.store(true, Ordering::SeqCst);
        assert_eq!(is_held.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn second_stop_shortens_the_grace_period() {
    let server = Server::start(|_, stream| {
        let Some(mut host) = Host::begin(TestProtocol::Tcp, stream) else { return };
        if host.answer(5).is_some() {
            hold(host.into_stream());
        }
    });
    let mut path = RunningPath::start(TestProtocol::Tcp.dial(server.address));
    path.until("an unanswered message", |observed| {
        observed.sent() > observed.answered() && observed.answered() >= 5
    });
    path.handle.stop(PATIENT);
    // A goodbye during the stop is still handled.
    path.handle.peer_leaving(vec![ID], Clock::now());
    eventually("the goodbye is received", || path.series.is_draining().then_some(()));
    path.handle.stop(Duration::ZERO);
    let observed = path.end();
    assert!(observed.withdrawn() >= 1 && observed.lost() == 0, "{observed:?}");
}
