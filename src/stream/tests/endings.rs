//! Ends of connections, for all protocols.

use super::*;

#[test]
fn closed_port_is_refused_and_retried() {
    let (_socket, address) = closed_port();
    for test_protocol in TestProtocol::ALL {
        let mut path = RunningPath::brief(test_protocol.dial(address));
        let observed = path.until("lost messages and connection attempts", |observed| {
            observed.lost() >= 5 && observed.errors.len() >= 3
        });
        assert!(observed.errors[0].starts_with(&format!("connecting to {address}: ")), "{observed:?}");
        assert_eq!((observed.answered(), observed.connections), (0, 0));
        path.stop();
        assert!(path.ended("refused") >= 3, "{test_protocol:?}");
        assert_eq!(path.ended_otherwise(&["refused"]), 0, "{test_protocol:?}");
    }
}

#[test]
fn reset_loses_or_resends_messages_in_flight_and_reconnects() {
    for test_protocol in TestProtocol::ALL {
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            if number > 0 {
                return host.answer_all();
            }
            if host.answer(3).and_then(|()| host.take(false)).is_some() {
                reset(host.into_stream());
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        let observed = path.until("answers over another connection", |observed| observed.answered() >= 20);
        assert_eq!(observed.connections, 2, "{test_protocol:?}: {observed:?}");
        // An HTTP server may not have seen the request: it is sent again.
        assert_eq!(
            observed.lost() >= 1,
            test_protocol != TestProtocol::Http,
            "{test_protocol:?}: {observed:?}"
        );
        let observed = path.stop();
        let is_reported = test_protocol != TestProtocol::Http;
        assert_eq!(observed.errors.len(), usize::from(is_reported), "{test_protocol:?}: {observed:?}");
        assert_eq!(
            observed.mentions(&server.address.to_string()),
            is_reported,
            "{test_protocol:?}: {observed:?}"
        );
        assert_eq!((path.ended("reset"), path.ended_otherwise(&["reset"])), (1, 0), "{test_protocol:?}");
    }
}

#[test]
fn close_loses_or_resends_messages_in_flight_and_no_others() {
    for test_protocol in TestProtocol::ALL {
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            if number > 2 {
                return host.answer_all();
            }
            if host.answer(3).and_then(|()| host.take(false)).is_some() {
                close(host.into_stream());
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("answers over the fourth connection", |observed| observed.answered() >= 20);
        let observed = path.stop();
        let is_reported = test_protocol != TestProtocol::Http;
        assert_eq!(observed.connections, 4, "{test_protocol:?}: {observed:?}");
        assert_eq!(observed.errors.len(), if is_reported { 3 } else { 0 }, "{test_protocol:?}: {observed:?}");
        assert_eq!(observed.lost() >= 3, is_reported, "{test_protocol:?}: {observed:?}");
        assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (3, 0), "{test_protocol:?}");
    }
}

#[test]
fn close_between_messages_loses_no_answered_message() {
    for test_protocol in [TestProtocol::Tcp, TestProtocol::WebSocket] {
        let too_late = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&too_late);
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(test_protocol, stream) else { return };
            if number > 2 {
                return host.answer_all();
            }
            if host.answer(3).is_some() {
                // Messages that were sent before the client saw the close arrive too late.
                counted.fetch_add(host.close(), Ordering::SeqCst);
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("answers over the fourth connection", |observed| observed.answered() >= 20);
        path.stop();
        assert_eq!(path.ended_otherwise(&["closed"]), 0, "{test_protocol:?}");
        assert_eq!(
            (path.observed.connections, path.ended("closed")),
            (4, 3),
            "{test_protocol:?}: {:?}",
            path.observed
        );
        drop(server);
        assert_eq!(
            path.observed.lost(),
            too_late.load(Ordering::SeqCst),
            "{test_protocol:?}: {:?}",
            path.observed
        );
    }
}

#[test]
fn unanswered_messages_are_lost_and_the_connection_times_out() {
    for test_protocol in TestProtocol::ALL {
        let server = Server::start(move |_, stream| {
            if let Some(host) = Host::begin(test_protocol, stream) {
                hold(host.into_stream());
            }
        });
        let mut path = RunningPath::brief(test_protocol.dial(server.address));
        path.until("a second connection", |observed| observed.connections >= 2 && observed.lost() >= 5);
        path.handle.stop(PATIENT);
        let observed = path.end();
        assert_eq!(observed.lost(), observed.sent(), "{test_protocol:?}: {observed:?}");
        let silent = format!("no reply from {} before the timeout", server.address);
        assert!(observed.errors.iter().all(|error| *error == silent), "{test_protocol:?}: {observed:?}");
        assert!(path.ended("timeout") >= 1 && path.ended_otherwise(&["timeout"]) == 0, "{test_protocol:?}");
    }
}

#[test]
fn silent_server_times_out() {
    for test_protocol in [TestProtocol::Tcp, TestProtocol::WebSocket] {
        let server = Server::start(|_, stream| hold(stream));
        let mut path = RunningPath::brief(test_protocol.dial(server.address));
        path.until("a second attempt", |observed| observed.errors.len() >= 2);
        eventually("another connection", || (server.accepted() >= 2).then_some(()));
        let observed = path.stop();
        assert_eq!(
            (observed.connections, observed.lost()),
            (0, observed.sent()),
            "{test_protocol:?}: {observed:?}"
        );
        let silent = format!("connecting to {}: timed out", server.address);
        assert!(observed.errors.iter().all(|error| *error == silent), "{test_protocol:?}: {observed:?}");
        assert_eq!(path.ended_otherwise(&["timeout"]), 0, "{test_protocol:?}");
    }
}

#[test]
fn connection_that_ends_during_its_handshake_is_retried() {
    for test_protocol in [TestProtocol::Tcp, TestProtocol::WebSocket] {
        let server = Server::start(move |number, mut stream| match number {
            0 => reset(stream),
            1 => drop(close(stream)),
            2 => {
                // In the middle of the handshake.
                let bytes: &[u8] =
                    if test_protocol == TestProtocol::Tcp { b"pmst\x01\x02" } else { b"HTTP/1.1 101 Sw" };
                stream.write_all(bytes).unwrap();
                drop(close(stream));
            }
            _ => {
                if let Some(host) = Host::begin(test_protocol, stream) {
                    host.answer_all();
                }
            }
        });
        let mut path = RunningPath::start(test_protocol.dial(server.address));
        path.until("answers", |observed| observed.answered() >= 5);
        let observed = path.stop();
        assert_eq!((observed.connections, observed.lost()), (1, 0), "{test_protocol:?}: {observed:?}");
        let ended = (path.ended("reset"), path.ended("closed"), path.ended_otherwise(&["reset", "closed"]));
        assert_eq!(ended, (1, 2, 0), "{test_protocol:?}: {:?}", path.observed.errors);
    }
}
