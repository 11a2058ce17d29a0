//! What a service manager is told, in the order that sd_notify(3) asks for, and the sockets that it passes.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, get, skipped};

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

const CONTRADICTION: &str =
    "the HTTP sockets from the service manager differ from listen.http; using those of the service manager";

/// Where HTTP is asked if a manager passes this listener.
fn front(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().unwrap()
}

/// What the agent says when a manager passes these sockets, and ends.
fn refused(host: &Host, sockets: &[BorrowedFd]) -> String {
    // Nothing listens where it is asked.
    Agent::try_start_on(sockets, &host.config("a", ""), host.front()).expect_err("it is served")
}

#[test]
fn a_port_that_the_manager_listens_on_outlives_the_agent() {
    let host = Host::claim();
    let listener = TcpListener::bind(host.front()).unwrap();
    let start = || Agent::try_start_on(&[listener.as_fd()], &host.config("a", ""), front(&listener)).unwrap();
    let mut agent = start();
    let log = agent.log();
    assert!(
        log.contains("using the HTTP sockets from the service manager") && !log.contains(CONTRADICTION),
        "{log}"
    );
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.ended().code(), Some(0), "{}", agent.log());

    // Whoever asks in between is answered by the next one.
    let mut waiting = TcpStream::connect(front(&listener)).unwrap();
    waiting.set_read_timeout(Some(DEADLINE)).unwrap();
    waiting.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let _agent = start();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 OK\r\n") && answer.contains("\npathmeter_build_info"), "{answer}");
}

#[test]
fn all_sockets_that_are_passed_are_served() {
    let (a, b) = (Host::claim(), Host::claim());
    let sockets = [&a, &b].map(|host| TcpListener::bind(host.front()).unwrap());
    let passed = sockets.each_ref().map(AsFd::as_fd);
    let config = a.config("a", "").replacen(&a.front().to_string(), "0.0.0.0:9862", 1);
    let agent = Agent::try_start_on(&passed, &config, a.front()).unwrap();
    for host in [&a, &b] {
        assert_eq!(get(host.front(), "/metrics").unwrap().status, 200, "{}", agent.log());
    }
    assert!(!agent.log().contains(CONTRADICTION), "{}", agent.log());
}

#[test]
fn a_port_that_contradicts_the_configuration_is_served_and_told() {
    let host = Host::claim();
    let listener = TcpListener::bind(host.at(0)).unwrap();
    let agent = Agent::try_start_on(&[listener.as_fd()], &host.config("a", ""), front(&listener)).unwrap();
    assert_eq!(agent.json("/api/v1/agent")["ports"]["http"], front(&listener).port());
    assert!(agent.log().contains(CONTRADICTION), "{}", agent.log());
}

#[test]
fn a_client_over_a_socket_of_both_families_has_the_address_that_it_is_known_by() {
    let host = Host::claim();
    let Ok(listener) = TcpListener::bind("[::]:0") else { return skipped("this host has no IPv6") };
    let http = SocketAddr::from((Ipv4Addr::LOCALHOST, front(&listener).port()));
    // What the kernel calls the client is the address that must not be shown.
    let client = TcpStream::connect(http).unwrap();
    let (_, seen) = listener.accept().unwrap();
    if seen.ip() != Ipv4Addr::LOCALHOST.to_ipv6_mapped() {
        return skipped("an IPv6 socket takes no IPv4 connections here");
    }
    drop(client);
    let agent = Agent::try_start_on(&[listener.as_fd()], &host.config("a", ""), http).unwrap();
    assert_eq!(agent.json("/api/v1/agent")["you"]["address"], "127.0.0.1");
}

#[test]
fn what_is_no_listening_tcp_socket_is_refused() {
    let host = Host::claim();
    let udp = host.socket(0);
    let connected = {
        let listener = TcpListener::bind(host.at(0)).unwrap();
        TcpStream::connect(front(&listener)).unwrap()
    };
    let file = tempfile::tempfile().unwrap();
    let listener = TcpListener::bind(host.at(0)).unwrap();
    for (sockets, number) in [
        (&[udp.as_fd()][..], 1),
        (&[connected.as_fd()], 1),
        (&[file.as_fd()], 1),
        (&[listener.as_fd(), udp.as_fd()], 2),
    ] {
        let log = refused(&host, sockets);
        let sentence = format!("error: socket {number} of LISTEN_FDS is not a listening TCP socket");
        assert!(log.contains(&sentence), "{log}");
    }
}

#[test]
fn sockets_of_different_ports_are_refused() {
    let host = Host::claim();
    let sockets = [(); 2].map(|()| TcpListener::bind(host.at(0)).unwrap());
    let log = refused(&host, &sockets.each_ref().map(AsFd::as_fd));
    let [first, other] = sockets.each_ref().map(front);
    let sentence = format!("error: sockets of LISTEN_FDS have different ports, {first} and {other}");
    assert!(log.contains(&sentence), "{log}");
}

fn monotonic_usec() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec()).unwrap() / 1_000
}
