//! Messages to the service manager, in the order that sd_notify(3) requires, and the sockets that it passes.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, get, skipped};

/// The service manager's end of the notify protocol.
struct ServiceManager {
    socket: UnixDatagram,
    dir: TempDir,
}

impl ServiceManager {
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

    /// Receives the next message: the fields of one datagram.
    fn receive(&self) -> Vec<(String, String)> {
        let mut datagram = [0; 4_096];
        let length = self.socket.recv(&mut datagram).unwrap_or_else(|error| panic!("no message: {error}"));
        let text = std::str::from_utf8(&datagram[..length]).unwrap();
        text.lines()
            .map(|line| line.split_once('=').unwrap())
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    /// Receives the next message with this field. Only messages that an agent may send at any time may come
    /// before it.
    fn receive_field(&self, field: &str) -> Vec<(String, String)> {
        loop {
            let message = self.receive();
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
fn manager_receives_ready_reloading_ready_and_stopping() {
    let host = Host::claim();
    let manager = ServiceManager::new();
    let config = host.config("a", "targets: [{name: gateway, address: 127.0.0.1, port: 9}]");
    let mut agent = manager.start(&host, &config, None);
    assert_eq!(manager.receive(), one("READY"));
    let status = manager.receive_field("STATUS");
    assert!(status[0].1.starts_with("measuring "), "{status:?}");

    for config in [config.as_str(), "no: configuration"] {
        agent.rewrite(config);
        let before = monotonic_usec();
        agent.signal(Signal::SIGHUP);
        let message = manager.receive_field("RELOADING");
        let [(reloading, value), (monotonic, usec)] = &message[..] else { panic!("{message:?}") };
        assert_eq!(
            (reloading.as_str(), value.as_str(), monotonic.as_str()),
            ("RELOADING", "1", "MONOTONIC_USEC")
        );
        // The time shows that this is the requested reload, and not an earlier one.
        assert!((before..=monotonic_usec()).contains(&usec.parse().unwrap()), "{before} {usec}");
        assert_eq!(manager.receive_field("READY"), one("READY"));
    }

    agent.signal(Signal::SIGTERM);
    assert_eq!(manager.receive_field("STOPPING"), one("STOPPING"));
    assert!(agent.wait().success());
}

#[test]
fn watchdog_is_notified_while_the_loops_run() {
    let host = Host::claim();
    let manager = ServiceManager::new();
    let _agent = manager.start(&host, &host.config("a", ""), Some("1000000"));
    assert_eq!(manager.receive(), one("READY"));
    for _ in 0..3 {
        assert_eq!(manager.receive_field("WATCHDOG"), one("WATCHDOG"));
    }
}

#[test]
fn watchdog_is_not_notified_unless_requested() {
    let host = Host::claim();
    let manager = ServiceManager::new();
    let mut agent = manager.start(&host, &host.config("a", ""), None);
    assert_eq!(manager.receive(), one("READY"));
    manager.receive_field("STATUS");
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());
    manager.socket.set_nonblocking(true).unwrap();
    let mut received = Vec::new();
    let mut datagram = [0; 4_096];
    let end = loop {
        match manager.socket.recv(&mut datagram) {
            Ok(length) => received.extend_from_slice(&datagram[..length]),
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(end, ErrorKind::WouldBlock);
    assert!(!String::from_utf8(received).unwrap().contains("WATCHDOG"));
}

const PORT_MISMATCH: &str =
    "the HTTP sockets from the service manager differ from listen.http; using those of the service manager";

/// The HTTP address if the manager passes this listener.
fn service_address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().unwrap()
}

/// The log of an agent that refuses these sockets and exits.
fn log_of_refusal(host: &Host, sockets: &[BorrowedFd]) -> String {
    // Nothing listens at this address.
    Agent::try_start_on(sockets, &host.config("a", ""), host.service_address())
        .expect_err("the agent must refuse these sockets")
}

#[test]
fn passed_socket_outlives_the_agent() {
    let host = Host::claim();
    let listener = TcpListener::bind(host.service_address()).unwrap();
    let start = || {
        Agent::try_start_on(&[listener.as_fd()], &host.config("a", ""), service_address(&listener)).unwrap()
    };
    let mut agent = start();
    let log = agent.log();
    assert!(
        log.contains("using the HTTP sockets from the service manager") && !log.contains(PORT_MISMATCH),
        "{log}"
    );
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());

    // Requests between the two agents are answered by the second.
    let mut waiting = TcpStream::connect(service_address(&listener)).unwrap();
    waiting.set_read_timeout(Some(DEADLINE)).unwrap();
    waiting.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let _agent = start();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 OK\r\n") && answer.contains("\npathmeter_build_info"), "{answer}");
}

#[test]
fn all_passed_sockets_are_served() {
    let (a, b) = (Host::claim(), Host::claim());
    let sockets = [&a, &b].map(|host| TcpListener::bind(host.service_address()).unwrap());
    let passed = sockets.each_ref().map(AsFd::as_fd);
    let config = a.config("a", "").replacen(&a.service_address().to_string(), "0.0.0.0:9862", 1);
    let agent = Agent::try_start_on(&passed, &config, a.service_address()).unwrap();
    for host in [&a, &b] {
        assert_eq!(get(host.service_address(), "/metrics").unwrap().status, 200, "{}", agent.log());
    }
    assert!(!agent.log().contains(PORT_MISMATCH), "{}", agent.log());
}

#[test]
fn passed_port_that_differs_from_the_configuration_is_served_and_logged() {
    let host = Host::claim();
    let listener = TcpListener::bind(host.at(0)).unwrap();
    let agent =
        Agent::try_start_on(&[listener.as_fd()], &host.config("a", ""), service_address(&listener)).unwrap();
    assert_eq!(agent.json("/api/v1/agent")["ports"]["http"], service_address(&listener).port());
    assert!(agent.log().contains(PORT_MISMATCH), "{}", agent.log());
}

#[test]
fn ipv4_client_of_an_ipv6_socket_is_shown_with_its_ipv4_address() {
    let host = Host::claim();
    let Ok(listener) = TcpListener::bind("[::]:0") else { return skipped("this host has no IPv6") };
    let http = SocketAddr::from((Ipv4Addr::LOCALHOST, service_address(&listener).port()));
    // The kernel's name for the client, an IPv4-mapped address, must not be shown.
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
fn passed_descriptor_that_is_not_a_listening_tcp_socket_is_refused() {
    let host = Host::claim();
    let udp = host.socket(0);
    let connected = {
        let listener = TcpListener::bind(host.at(0)).unwrap();
        TcpStream::connect(service_address(&listener)).unwrap()
    };
    let file = tempfile::tempfile().unwrap();
    let listener = TcpListener::bind(host.at(0)).unwrap();
    for (sockets, number) in [
        (&[udp.as_fd()][..], 1),
        (&[connected.as_fd()], 1),
        (&[file.as_fd()], 1),
        (&[listener.as_fd(), udp.as_fd()], 2),
    ] {
        let log = log_of_refusal(&host, sockets);
        let sentence = format!("error: socket {number} of LISTEN_FDS is not a listening TCP socket");
        assert!(log.contains(&sentence), "{log}");
    }
}

#[test]
fn passed_sockets_of_different_ports_are_refused() {
    let host = Host::claim();
    let sockets = [(); 2].map(|()| TcpListener::bind(host.at(0)).unwrap());
    let log = log_of_refusal(&host, &sockets.each_ref().map(AsFd::as_fd));
    let [first, other] = sockets.each_ref().map(service_address);
    let sentence = format!("error: sockets of LISTEN_FDS have different ports, {first} and {other}");
    assert!(log.contains(&sentence), "{log}");
}

fn monotonic_usec() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec()).unwrap() / 1_000
}
