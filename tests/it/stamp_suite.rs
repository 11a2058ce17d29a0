//! Interoperability with stamp-suite, another implementation of STAMP.
//! `scripts/install-test-peers.sh` installs it. Without it, in `$PATHMETER_STAMP_SUITE` or on the path, these
//! tests are skipped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Agent, CommandOutput, Host, eventually, run, skipped};

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const OTHER_KEY: &str = "101112131415161718191a1b1c1d1e1f000102030405060708090a0b0c0d0e0f";
const PORT: u16 = 18_620;

/// The program, if it is installed.
fn stamp_suite() -> Option<Command> {
    let program = std::env::var_os("PATHMETER_STAMP_SUITE").unwrap_or_else(|| OsString::from("stamp-suite"));
    let mut command = Command::new(&program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !command.status().is_ok_and(|status| status.success()) {
        skipped("stamp-suite is neither in PATHMETER_STAMP_SUITE nor on PATH");
        return None;
    }
    let mut command = Command::new(program);
    command.env_remove("STAMP_HMAC_KEY").env_remove("RUST_LOG");
    Some(command)
}

/// What stamp-suite reports after ten requests to our responder.
fn measure_with_stamp_suite(mut command: Command, host: &Host, arguments: &[&str]) -> Value {
    command.args(["-r", &host.to_string(), "-p", &Host::PORT.to_string(), "-c", "10", "-d", "20", "-L", "5"]);
    let output = CommandOutput::of(command.args(["--output-format", "json"]).args(arguments));
    assert_eq!(output.code, Some(0), "{output}");
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"))
}

/// Asserts that stamp-suite got ten replies, with clean flags on every extension that it sent, by type.
fn assert_understood(found: &Value, extensions: &[&str]) {
    assert_eq!(found["packets_sent"], 10, "{found}");
    assert_eq!(found["packets_received"], 10, "{found}");
    let measured = &found["measurements"];
    for count in ["duplicate_replies", "late_replies", "unknown_replies", "reordered_replies"] {
        assert_eq!(measured[count], 0, "{count}: {found}");
    }
    // Our own sequence numbers, not a copy of the sender's: the reflector is stateful.
    assert_eq!(measured["last_reflector_sequence"], 9, "{found}");
    let clean = json!({"unrecognized": 0, "malformed": 0, "integrity_failed": 0, "conformant_reflected": 0});
    let kinds = &measured["tlv_validation"]["by_type"];
    assert_eq!(kinds.as_object().unwrap().len(), extensions.len(), "{found}");
    for kind in extensions {
        assert_eq!(kinds[kind], json!({"observed": 10, "flags": clean}), "type {kind}: {found}");
    }
}

#[test]
fn stamp_suite_sender_accepts_our_responder() {
    let Some(command) = stamp_suite() else { return };
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let found = measure_with_stamp_suite(command, &host, &[]);
    assert_understood(&found, &[]);
    let extensions = ["--cos", "--dscp", "46", "--follow-up-telemetry", "--extra-padding", "8"];
    let found = measure_with_stamp_suite(stamp_suite().unwrap(), &host, &extensions);
    assert_understood(&found, &["1", "4", "7"]);
    assert!(found["measurements"]["follow_up"]["matched"].as_u64() >= Some(1), "{found}");
}

#[test]
fn stamp_suite_sender_and_our_responder_authenticate_each_other() {
    let Some(command) = stamp_suite() else { return };
    let host = Host::claim();
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("key");
    fs::write(&file, KEY).unwrap();
    let agent = Agent::start(&host, &host.config("b", &format!("key_file: {}", file.display())));
    let found =
        measure_with_stamp_suite(command, &host, &["-A", "A", "--hmac-key", KEY, "--cos", "--dscp", "46"]);
    assert_understood(&found, &["4", "8"]);
    assert_eq!(found["measurements"]["tlv_validation"]["hmac"]["verified"], 10, "{found}");

    let mut command = stamp_suite().unwrap();
    command.args(["-L", "1"]);
    let before = agent.page().count("pathmeter_responder_replies_total", &[]);
    let output =
        CommandOutput::of(
            command
                .args(["-r", &host.to_string(), "-p", &Host::PORT.to_string(), "-c", "3", "-d", "20"])
                .args(["--output-format", "json", "-A", "A", "--hmac-key", OTHER_KEY]),
        );
    let found: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(found["packets_received"], 0, "{found}");
    let page = agent.page();
    assert_eq!(page.count("pathmeter_responder_replies_total", &[]), before, "{page}");
    assert_eq!(page.count("pathmeter_responder_rejected_total", &[r#"reason="auth""#]), 3, "{page}");
}

/// The reflector of stamp-suite. Killed when dropped.
struct Reflector {
    child: Child,
    host: Host,
    dir: TempDir,
}

impl Reflector {
    fn start(mut command: Command, arguments: &[&str]) -> Self {
        let (host, dir) = (Host::claim(), TempDir::new().unwrap());
        let log = dir.path().join("log");
        command.args(["-i", "-S", &host.to_string(), "-o", &PORT.to_string()]).args(arguments);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn();
        let reflector = Self { child: child.unwrap(), host, dir };
        eventually("the reflector listens", || {
            fs::read_to_string(&log).unwrap().contains("listening on").then_some(())
        });
        reflector
    }

    /// What our prober reports about this reflector.
    fn measure_with_pathmeter(&self, arguments: &[&str]) -> Value {
        let (host, port) = (self.host.to_string(), PORT.to_string());
        let arguments_before = ["probe", "echo", &host, "--port", &port, "-c", "20", "-i", "20ms", "--json"];
        let output = run(&[&arguments_before, arguments].concat());
        assert_eq!(output.code, Some(0), "{output}");
        serde_json::from_str(&output.stdout).unwrap()
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn assert_all_answered(found: &Value) {
    assert!(found["sent"].as_u64() > Some(0) && found["sent"] == found["received"], "{found}");
    for count in ["late", "duplicates", "reordered", "send_errors", "host_dropped", "withdrawn"] {
        assert_eq!(found[count], 0, "{count}: {found}");
    }
    assert_eq!(found["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{found}");
    assert_eq!(found["timestamps"], json!({"transmit": "kernel", "receive": "kernel"}), "{found}");
}

#[test]
fn our_prober_accepts_stamp_suite_reflector() {
    for mode in [&[][..], &["--stateful-reflector"], &["--strict-packets"], &["--tlv-mode", "ignore"]] {
        let Some(command) = stamp_suite() else { return };
        let reflector = Reflector::start(command, mode);
        for arguments in [&[][..], &["--dscp", "ef", "--size", "300B", "--flows", "3"]] {
            assert_all_answered(&reflector.measure_with_pathmeter(arguments));
        }
    }
}

#[test]
fn our_prober_and_stamp_suite_reflector_authenticate_each_other() {
    let Some(command) = stamp_suite() else { return };
    let reflector = Reflector::start(command, &["-A", "A", "--hmac-key", KEY]);
    let file = reflector.dir.path().join("key");
    fs::write(&file, KEY).unwrap();
    let file = file.to_str().unwrap();
    for arguments in [&["--key-file", file][..], &["--key-file", file, "--dscp", "ef", "--size", "300B"]] {
        assert_all_answered(&reflector.measure_with_pathmeter(arguments));
    }
}
