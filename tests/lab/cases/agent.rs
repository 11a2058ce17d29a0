//! An agent on a node of a test network.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use pathmeter_lab::{CONFIG, Namespace, request};
use serde_json::Value;
use tempfile::TempDir;

/// An agent whose HTTP API is requested from within its node.
#[derive(Debug)]
pub(crate) struct NodeAgent<'a>(pathmeter_lab::AgentProcess<'a>);

/// HTTP address, on the node's loopback interface: these requests do not cross a wire.
const HTTP_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_862);

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_pathmeter");

/// The key of all agents with authentication.
const KEY: &str = "a key for the lab: 0123456789abcdef";

/// A command on a node that has this file as `/etc/resolv.conf`. The program follows as first argument.
pub(crate) fn resolving(node: &Namespace, resolver: &Path) -> Command {
    let mut command = node.command("unshare");
    let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script]).arg(resolver);
    command
}

impl<'a> NodeAgent<'a> {
    /// Starts an agent with a configuration and environment variables, and waits until it is ready.
    pub(crate) fn start(node: &'a Namespace, config: Value, environment: &[(&str, &str)]) -> Self {
        Self::launch(node, config, node.command(PROGRAM), environment).when_ready()
    }

    /// [`Self::start`] without any capability.
    pub(crate) fn start_without_capabilities(node: &'a Namespace, config: Value) -> Self {
        let mut command = node.command("setpriv");
        command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]).arg(PROGRAM);
        Self::launch(node, config, command, &[]).when_ready()
    }

    /// [`Self::start`] with this file as `/etc/resolv.conf`.
    pub(crate) fn start_resolving(node: &'a Namespace, config: Value, resolver: &Path) -> Self {
        let mut command = resolving(node, resolver);
        command.arg(PROGRAM);
        Self::launch(node, config, command, &[]).when_ready()
    }

    /// Starts an agent with a configuration and does not wait until it is ready, because its port may serve
    /// HTTPS.
    pub(crate) fn spawn(node: &'a Namespace, config: Value) -> Self {
        Self::launch(node, config, node.command(PROGRAM), &[])
    }

    fn launch(node: &'a Namespace, config: Value, command: Command, environment: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        write(folder.path(), config);
        let send_request =
            move |method: &str, path: &str| node.within(|| request(method, HTTP_ADDRESS, path));
        Self(pathmeter_lab::AgentProcess::start(command, environment, folder, Box::new(send_request)))
    }

    fn when_ready(self) -> Self {
        Self(self.0.when_ready().unwrap_or_else(|log| panic!("the agent exited:\n{log}")))
    }

    /// Writes another configuration and sends SIGHUP.
    pub(crate) fn configure(&self, config: Value) {
        write(self.config_file().parent().expect("a file is in a folder"), config);
        self.signal(Signal::SIGHUP);
    }
}

impl<'a> Deref for NodeAgent<'a> {
    type Target = pathmeter_lab::AgentProcess<'a>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// Writes a configuration, and the key file that it names, to a folder.
fn write(folder: &Path, mut config: Value) {
    if config.get("key_file").is_some() {
        let key = folder.join("key");
        fs::write(&key, KEY).unwrap();
        config["key_file"] = key.to_str().unwrap().into();
    }
    fs::write(folder.join(CONFIG), config.to_string()).unwrap();
}
