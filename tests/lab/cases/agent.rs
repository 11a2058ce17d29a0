//! An agent on a node of a network.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pathmeter_lab::{DEADLINE, Namespace, Page, Program, Response, eventually, get};
use serde_json::Value;
use tempfile::TempDir;

/// An agent, with a folder of its own.
#[derive(Debug)]
pub(crate) struct Agent<'a> {
    node: &'a Namespace,
    program: Program,
    dir: TempDir,
}

/// Where it serves HTTP, on its node's own loopback interface: what it says does not pass a wire.
const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_862);

const PROGRAM: &str = env!("CARGO_BIN_EXE_pathmeter");

const CONFIG: &str = "config.yaml";

/// The key of all agents that have one.
const KEY: &str = "a key for the lab: 0123456789abcdef";

impl<'a> Agent<'a> {
    /// Starts with a configuration, and environment variables, and waits until it is ready.
    pub(crate) fn start(node: &'a Namespace, config: Value, environment: &[(&str, &str)]) -> Self {
        let mut command = node.command(PROGRAM);
        command.envs(environment.iter().copied());
        Self::launch(node, config, command)
    }

    /// The same, with a resolver configuration of its own.
    pub(crate) fn start_resolving(node: &'a Namespace, config: Value, resolver: &Path) -> Self {
        let mut command = node.command("unshare");
        let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script]).arg(resolver).arg(PROGRAM);
        Self::launch(node, config, command)
    }

    /// Starts with a configuration, and does not wait until it is ready: whether it serves HTTPS, it alone knows.
    pub(crate) fn spawn(node: &'a Namespace, config: Value) -> Self {
        Self::execute(node, config, node.command(PROGRAM))
    }

    fn launch(node: &'a Namespace, config: Value, command: Command) -> Self {
        let mut agent = Self::execute(node, config, command);
        let program = &mut agent.program;
        eventually("an agent is ready", || {
            assert!(program.has_ended().is_none(), "an agent ended:\n{}", program.output());
            let answer = node.within(|| get(FRONT, "/-/ready"));
            answer.ok().filter(|answer| answer.status == 200)
        });
        agent
    }

    fn execute(node: &'a Namespace, config: Value, mut command: Command) -> Self {
        let dir = TempDir::new().unwrap();
        let file = write(dir.path(), config);
        command.args(["run", "--config"]).arg(&file);
        for variable in ["PATHMETER_NAME", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"] {
            command.env_remove(variable);
        }
        let program = Program::start(&mut command, &dir.path().join("log"));
        Self { node, program, dir }
    }

    /// One of its pages.
    pub(crate) fn get(&self, path: &str) -> Response {
        let answer = self.node.within(|| get(FRONT, path));
        answer.unwrap_or_else(|error| panic!("{path}: {error}\n{}", self.log()))
    }

    /// Its metrics.
    pub(crate) fn page(&self) -> Page {
        Page::parse(&self.get("/metrics").body)
    }

    /// Its metrics, once they say that something is so.
    pub(crate) fn page_when(&self, what: &str, is_so: impl Fn(&Page) -> bool) -> Page {
        self.page_within(DEADLINE, what, is_so)
    }

    /// The same, with more patience.
    pub(crate) fn page_within(&self, patience: Duration, what: &str, is_so: impl Fn(&Page) -> bool) -> Page {
        let start = Instant::now();
        loop {
            let page = self.page();
            if is_so(&page) {
                return page;
            }
            assert!(start.elapsed() < patience, "waited in vain: {what}\n{page}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Gives it another configuration and asks it to take that.
    pub(crate) fn configure(&self, config: Value) {
        write(self.dir.path(), config);
        self.signal(Signal::SIGHUP);
    }

    /// Everything that it logged so far.
    pub(crate) fn log(&self) -> String {
        self.program.output()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.program.signal(signal);
    }
}

/// Writes a configuration, and the key that it asks for, to a folder. Where it is.
fn write(folder: &Path, mut config: Value) -> PathBuf {
    if config.get("key_file").is_some() {
        let key = folder.join("key");
        fs::write(&key, KEY).unwrap();
        config["key_file"] = key.to_str().unwrap().into();
    }
    let file = folder.join(CONFIG);
    fs::write(&file, config.to_string()).unwrap();
    file
}
