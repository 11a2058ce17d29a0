//! Echo over a WebSocket, with a server that echoes something else or nothing.

use super::*;
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};

type Socket = WebSocket<TcpStream>;

/// Serves each connection after its upgrade.
fn upgraded(serve: impl Fn(usize, Socket) + Send + Sync + 'static) -> Server {
    Server::start(move |number, stream| {
        if let Ok(socket) = tungstenite::accept(stream) {
            serve(number, socket);
        }
    })
}

/// Sends back what comes, as `change` makes it.
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
fn another_message_than_was_sent_is_no_answer_and_the_connection_stays() {
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
        let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
        path.until("answers before and after", |told| told.answered() >= 20);
        path.handle.remove(ID);
        let told = path.stop();
        let mismatches = told.mismatched(Mismatch::Malformed) + told.mismatched(Mismatch::Unsolicited);
        assert_eq!((told.passed_over(), mismatches), (vec![3], 1), "change {which}: {told:?}");
        assert_eq!((told.connections, told.troubles.len()), (1, 0), "change {which}: {told:?}");
    }
}

#[test]
fn what_nobody_asked_for_is_counted_and_does_no_harm() {
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
        let over = StreamProtocol::WebSocket { place: place(server.address), format, bytes: BYTES as usize };
        let mut path = StreamPath::start(dial(server.address, over));
        path.until("answers", |told| told.answered() >= 10);
        let told = path.stop();
        assert_eq!((told.answered(), told.connections), (told.sent(), 1), "{format:?}: {told:?}");
        let counts =
            (told.mismatched(Mismatch::Malformed), told.count(|report| *report == EchoReport::Duplicate));
        assert_eq!(counts, (3, 1), "{format:?}: {told:?}");
    }
}

/// The trouble and the reason of a path whose server answers the upgrade with these words.
fn refused(words: &str) -> (String, u64, u64) {
    let words = words.to_owned();
    let server = Server::start(move |_, mut stream| {
        if request(&mut stream).is_some() {
            stream.write_all(words.as_bytes()).unwrap();
            drop(close(stream));
        }
    });
    let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
    let told = path.until("a trouble", |told| !told.troubles.is_empty());
    let trouble = told.troubles[0].replace(&server.address.to_string(), "b");
    path.handle.remove(ID);
    let told = path.stop();
    assert_eq!((told.connections, told.lost()), (0, 0), "{told:?}");
    (trouble, path.ended("denied"), path.ended("protocol"))
}

#[test]
fn a_refused_upgrade_is_denied_with_what_the_server_says() {
    for (status, sentence) in [
        ("403 Forbidden", "add your address to responder.allow here"),
        ("426 Upgrade Required", "/ws speaks WebSocket"),
        ("500 Internal Server Error", "something broke"),
        ("200 OK", "hello"),
        ("302 Found", ""),
    ] {
        let (trouble, denied, protocol) = refused(&answer(status, &format!("{sentence}\nand more\n")));
        assert_eq!(trouble, format!("asking b for a WebSocket: answered {status} {sentence:?}"));
        assert!(denied >= 1 && protocol == 0, "{status}");
    }
}

#[test]
fn a_server_that_cannot_shake_hands_does_not_speak_as_it_should() {
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n";
    for words in [
        format!("{upgrade}sec-websocket-accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"),
        format!("{upgrade}\r\n"),
        "SSH-2.0-OpenSSH_9.6\r\n\r\n".to_owned(),
        "HTTP/1.1 101 Switching Protocols\r\n\r\n".to_owned(),
    ] {
        let (trouble, denied, protocol) = refused(&words);
        assert!(trouble.starts_with("asking b for a WebSocket: "), "{trouble}");
        assert!(protocol >= 1 && denied == 0, "{words:?}: {trouble}");
    }
}

#[test]
fn pings_of_the_server_are_answered_between_answers() {
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
    let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
    path.until("answers", |told| told.answered() >= 10);
    eventually("pongs", || (pongs.load(Ordering::SeqCst) >= 5).then_some(()));
    let told = path.stop();
    assert_eq!((told.answered(), told.connections), (told.sent(), 1), "{told:?}");
    assert_eq!(told.mismatched(Mismatch::Malformed), 0);
}

