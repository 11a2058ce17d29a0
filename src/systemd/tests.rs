use super::*;
use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;

use super::sender::{Sender, watchdog_timeout};

/// A service manager's end of the protocol.
struct Manager {
    socket: UnixDatagram,
    address: OsString,
    _directory: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket, address: path.into(), _directory: directory }
    }

    fn message(&self) -> String {
        let mut buffer = [0; 2048];
        let length = self.socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    /// Returns the messages of a child process. The child is this test binary, running only
    /// `child_process_sends_all_notifications`: the environment belongs to the whole process, so a test
    /// cannot change its own.
    fn messages_of_child(&self, environment: &[(&str, &str)]) -> Vec<String> {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "systemd::tests::child_process_sends_all_notifications", "--nocapture"])
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            .env(CHILD_VARIABLE, "1")
            .env("NOTIFY_SOCKET", &self.address)
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        (0..MESSAGE_COUNT).map(|_| self.message()).collect()
    }
}

const CHILD_VARIABLE: &str = "PATHMETER_TEST_NOTIFIES";
/// Number of messages of the child. Below the default queue length of a datagram socket, 10: they are read
/// after the child has ended.
const MESSAGE_COUNT: usize = 7;

/// Runs in the child process of the tests below and sends every kind of notification; otherwise it does
/// nothing.
#[test]
fn child_process_sends_all_notifications() {
    if std::env::var_os(CHILD_VARIABLE).is_none() {
        return;
    }
    let notifier = Notifier::from_environment();
    notifier.ready();
    notifier.reloading(1_234_567);
    notifier.stopping();
    notifier.status("measuring 12 paths\nREADY=1\0\u{1b}[31m");
    notifier.status(&"ä".repeat(1000));
    notifier.watchdog();
    notifier.status(&format!("{:?}", notifier.watchdog_interval()));
}

#[test]
fn manager_receives_every_message_on_its_own_lines() {
    let messages = Manager::new().messages_of_child(&[("WATCHDOG_USEC", "3000000")]);
    let long = format!("STATUS={}", "ä".repeat(STATUS_BYTES_MAX / 2));
    assert_eq!(
        messages,
        [
            "READY=1",
            "RELOADING=1\nMONOTONIC_USEC=1234567",
            "STOPPING=1",
            "STATUS=measuring 12 pathsREADY=1[31m",
            &long,
            "WATCHDOG=1",
            "STATUS=Some(1.5s)",
        ]
    );
}

#[test]
fn watchdog_of_another_process_is_ignored() {
    let messages = Manager::new().messages_of_child(&[("WATCHDOG_USEC", "3000000"), ("WATCHDOG_PID", "1")]);
    assert_eq!(messages.last().unwrap(), "STATUS=None");
    assert_eq!(Manager::new().messages_of_child(&[]).last().unwrap(), "STATUS=None");
}

#[test]
fn watchdog_applies_to_our_pid_or_without_a_pid() {
    let timeout = |usec: &str, pid: Option<&str>| watchdog_timeout(Some(usec.into()), pid.map(Into::into), 7);
    assert_eq!(timeout("3000000", Some("7")), Some(Duration::from_secs(3)));
    assert_eq!(timeout("3000000", None), Some(Duration::from_secs(3)));
    assert_eq!(timeout("3000000", Some("8")), None);
    assert_eq!(timeout("0", None), None);
    assert_eq!(timeout("soon", None), None);
    assert_eq!(watchdog_timeout(None, None, 7), None);
}

#[test]
fn own_sender_reaches_a_path() {
    let manager = Manager::new();
    let sender = Sender::new(manager.address.clone(), Some(Duration::from_secs(3)));
    sender.send(&[("RELOADING", "1"), ("MONOTONIC_USEC", "5")]).unwrap();
    assert_eq!(manager.message(), "RELOADING=1\nMONOTONIC_USEC=5");
    assert_eq!(sender.watchdog_timeout(), Some(Duration::from_secs(3)));
}

#[test]
fn own_sender_reaches_an_abstract_name() {
    let name = format!("pathmeter-test-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    Sender::new(format!("@{name}").into(), None).send(&[("READY", "1")]).unwrap();
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"READY=1");
}

#[test]
fn missing_manager_is_an_error_and_not_a_hang() {
    let manager = Manager::new();
    let sender = Sender::new(manager.address.clone(), None);
    drop(manager);
    assert_eq!(sender.send(&[("READY", "1")]).unwrap_err().kind(), io::ErrorKind::NotFound);
}
