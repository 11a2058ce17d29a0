//! How connections end, whatever is spoken over them.

use super::*;

#[test]
fn a_port_where_nobody_listens_is_refused_and_tried_again() {
    let (_socket, address) = closed_port();
    for speech in Speech::ALL {
        let mut path = StreamPath::brief(speech.dial(address));
        let told = path.until("messages that waited in vain, and attempts", |told| {
            told.lost() >= 5 && told.troubles.len() >= 3
        });
        assert!(told.troubles[0].starts_with(&format!("connecting to {address}: ")), "{told:?}");
        assert_eq!((told.answered(), told.connections), (0, 0));
        path.stop();
        assert!(path.ended("refused") >= 3, "{speech:?}");
        assert_eq!(path.ended_otherwise(&["refused"]), 0, "{speech:?}");
    }
}

#[test]
fn a_reset_loses_what_was_under_way_or_has_it_asked_again_and_another_connection_is_made() {
    for speech in Speech::ALL {
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            if number > 0 {
                return host.answer_all();
            }
            if host.answer(3).and_then(|()| host.take(false)).is_some() {
                reset(host.into_stream());
            }
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        let told = path.until("answers over another connection", |told| told.answered() >= 20);
        assert_eq!(told.connections, 2, "{speech:?}: {told:?}");
        // An HTTP server may not have seen the request: it is asked again.
        assert_eq!(told.lost() >= 1, speech != Speech::Http, "{speech:?}: {told:?}");
        let told = path.stop();
        let is_news = speech != Speech::Http;
        assert_eq!(told.troubles.len(), usize::from(is_news), "{speech:?}: {told:?}");
        assert_eq!(told.mentions(&server.address.to_string()), is_news, "{speech:?}: {told:?}");
        assert_eq!((path.ended("reset"), path.ended_otherwise(&["reset"])), (1, 0), "{speech:?}");
    }
}

#[test]
fn what_is_closed_under_way_is_lost_or_asked_again_and_everything_else_is_answered() {
    for speech in Speech::ALL {
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            if number > 2 {
                return host.answer_all();
            }
            if host.answer(3).and_then(|()| host.take(false)).is_some() {
                close(host.into_stream());
            }
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("answers over the fourth connection", |told| told.answered() >= 20);
        let told = path.stop();
        let is_news = speech != Speech::Http;
        assert_eq!(told.connections, 4, "{speech:?}: {told:?}");
        assert_eq!(told.troubles.len(), if is_news { 3 } else { 0 }, "{speech:?}: {told:?}");
        assert_eq!(told.lost() >= 3, is_news, "{speech:?}: {told:?}");
        assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (3, 0), "{speech:?}");
    }
}

#[test]
fn what_is_closed_between_two_messages_loses_none_of_those_that_were_answered() {
    for speech in [Speech::Tcp, Speech::WebSocket] {
        let orphans = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&orphans);
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            if number > 2 {
                return host.answer_all();
            }
            if host.answer(3).is_some() {
                // What left before the end was seen comes too late.
                counted.fetch_add(host.close(), Ordering::SeqCst);
            }
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("answers over the fourth connection", |told| told.answered() >= 20);
        path.stop();
        assert_eq!(path.ended_otherwise(&["closed"]), 0, "{speech:?}");
        assert_eq!((path.told.connections, path.ended("closed")), (4, 3), "{speech:?}: {:?}", path.told);
        drop(server);
        assert_eq!(path.told.lost(), orphans.load(Ordering::SeqCst), "{speech:?}: {:?}", path.told);
    }
}

#[test]
fn what_is_never_answered_is_lost_and_the_connection_is_given_up() {
    for speech in Speech::ALL {
        let server = Server::start(move |_, stream| {
            if let Some(host) = Host::begin(speech, stream) {
                hold(host.into_stream());
            }
        });
        let mut path = StreamPath::brief(speech.dial(server.address));
        path.until("a second connection", |told| told.connections >= 2 && told.lost() >= 5);
        path.handle.stop(PATIENT);
        let told = path.end();
        assert_eq!(told.lost(), told.sent(), "{speech:?}: {told:?}");
        let silent = format!("nothing came back from {} for too long", server.address);
        assert!(told.troubles.iter().all(|trouble| *trouble == silent), "{speech:?}: {told:?}");
        assert!(path.ended("timeout") >= 1 && path.ended_otherwise(&["timeout"]) == 0, "{speech:?}");
    }
}

#[test]
fn who_accepts_and_says_nothing_is_given_up_too() {
    for speech in [Speech::Tcp, Speech::WebSocket] {
        let server = Server::start(|_, stream| hold(stream));
        let mut path = StreamPath::brief(speech.dial(server.address));
        path.until("a second attempt", |told| told.troubles.len() >= 2);
        eventually("another connection", || (server.accepted() >= 2).then_some(()));
        let told = path.stop();
        assert_eq!((told.connections, told.lost()), (0, told.sent()), "{speech:?}: {told:?}");
        let silent = format!("no connection to {} for too long", server.address);
        assert!(told.troubles.iter().all(|trouble| *trouble == silent), "{speech:?}: {told:?}");
        assert_eq!(path.ended_otherwise(&["timeout"]), 0, "{speech:?}");
    }
}

#[test]
fn a_connection_that_ends_while_it_is_begun_is_tried_again() {
    for speech in [Speech::Tcp, Speech::WebSocket] {
        let server = Server::start(move |number, mut stream| match number {
            0 => reset(stream),
            1 => drop(close(stream)),
            2 => {
                // In the middle of the first words.
                let words: &[u8] = if speech == Speech::Tcp { b"pmst\x01\x02" } else { b"HTTP/1.1 101 Sw" };
                stream.write_all(words).unwrap();
                drop(close(stream));
            }
            _ => {
                if let Some(host) = Host::begin(speech, stream) {
                    host.answer_all();
                }
            }
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("answers", |told| told.answered() >= 5);
        let told = path.stop();
        assert_eq!((told.connections, told.lost()), (1, 0), "{speech:?}: {told:?}");
        let ended = (path.ended("reset"), path.ended("closed"), path.ended_otherwise(&["reset", "closed"]));
        assert_eq!(ended, (1, 2, 0), "{speech:?}: {:?}", path.told.troubles);
    }
}