#[test]
fn who_talks_without_end_is_left() {
    let talks: [fn() -> Message; 2] = [|| Message::Pong("?".into()), || Message::text("hello")];
    for talk in talks {
        let server = upgraded(move |number, mut socket| {
            if number > 0 {
                return echo(socket, |_, message| vec![message]);
            }
            while socket.send(talk()).is_ok() {}
        });
        let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
        path.until("answers over another connection", |told| told.answered() >= 5 && told.connections >= 2);
        let told = path.stop();
        assert!(told.mentions("talks without end and answers nothing"), "{told:?}");
        assert_eq!(path.ended("protocol"), 1);
    }
}

#[test]
fn a_ping_is_answered_though_nothing_is_sent() {
    let server = upgraded(|_, mut socket| {
        let Ok(message) = socket.read() else { return };
        socket.send(Message::Ping("there?".into())).unwrap();
        match socket.read() {
            Ok(Message::Pong(_)) => socket.send(message).unwrap(),
            other => panic!("no pong but {other:?}"),
        }
        hold(socket.get_ref().try_clone().unwrap());
    });
    let mut path = StreamPath::with(Speech::WebSocket.dial(server.address), |spec| spec.unanswered_max = 1);
    path.until("an answer, after the pong", |told| told.answered() >= 1);
    path.handle.remove(ID);
    assert_eq!(path.stop().lost(), 0);
}

#[test]
fn a_server_that_closes_with_a_code_is_quoted() {
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
    let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
    path.until("answers over another connection", |told| told.connections >= 2 && told.answered() >= 10);
    let told = path.stop();
    let trouble = &told.troubles[0];
    assert!(trouble.starts_with(&format!("{} closed the WebSocket: ", server.address)), "{trouble}");
    assert!(trouble.contains("1001") && trouble.contains("this agent is stopping"), "{trouble}");
    assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (1, 0));
}

#[test]
fn frames_that_break_the_rules_end_the_connection() {
    // A masked frame, an unknown opcode, text that is none, and a length beyond everything that is taken.
    for bytes in [&b"\x81\x80aaaa"[..], b"\x83\0", b"\x81\x01\xff", b"\x82\x7f\0\0\0\0\xff\0\0\0"] {
        let server = upgraded(move |number, socket| {
            if number > 0 {
                return echo(socket, |_, message| vec![message]);
            }
            let mut stream = socket.get_ref().try_clone().unwrap();
            stream.write_all(bytes).unwrap();
            hold(stream);
        });
        let mut path = StreamPath::start(Speech::WebSocket.dial(server.address));
        path.until("answers over another connection", |told| told.answered() >= 5);
        let told = path.stop();
        assert!(told.troubles[0].starts_with(&format!("reading from {}: ", server.address)), "{told:?}");
        assert_eq!((path.ended("protocol"), path.ended_otherwise(&["protocol"])), (1, 0), "{bytes:x?}");
    }
}

#[test]
fn who_stops_reading_a_websocket_makes_messages_wait_and_loses_none() {
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
    let over =
        StreamProtocol::WebSocket { place: place(server.address), format: MessageFormat::Binary, bytes: BIG };
    let mut path = StreamPath::start(dial(server.address, over));
    path.until("a message left", |told| told.sent() >= 1);
    let (mut sent, mut beats) = (0, 0);
    let progress = |path: &StreamPath| path.handle.series().progress.get();
    eventually("the stream is full", || {
        if path.listen().sent() > sent {
            (sent, beats) = (path.told.sent(), progress(&path));
        }
        (progress(&path) >= beats + 4).then_some(())
    });
    assert_eq!(path.told.decisions().count(), 0);
    release.store(true, Ordering::SeqCst);
    path.until("those that waited are answered", |told| told.answered() > sent + 30);
    let told = path.stop();
    assert_eq!((told.answered(), told.connections), (told.sent(), 1), "{told:?}");
}
