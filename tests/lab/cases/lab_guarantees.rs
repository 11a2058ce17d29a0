//! Tests of the lab's own guarantees.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::unistd::geteuid;
use pathmeter_lab::scenario::Scenario;
use pathmeter_lab::{NetPlan, Program, eventually};
use tempfile::TempDir;

use crate::testbed::run;
use crate::{REQUIRED, SKIPPED, is_set};

/// If set to a folder, this program is the child process of [`nothing_outlives_a_crash`].
pub(crate) const CRASH_CHILD: &str = "PATHMETER_LAB_VICTIM";

const SHORT: &str = "about: A short one.
topology: pair
probe: {interval: 5ms, late_after: 500ms, lost_after: 5s}
phases:
  - datagrams: 400
    wires: {a-b: {forward: {delay: 2ms, loss: 5%}, reverse: {delay: 2ms}}}
expect: {lost_forward: 4..50}";

/// Two labs run in one process with the same addresses.
pub(crate) fn two_labs_at_once() {
    let scenario = Scenario::parse(SHORT).unwrap();
    thread::scope(|scope| {
        let play = || run(&scenario).unwrap();
        scope.spawn(play);
        scope.spawn(play);
    });
}

/// Typical scenarios run as user nobody, who is root only in a user namespace.
pub(crate) fn unprivileged() {
    let labs = ["chain", "corruption_undetected", "stopped_responder"]
        .map(|scenario| (scenario, start_unprivileged(scenario)));
    for (scenario, lab) in labs {
        let output = lab.wait_with_output().unwrap();
        if output.status.code() == Some(SKIPPED.into()) && !is_set(REQUIRED) {
            eprintln!("skipped: {}", String::from_utf8_lossy(&output.stderr));
            return;
        }
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{scenario}: {stdout}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(stdout.contains("1 passed"), "{scenario}: {stdout}");
    }
}

/// Starts one scenario in a process without privileges.
fn start_unprivileged(scenario: &str) -> Child {
    const NOBODY: u32 = 65_534;
    let executable = std::env::current_exe().unwrap();
    let lab = |is_nobody: bool| {
        let mut command = Command::new(&executable);
        command.args(["--exact", scenario]).env("PATHMETER_LAB_NAMESPACE", "user").env(REQUIRED, "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if is_nobody {
            command.uid(NOBODY).gid(NOBODY).env("TMPDIR", "/tmp").current_dir("/");
        }
        command.spawn()
    };
    match lab(geteuid().is_root()) {
        // If the user nobody cannot execute the binary, for example in a private home directory, run it as
        // this user in a user namespace.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => lab(false).unwrap(),
        spawned => spawned.unwrap(),
    }
}

/// A killed lab leaves no program and no namespace.
pub(crate) fn nothing_outlives_a_crash() {
    let dir = TempDir::new().unwrap();
    let executable = std::env::current_exe().unwrap();
    let mut command = Command::new(executable);
    command.env(CRASH_CHILD, dir.path()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child_process = command.spawn().unwrap();
    let mut lines = BufReader::new(child_process.stdout.take().expect("it is piped"));
    let mut program = String::new();
    lines.read_line(&mut program).unwrap();
    let program: u32 = program.trim().parse().unwrap();
    let namespaces = held_by(child_process.id());
    assert_eq!(namespaces.len(), 3, "those of two hosts, and of the wire between them");
    child_process.kill().unwrap();
    child_process.wait().unwrap();
    eventually("its program is gone", || {
        // A zombie is a program that has ended.
        let status = fs::read_to_string(format!("/proc/{program}/status")).unwrap_or_default();
        (status.is_empty() || status.contains("State:\tZ")).then_some(())
    });
    eventually("its namespaces are gone", || in_use().is_disjoint(&namespaces).then_some(()));
    // The end of its standard output shows that none of its programs runs.
    lines.read_to_string(&mut String::new()).unwrap();
}

/// Builds a lab, prints the process ID of a program in it, and waits to be killed.
pub(crate) fn run_crash_child(dir: &Path) -> ! {
    let net = NetPlan::pair().build(1);
    let mut command = net.node("a").command("sleep");
    let program = Program::start(command.arg("600"), &dir.join("log"));
    #[expect(clippy::print_stdout, reason = "the parent process reads it")]
    {
        println!("{}", program.id());
    }
    loop {
        thread::park();
    }
}

/// The network namespaces that a process holds open.
fn held_by(process: u32) -> BTreeSet<u64> {
    let descriptors =
        fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().filter_map(Result::ok);
    descriptors.filter_map(|descriptor| number(&fs::read_link(descriptor.path()).ok()?)).collect()
}

/// The network namespaces that any process uses or holds open.
fn in_use() -> BTreeSet<u64> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of = |process: u32| {
        let own = fs::read_link(format!("/proc/{process}/ns/net")).ok().and_then(|link| number(&link));
        held_by(process).into_iter().chain(own)
    };
    processes.flat_map(of).collect()
}

/// The number in `net:[4026531840]`.
fn number(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}
