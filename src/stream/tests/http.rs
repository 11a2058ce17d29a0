//! Echo over HTTP, with correct and faulty servers.

use super::*;

/// A server that calls `serve` for each request and closes the connection when `serve` returns false.
fn serving(serve: impl Fn(usize, &mut TcpStream) -> bool + Send + Sync + 'static) -> Server {
    Server::start(move |_, mut stream| {
        stream.set_nodelay(true).unwrap();
        for number in 0.. {
            if request(&mut stream).is_none() {
                return;
            }
            if !serve(number, &mut stream) {
                return drop(close(stream));
            }
        }
    })
}

/// A server that answers each request with these bytes over persistent connections.
fn server_replying(bytes: impl Into<Vec<u8>>) -> Server {
    let bytes = bytes.into();
    serving(move |_, stream| stream.write_all(&bytes).is_ok())
}

fn expecting(server: &Server, status: &[u16], body: Option<&str>) -> RunningPath {
    let expected =
        ExpectedResponse { status: status.to_vec(), body: body.map(str::to_owned), is_agent: false };
    RunningPath::start(dial(
        server.address,
        StreamProtocol::Http { target: target(server.address), expected },
    ))
}

/// The numbers of responses with an unexpected status and with an unexpected body.
fn unexpected(path: &RunningPath) -> [u64; 2] {
    let page = path.scrape();
    let count = |reason| page.count("pathmeter_echo_unexpected_total", &[&format!("reason=\"{reason}\"")]);
    [count("status"), count("body")]
}

#[test]
fn unexpected_response_is_an_answer_and_is_counted() {
    let to_u64 = |count: usize| u64::try_from(count).unwrap();
    for (answered, status, body, is_status, is_body) in [
        (answer("200 OK", "all is well"), &[][..], None, true, true),
        (answer("200 OK", "all is well"), &[], Some("is w"), true, true),
        (answer("204 No Content", ""), &[], None, true, true),
        (answer("503 Service Unavailable", "is well"), &[], Some("well"), false, true),
        (answer("301 Moved Permanently", ""), &[], None, false, true),
        (answer("200 OK", "well"), &[204, 404], None, false, true),
        (answer("404 Not Found", "none"), &[204, 404], None, true, true),
        (answer("200 OK", "all is ill"), &[], Some("well"), true, false),
        (answer("200 OK", ""), &[], Some("well"), true, false),
    ] {
        let server = server_replying(answered.as_bytes());
        let mut path = expecting(&server, status, body);
        path.until("answers", |observed| observed.answered() >= 5);
        let observed = path.stop();
        assert_eq!(
            (observed.answered(), observed.connections),
            (observed.sent(), 1),
            "{answered}: {observed:?}"
        );
        let sent = to_u64(observed.sent());
        let expected = [if is_status { 0 } else { sent }, if is_body { 0 } else { sent }];
        assert_eq!(unexpected(&path), expected, "{answered}");
    }
}

#[test]
fn long_and_chunked_bodies_are_read_to_their_end() {
    let long = "x".repeat(200_000);
    let chunked =
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nall\r\n8\r\n is well\r\n0\r\n\r\n";
    for (answered, is_found) in [
        (answer("200 OK", &format!("all is well{long}")), true),
        // The expected text is beyond the searched part.
        (answer("200 OK", &format!("{long}all is well")), false),
        (chunked.to_owned(), true),
    ] {
        let server = server_replying(answered.as_bytes());
        let mut path = expecting(&server, &[], Some("all is well"));
        path.until("answers", |observed| observed.answered() >= 10);
        let observed = path.stop();
        assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
        let wrong = if is_found { 0 } else { u64::try_from(observed.sent()).unwrap() };
        assert_eq!(unexpected(&path), [0, wrong]);
    }
}

#[test]
fn server_without_keep_alive_gets_a_connection_per_request() {
    let closing = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
    let until_the_end = "HTTP/1.1 200 OK\r\n\r\nok";
    let old = "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok";
    for bytes in [closing, until_the_end, old] {
        let server = serving(move |_, stream| {
            stream.write_all(bytes.as_bytes()).unwrap();
            false
        });
        let mut path = RunningPath::with(TestProtocol::Http.dial(server.address), |spec| {
            // Reconnecting takes some time.
            spec.interval = Duration::from_millis(150);
        });
        path.until("answers", |observed| observed.answered() >= 5);
        let observed = path.stop();
        assert_eq!((observed.lost(), observed.answered()), (0, observed.sent()), "{bytes}: {observed:?}");
        assert!(observed.connections >= observed.answered(), "{bytes}: {observed:?}");
        assert_eq!(path.ended_otherwise(&["closed"]), 0, "{bytes}");
    }
}

