//! Echo over WebSocket, with faulty servers.

use super::*;
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};

type Socket = WebSocket<TcpStream>;

/// A server that calls `serve` for each connection after its upgrade.
fn upgraded(serve: impl Fn(usize, Socket) + Send + Sync + 'static) -> Server {
    Server::start(move |number, stream| {
        if let Ok(socket) = tungstenite::accept(stream) {
            serve(number, socket);
        }
    })
}

/// Echoes each message after `change`.
fn echo(mut socket: Socket, mut change: impl FnMut(usize, Message) -> Vec<Message>) {
    for number in 0.. {
        let Ok(message) = socket.read() else { return };
        for message in change(number, message) {
            if socket.send(message).is_err() {
                return;
            }
        }
    }
}

#[test]
fn changed_message_is_not_an_answer_and_the_connection_stays() {
    let changes: [fn(Message) -> Vec<Message>; 5] = [
        |_| vec![Message::text("hello")],
        |message| vec![Message::binary(message.into_data())],
        |message| vec![Message::text(message.to_text().unwrap().replace("seq\":3", "seq\":4"))],
        |message| vec![Message::text(message.to_text().unwrap().to_owned() + " ")],
        |message| vec![Message::text(message.to_text().unwrap().replace("pad\":\".", "pad\":\"x"))],
    ];
    for (which, change) in changes.into_iter().enumerate() {
        let server = upgraded(move |_, socket| {
            echo(socket, |number, message| if number == 3 { change(message) } else { vec![message] });
        });
        let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
        path.until("answers before and after", |observed| observed.answered() >= 20);
        path.handle.remove(ID);
        let observed = path.stop();
        let mismatches =
            observed.mismatched(Mismatch::Malformed) + observed.mismatched(Mismatch::Unsolicited);
        assert_eq!((observed.unanswered(), mismatches), (vec![3], 1), "change {which}: {observed:?}");
        assert_eq!((observed.connections, observed.errors.len()), (1, 0), "change {which}: {observed:?}");
    }
}

#[test]
fn unsolicited_messages_are_counted_and_ignored() {
    let server = upgraded(|_, mut socket| {
        socket.send(Message::text("welcome to the echo service")).unwrap();
        echo(socket, |number, message| match number {
            1 => vec![message.clone(), message],
            2 => vec![Message::binary(vec![0; 16]), message, Message::text("")],
            3 => vec![Message::Pong("unasked".into()), message],
            _ => vec![message],
        });
    });
    for format in [MessageFormat::Text, MessageFormat::Binary] {
        let protocol =
            StreamProtocol::WebSocket { target: target(server.address), format, bytes: BYTES as usize };
        let mut path = RunningPath::start(dial(server.address, protocol));
        path.until("answers", |observed| observed.answered() >= 10);
        let observed = path.stop();
        assert_eq!(
            (observed.answered(), observed.connections),
            (observed.sent(), 1),
            "{format:?}: {observed:?}"
        );
        let counts = (
            observed.mismatched(Mismatch::Malformed),
            observed.count(|report| *report == EchoReport::Duplicate),
        );
        assert_eq!(counts, (3, 1), "{format:?}: {observed:?}");
    }
}

/// The first error of a path whose server answers the upgrade with these bytes, and the counts of `denied`
/// and `protocol`.
fn refused(bytes: &str) -> (String, u64, u64) {
    let bytes = bytes.to_owned();
    let server = Server::start(move |_, mut stream| {
        if request(&mut stream).is_some() {
            stream.write_all(bytes.as_bytes()).unwrap();
            drop(close(stream));
        }
    });
    let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
    let observed = path.until("an error", |observed| !observed.errors.is_empty());
    let error = observed.errors[0].replace(&server.address.to_string(), "b");
    path.handle.remove(ID);
    let observed = path.stop();
    assert_eq!((observed.connections, observed.lost()), (0, 0), "{observed:?}");
    (error, path.ended("denied"), path.ended("protocol"))
}

#[test]
fn refused_upgrade_is_denied_with_the_text_of_the_server() {
    for (status, text) in [
        ("403 Forbidden", "add your address to responder.allow here"),
        ("426 Upgrade Required", "this is a WebSocket endpoint"),
        ("500 Internal Server Error", "something broke"),
        ("200 OK", "hello"),
        ("302 Found", ""),
    ] {
        let (error, denied, protocol) = refused(&answer(status, &format!("{text}\nand more\n")));
        assert_eq!(error, format!("WebSocket handshake with b: server answered {status} {text:?}"));
        assert!(denied >= 1 && protocol == 0, "{status}");
    }
}

#[test]
fn invalid_handshake_is_a_protocol_error() {
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n";
    for bytes in [
        format!("{upgrade}sec-websocket-accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"),
        format!("{upgrade}\r\n"),
        "SSH-2.0-OpenSSH_9.6\r\n\r\n".to_owned(),
        "HTTP/1.1 101 Switching Protocols\r\n\r\n".to_owned(),
    ] {
        let (error, denied, protocol) = refused(&bytes);
        assert!(error.starts_with("WebSocket handshake with b: "), "{error}");
        assert!(protocol >= 1 && denied == 0, "{bytes:?}: {error}");
    }
}

