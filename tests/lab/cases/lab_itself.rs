//! The lab keeps its own promises.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::thread;

use pathmeter_lab::script::Script;
use pathmeter_lab::{Plan, Program, eventually};
use tempfile::TempDir;

use crate::play::play;

/// Set, this program is the victim of [`nothing_outlives_a_crash`].
pub(crate) const VICTIM: &str = "PATHMETER_LAB_VICTIM";

const SHORT: &str = "about: A short one.
topology: pair
probe: {interval: 5ms, late_after: 200ms, lost_after: 500ms}
phases:
  - datagrams: 400
    wires: {a-b: {forward: {delay: 2ms, loss: 5%}, reverse: {delay: 2ms}}}
expect: {lost_forward: 4..50}";

/// Two labs in one process, with the same addresses in both.
pub(crate) fn two_at_a_time() {
    let script = Script::parse(SHORT).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| play(&script));
        scope.spawn(|| play(&script));
    });
}

/// As somebody without privileges, who is root in a user namespace: everything works the same.
pub(crate) fn unprivileged() {
    let myself = std::env::current_exe().unwrap();
    let mut command = Command::new(myself);
    command.args(["--exact", "random_loss"]);
    command.env("PATHMETER_LAB_NAMESPACE", "user").env("PATHMETER_LAB_REQUIRED", "1");
    let ended = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    let why = String::from_utf8_lossy(&ended.stderr);
    if why.contains("skipped") && why.contains("network namespaces") {
        eprintln!("skipped: {why}");
        return;
    }
    assert!(ended.status.success(), "{said}\n{why}");
}

/// A lab whose process is killed leaves no program and no namespace.
pub(crate) fn nothing_outlives_a_crash() {
    let myself = std::env::current_exe().unwrap();
    let mut child =
        Command::new(myself).env(VICTIM, "1").stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped"));
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap());
    let program = numbers.next().unwrap();
    let namespaces: BTreeSet<u64> = numbers.collect();
    assert_eq!(namespaces.len(), 2, "{line}");
    assert!(in_use().is_superset(&namespaces), "the victim's namespaces are there");
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("its program is gone", || {
        // What nobody has waited for yet is dead all the same.
        let status = fs::read_to_string(format!("/proc/{program}/status")).unwrap_or_default();
        (status.is_empty() || status.contains("State:\tZ")).then_some(())
    });
    eventually("its namespaces are gone", || in_use().is_disjoint(&namespaces).then_some(()));
    // Nobody else has the other end of its output, so nothing of it runs.
    lines.read_to_string(&mut line).unwrap();
}

/// Builds a lab, says what is in it, and waits to be killed.
pub(crate) fn be_a_victim() -> ! {
    let net = Plan::pair().build(1);
    let dir = TempDir::new().unwrap();
    let mut command = net.node("a").command("sleep");
    let program = Program::start(command.arg("600"), &dir.path().join("log"));
    let namespaces = ["a", "b"].map(|name| net.node(name).within(|| own_namespace("thread-self")).unwrap());
    let [first, second] = namespaces;
    #[expect(clippy::print_stdout, reason = "it is how the victim speaks")]
    {
        println!("{} {first} {second}", program.id());
    }
    loop {
        thread::park();
    }
}

/// Network namespaces of all processes, and those that a process holds open.
fn in_use() -> BTreeSet<u64> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let processes = entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    let mut found = BTreeSet::new();
    for process in processes {
        found.extend(own_namespace(&process.file_name().to_string_lossy()));
        let descriptors =
            fs::read_dir(process.path().join("fd")).into_iter().flatten().filter_map(Result::ok);
        let targets = descriptors.filter_map(|descriptor| {
            let target = fs::read_link(descriptor.path()).ok()?;
            target.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse::<u64>().ok()
        });
        found.extend(targets);
    }
    found
}

fn own_namespace(process: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{process}/ns/net")).ok().map(|namespace| namespace.ino())
}
