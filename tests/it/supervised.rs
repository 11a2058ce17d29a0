//! What a service manager is told, in the order that sd_notify(3) asks for.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host};

/// A service manager's end of the notify protocol.
struct Manager {
    socket: UnixDatagram,
    dir: TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket, dir }
    }

    fn start(&self, host: &Host, config: &str, watchdog: Option<&str>) -> Agent {
        let socket = self.dir.path().join("notify");
        let mut environment = vec![("NOTIFY_SOCKET", socket.to_str().unwrap())];
        environment.extend(watchdog.map(|usec| ("WATCHDOG_USEC", usec)));
        Agent::start_with(host, config, &environment)
    }

    /// The next message: fields of one datagram.
    fn hear(&self) -> Vec<(String, String)> {
        let mut datagram = [0; 4_096];
        let length =
            self.socket.recv(&mut datagram).unwrap_or_else(|error| panic!("nothing was heard: {error}"));
        let text = std::str::from_utf8(&datagram[..length]).unwrap();
        text.lines()
            .map(|line| line.split_once('=').unwrap())
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    /// The next message that has this field. What comes in between is what an agent may say at any time.
    fn hear_of(&self, field: &str) -> Vec<(String, String)> {
        loop {
            let message = self.hear();
            if message.iter().any(|(name, _)| name == field) {
                return message;
            }
            let name = message[0].0.as_str();
            assert!(matches!(name, "STATUS" | "WATCHDOG"), "{message:?} came before {field}");
        }
    }
}

fn one(name: &str) -> Vec<(String, String)> {
    vec![(name.to_owned(), "1".to_owned())]
}

#[test]
fn a_manager_hears_ready_reloading_ready_and_stopping() {
    let host = Host::claim();
    let manager = Manager::new();
    let config = host.config("a", "targets: [{name: gateway, address: 127.0.0.1, port: 9}]");
    let mut agent = manager.start(&host, &config, None);
    assert_eq!(manager.hear(), one("READY"));
    let status = manager.hear_of("STATUS");
    assert!(status[0].1.starts_with("measuring "), "{status:?}");

    for config in [config.as_str(), "no: configuration"] {
        agent.rewrite(config);
        let before = monotonic_usec();
        agent.signal(Signal::SIGHUP);
        let message = manager.hear_of("RELOADING");
        let [(reloading, is_so), (monotonic, usec)] = &message[..] else { panic!("{message:?}") };
        assert_eq!(
            (reloading.as_str(), is_so.as_str(), monotonic.as_str()),
            ("RELOADING", "1", "MONOTONIC_USEC")
        );
        // The time tells the manager that this is the reload it asked for, and not an earlier one.
        assert!((before..=monotonic_usec()).contains(&usec.parse().unwrap()), "{before} {usec}");
        assert_eq!(manager.hear_of("READY"), one("READY"));
    }

    agent.signal(Signal::SIGTERM);
    assert_eq!(manager.hear_of("STOPPING"), one("STOPPING"));
    assert!(agent.ended().success());
}

#[test]
fn a_watchdog_is_fed_while_the_loops_run() {
    let host = Host::claim();
    let manager = Manager::new();
    let _agent = manager.start(&host, &host.config("a", ""), Some("1000000"));
    assert_eq!(manager.hear(), one("READY"));
    for _ in 0..3 {
        assert_eq!(manager.hear_of("WATCHDOG"), one("WATCHDOG"));
    }
}

#[test]
fn a_watchdog_that_nobody_asked_for_is_not_fed() {
    let host = Host::claim();
    let manager = Manager::new();
    let mut agent = manager.start(&host, &host.config("a", ""), None);
    assert_eq!(manager.hear(), one("READY"));
    manager.hear_of("STATUS");
    agent.signal(Signal::SIGTERM);
    assert!(agent.ended().success());
    manager.socket.set_nonblocking(true).unwrap();
    let mut said = Vec::new();
    let mut datagram = [0; 4_096];
    let silence = loop {
        match manager.socket.recv(&mut datagram) {
            Ok(length) => said.extend_from_slice(&datagram[..length]),
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(silence, ErrorKind::WouldBlock);
    assert!(!String::from_utf8(said).unwrap().contains("WATCHDOG"));
}

fn monotonic_usec() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec()).unwrap() / 1_000
}

#[test]
fn a_port_that_the_manager_listens_on_is_served_and_outlives_us() {
    let host = Host::claim();
    let listener = TcpListener::bind((host.front().ip(), 0)).unwrap();
    let kept = listener.try_clone().unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut agent = Agent::start_on(listener, &host.config("a", ""));
    assert_eq!(agent.json("/api/v1/agent")["ports"]["http"], port);
    assert!(agent.log().contains("the service manager passed another port"), "{}", agent.log());
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.ended().code(), Some(0), "{}", agent.log());
    // Whoever asks while it restarts waits for the next one.
    let waiting = TcpStream::connect(kept.local_addr().unwrap()).unwrap();
    drop((waiting, kept));
}