#[test]
fn server_pings_are_answered_between_replies() {
    let pongs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&pongs);
    let server = upgraded(move |_, mut socket| {
        for number in 0_u64.. {
            let Ok(message) = socket.read() else { return };
            let sent = if let Message::Pong(payload) = message {
                assert_eq!(&payload[..], b"there?");
                counted.fetch_add(1, Ordering::SeqCst);
                Ok(())
            } else {
                socket.send(message)
            };
            if sent.is_err() || (number % 4 == 0 && socket.send(Message::Ping("there?".into())).is_err()) {
                return;
            }
        }
    });
    let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
    path.until("answers", |observed| observed.answered() >= 10);
    eventually("pongs", || (pongs.load(Ordering::SeqCst) >= 5).then_some(()));
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
    assert_eq!(observed.mismatched(Mismatch::Malformed), 0);
}

#[test]
fn server_that_floods_unmatched_messages_is_disconnected() {
    let talks: [fn() -> Message; 2] = [|| Message::Pong("?".into()), || Message::text("hello")];
    for talk in talks {
        let server = upgraded(move |number, mut socket| {
            if number > 0 {
                return echo(socket, |_, message| vec![message]);
            }
            while socket.send(talk()).is_ok() {}
        });
        let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
        path.until("answers over another connection", |observed| {
            observed.answered() >= 5 && observed.connections >= 2
        });
        let observed = path.stop();
        assert!(observed.mentions("sends too many messages that answer no request"), "{observed:?}");
        assert_eq!(path.ended("protocol"), 1);
    }
}

#[test]
fn ping_is_answered_while_nothing_is_sent() {
    let server = upgraded(|_, mut socket| {
        let Ok(message) = socket.read() else { return };
        socket.send(Message::Ping("there?".into())).unwrap();
        match socket.read() {
            Ok(Message::Pong(_)) => socket.send(message).unwrap(),
            other => panic!("no pong but {other:?}"),
        }
        hold(socket.get_ref().try_clone().unwrap());
    });
    let mut path =
        RunningPath::with(TestProtocol::WebSocket.dial(server.address), |spec| spec.unanswered_max = 1);
    path.until("an answer, after the pong", |observed| observed.answered() >= 1);
    path.handle.remove(ID);
    assert_eq!(path.stop().lost(), 0);
}

#[test]
fn close_code_and_reason_are_reported() {
    let server = upgraded(|number, mut socket| {
        if number > 0 {
            return echo(socket, |_, message| vec![message]);
        }
        for _ in 0..3 {
            let Ok(message) = socket.read() else { return };
            socket.send(message).unwrap();
        }
        let frame = CloseFrame { code: CloseCode::Away, reason: "this agent is stopping".into() };
        socket.close(Some(frame)).unwrap();
        while socket.read().is_ok() {}
    });
    let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
    path.until("answers over another connection", |observed| {
        observed.connections >= 2 && observed.answered() >= 10
    });
    let observed = path.stop();
    let error = &observed.errors[0];
    assert!(error.starts_with(&format!("{} closed the WebSocket: ", server.address)), "{error}");
    assert!(error.contains("1001") && error.contains("this agent is stopping"), "{error}");
    assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (1, 0));
}

#[test]
fn invalid_frames_end_the_connection() {
    // A masked frame, an unknown opcode, invalid UTF-8, and a length above the limit.
    for bytes in [&b"\x81\x80aaaa"[..], b"\x83\0", b"\x81\x01\xff", b"\x82\x7f\0\0\0\0\xff\0\0\0"] {
        let server = upgraded(move |number, socket| {
            if number > 0 {
                return echo(socket, |_, message| vec![message]);
            }
            let mut stream = socket.get_ref().try_clone().unwrap();
            stream.write_all(bytes).unwrap();
            hold(stream);
        });
        let mut path = RunningPath::start(TestProtocol::WebSocket.dial(server.address));
        path.until("answers over another connection", |observed| observed.answered() >= 5);
        let observed = path.stop();
        assert!(
            observed.errors[0].starts_with(&format!("reading from {}: ", server.address)),
            "{observed:?}"
        );
        assert_eq!((path.ended("protocol"), path.ended_otherwise(&["protocol"])), (1, 0), "{bytes:x?}");
    }
}

#[test]
fn full_websocket_delays_messages_and_loses_none() {
    const BIG: usize = 65_536;
    let release = Arc::new(AtomicBool::new(false));
    let released = Arc::clone(&release);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    SockRef::from(&listener).set_recv_buffer_size(BIG).unwrap();
    let server = Server::on(listener, move |_, stream| {
        let Ok(socket) = tungstenite::accept(stream) else { return };
        while !released.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        echo(socket, |_, message| vec![message]);
    });
    let protocol = StreamProtocol::WebSocket {
        target: target(server.address),
        format: MessageFormat::Binary,
        bytes: BIG,
    };
    let mut path = RunningPath::start(dial(server.address, protocol));
    path.until("a message is sent", |observed| observed.sent() >= 1);
    let (mut sent, mut heartbeats) = (0, 0);
    let progress = |path: &RunningPath| path.handle.series().progress.get();
    eventually("the stream is full", || {
        if path.collect().sent() > sent {
            (sent, heartbeats) = (path.observed.sent(), progress(&path));
        }
        (progress(&path) >= heartbeats + 4).then_some(())
    });
    assert_eq!(path.observed.decisions().count(), 0);
    release.store(true, Ordering::SeqCst);
    path.until("replies to delayed messages", |observed| observed.answered() > sent + 30);
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
}