#[test]
fn truncated_response_is_lost_and_a_missing_one_is_requested_again() {
    for (half, lost) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly a part", 1),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n64\r\nonly a part", 1),
        // The server may not have seen the request.
        ("", 0),
    ] {
        let server = Server::start(move |number, mut stream| {
            for exchange in 0.. {
                if request(&mut stream).is_none() {
                    return;
                }
                if number == 0 && exchange == 2 {
                    stream.write_all(half.as_bytes()).unwrap();
                    return drop(close(stream));
                }
                stream.write_all(answer("200 OK", "ok").as_bytes()).unwrap();
            }
        });
        let mut path = expecting(&server, &[], None);
        path.until("answers over another connection", |observed| observed.answered() >= 10);
        let observed = path.stop();
        assert_eq!(
            (observed.lost(), observed.connections, observed.errors.len()),
            (lost, 2, lost),
            "{half:?}: {observed:?}"
        );
        assert_eq!(
            (path.ended("closed"), path.ended_otherwise(&["closed"])),
            (1, 0),
            "{half:?}: {:?}",
            path.observed
        );
    }
}

#[test]
fn invalid_http_ends_the_connection() {
    for bytes in [
        "SSH-2.0-OpenSSH_9.6\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    ] {
        let server = serving(move |number, stream| match number {
            2 => stream.write_all(bytes.as_bytes()).is_err(),
            _ => stream.write_all(answer("200 OK", "ok").as_bytes()).is_ok(),
        });
        let mut path = expecting(&server, &[], None);
        path.until("an error", |observed| !observed.errors.is_empty());
        path.handle.remove(ID);
        let observed = path.stop();
        assert_eq!(observed.lost(), observed.errors.len(), "{bytes:?}: {observed:?}");
        assert!(observed.mentions(&server.address.to_string()), "{bytes:?}: {observed:?}");
        assert!(path.ended("protocol") >= 1, "{bytes:?}: {:?}", path.observed);
        assert_eq!(path.ended_otherwise(&["protocol"]), 0, "{bytes:?}: {:?}", path.observed);
    }
}

#[test]
fn slow_body_does_not_lengthen_the_round_trip() {
    let release = Arc::new(AtomicBool::new(false));
    let released = Arc::clone(&release);
    let server = serving(move |number, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok").unwrap();
        while number == 0 && !released.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        stream.write_all(b".").is_ok()
    });
    let mut path = expecting(&server, &[], Some("ok."));
    path.until("a first request", |observed| observed.sent() == 1);
    // Further requests wait for the complete response.
    let heartbeats = path.handle.series().progress.get();
    eventually("one second of heartbeats", || {
        (path.handle.series().progress.get() >= heartbeats + 4).then_some(())
    });
    assert_eq!(path.collect().decisions().count(), 0);
    release.store(true, Ordering::SeqCst);
    path.until("answers", |observed| observed.answered() >= 10);
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
    let trips: Vec<Duration> = observed.decisions().filter_map(|(.., rtt)| rtt).collect();
    assert!(
        trips[0] < trips[1],
        "the first response head came at once, the second request waited: {trips:?}"
    );
    assert_eq!(unexpected(&path), [0, 0]);
}

#[test]
fn endless_body_times_out() {
    let server = serving(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok").unwrap();
        hold(stream.try_clone().unwrap());
        false
    });
    let mut path = RunningPath::brief(TestProtocol::Http.dial(server.address));
    path.until("a second connection", |observed| observed.connections >= 2);
    let observed = path.stop();
    assert_eq!(observed.lost(), observed.sent(), "{observed:?}");
    assert_eq!(path.ended_otherwise(&["timeout"]), 0);
}

#[test]
fn response_before_the_request_is_not_an_answer() {
    let server = Server::start(|number, mut stream| {
        if number == 0 {
            stream.write_all(answer("408 Request Timeout", "too slow").as_bytes()).unwrap();
            drop(close(stream));
        } else {
            Host::Http(stream).answer_all();
        }
    });
    let mut path = RunningPath::with(TestProtocol::Http.dial(server.address), |spec| {
        spec.interval = Duration::from_millis(100)
    });
    path.until("answers over another connection", |observed| {
        observed.connections == 2 && observed.answered() >= 3
    });
    let observed = path.stop();
    assert!(observed.lost() <= 1, "{observed:?}");
    assert_eq!(unexpected(&path), [0, 0]);
}

#[test]
fn request_matches_the_configuration() {
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let server = Server::start(move |_, mut stream| {
        while let Some(head) = request(&mut stream) {
            seen.lock().unwrap().push(head);
            if stream.write_all(answer("200 OK", "ok").as_bytes()).is_err() {
                return;
            }
        }
    });
    let target = HttpTarget {
        authority: "shop.example.net:8443".to_owned(),
        path: "/health?deep=1".to_owned(),
        signer: None,
        secure: None,
    };
    let mut path =
        RunningPath::start(dial(server.address, StreamProtocol::Http { target, expected: any_success() }));
    path.until("answers", |observed| observed.answered() >= 3);
    let observed = path.stop();
    let heads = heads.lock().unwrap();
    assert_eq!(heads.len(), observed.sent());
    for head in heads.iter() {
        assert!(head.starts_with("GET /health?deep=1 HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("\r\nhost: shop.example.net:8443\r\n"), "{head}");
        assert!(
            head.contains(&format!("\r\nuser-agent: {}\r\n", super::super::http_target::USER_AGENT_VALUE)),
            "{head}"
        );
    }
}
