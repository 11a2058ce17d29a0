//! A path's own life, whatever happens to its connections.

use std::net::IpAddr;

use pathmeter_proto::machine::NotSent;

use super::*;
use crate::clock::Clock;

fn well(speech: Speech) -> Server {
    Server::start(move |_, stream| {
        if let Some(host) = Host::begin(speech, stream) {
            host.answer_all();
        }
    })
}

#[test]
fn an_address_that_is_not_ours_is_our_own_fault_and_loses_nothing() {
    for speech in Speech::ALL {
        let server = well(speech);
        let foreign: IpAddr = "192.0.2.1".parse().unwrap();
        let mut path = StreamPath::start(Dial { source: Some(foreign), ..speech.dial(server.address) });
        path.until("messages that are not sent", |told| {
            told.count(|report| *report == EchoReport::SendError(NotSent::Unreachable)) >= 5
        });
        let told = path.stop();
        assert_eq!((told.sent(), told.lost(), told.connections), (0, 0, 0), "{speech:?}: {told:?}");
        assert!(path.ended("local") >= 1 && path.ended_otherwise(&["local"]) == 0, "{speech:?}");
        let page = path.scrape();
        assert!(page.count("pathmeter_echo_send_errors_total", &[r#"error="unreachable""#]) >= 5, "{page}");
        assert_eq!(server.accepted(), 0);
    }
}

#[test]
fn a_path_ends_when_it_has_sent_all_it_should() {
    for speech in Speech::ALL {
        let server = well(speech);
        let mut path = StreamPath::with(speech.dial(server.address), |spec| spec.count = Some(10));
        path.until("its end", |told| told.is_finished);
        let told = path.stop();
        assert_eq!(told.answered(), told.sent(), "{speech:?}: {told:?}");
        let unsent: u64 =
            told.reports.iter().map(|report| if let EchoReport::Unsent(n) = report { *n } else { 0 }).sum();
        assert_eq!(told.sent() as u64 + unsent, 10, "{speech:?}");
        assert_eq!((told.connections, told.troubles.len()), (1, 0), "{speech:?}: {told:?}");
    }
}

#[test]
fn a_peer_that_said_goodbye_withdraws_what_it_does_not_answer() {
    for speech in Speech::ALL {
        let [fall_silent, silent, leave] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let (falls_silent, is_silent) = (Arc::clone(&fall_silent), Arc::clone(&silent));
        let is_leaving = Arc::clone(&leave);
        let server = Server::start(move |number, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            while number > 0 || !falls_silent.load(Ordering::SeqCst) {
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
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("answers", |told| told.answered() >= 5);
        fall_silent.store(true, Ordering::SeqCst);
        eventually("it is silent", || silent.load(Ordering::SeqCst).then_some(()));
        path.until("one that is not answered", |told| told.sent() > told.answered());
        path.handle.peer_leaving(vec![ID, PathId(2)], Clock::now());
        eventually("it is known", || path.series.is_draining().then_some(()));
        leave.store(true, Ordering::SeqCst);
        path.until("a withdrawal and another connection", |told| {
            // An HTTP server is asked again.
            (told.withdrawn() >= 1 || speech == Speech::Http) && told.connections >= 2
        });
        let answered = path.listen().answered();
        path.until("answers again", |told| told.answered() >= answered + 5);
        eventually("it is back", || (!path.series.is_draining()).then_some(()));
        let told = path.stop();
        assert_eq!(told.lost(), 0, "{speech:?}: {told:?}");
        assert_eq!((path.ended("closed"), path.ended_otherwise(&["closed"])), (1, 0), "{speech:?}");
    }
}

#[test]
fn what_is_under_way_when_a_path_is_removed_is_withdrawn() {
    for speech in Speech::ALL {
        let server = Server::start(move |_, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            if host.answer(5).is_some() {
                hold(host.into_stream());
            }
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("one that is not answered", |told| told.sent() > told.answered() && told.answered() >= 5);
        path.handle.remove(ID);
        path.until("a withdrawal", |told| told.withdrawn() >= 1);
        eventually("the connection ends", || {
            (path.scrape().count("pathmeter_echo_connected", &[]) == 0).then_some(())
        });
        let told = path.stop();
        assert_eq!((told.answered(), told.lost()), (5, 0), "{speech:?}: {told:?}");
        assert!(!told.is_finished, "it did not end by itself");
    }
}

#[test]
fn a_stop_waits_for_what_is_under_way_and_no_longer_than_it_may() {
    for speech in Speech::ALL {
        let (release, is_held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (released, held) = (Arc::clone(&release), Arc::clone(&is_held));
        let server = Server::start(move |_, stream| {
            let Some(mut host) = Host::begin(speech, stream) else { return };
            if host.answer(3).is_none() {
                return;
            }
            held.fetch_add(1, Ordering::SeqCst);
            while !released.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            host.answer_all();
        });
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("one that is not answered", |told| told.sent() > told.answered() && told.answered() >= 3);
        path.handle.stop(PATIENT);
        release.store(true, Ordering::SeqCst);
        let told = path.end();
        assert_eq!((told.answered(), told.withdrawn()), (told.sent(), 0), "{speech:?}: {told:?}");

        release.store(false, Ordering::SeqCst);
        let mut path = StreamPath::start(speech.dial(server.address));
        path.until("one that is not answered", |told| told.sent() > told.answered() && told.answered() >= 3);
        path.handle.stop(Duration::from_millis(50));
        let told = path.end();
        assert!(told.withdrawn() >= 1, "{speech:?}: {told:?}");
        assert_eq!((told.answered(), told.lost()), (3, 0), "{speech:?}: {told:?}");
        release.store(true, Ordering::SeqCst);
        assert_eq!(is_held.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn who_stops_us_twice_is_not_kept_waiting() {
    let server = Server::start(|_, stream| {
        let Some(mut host) = Host::begin(Speech::Tcp, stream) else { return };
        if host.answer(5).is_some() {
            hold(host.into_stream());
        }
    });
    let mut path = StreamPath::start(Speech::Tcp.dial(server.address));
    path.until("one that is not answered", |told| told.sent() > told.answered() && told.answered() >= 5);
    path.handle.stop(PATIENT);
    // Neither is a goodbye that comes meanwhile unheard.
    path.handle.peer_leaving(vec![ID], Clock::now());
    eventually("it is known", || path.series.is_draining().then_some(()));
    path.handle.stop(Duration::ZERO);
    let told = path.end();
    assert!(told.withdrawn() >= 1 && told.lost() == 0, "{told:?}");
}
