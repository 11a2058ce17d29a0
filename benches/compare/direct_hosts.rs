//! Hosts without a wire of the lab between them, which would limit throughput.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use pathmeter_lab::{Namespace, Program, eventually};
use tempfile::TempDir;

/// The host of the clients and that of the servers, which may be one.
pub(crate) struct DirectHosts {
    /// What is between them.
    pub(crate) link: &'static str,
    server_host: Namespace,
    /// `None`: the host of the servers.
    client_host: Option<Namespace>,
    /// The address of the servers.
    pub(crate) target: IpAddr,
    files: TempDir,
}

impl DirectHosts {
    /// One host, whose programs use its loopback interface.
    pub(crate) fn loopback() -> io::Result<Self> {
        Ok(Self {
            link: "loopback",
            server_host: Namespace::new("b"),
            client_host: None,
            target: Ipv4Addr::LOCALHOST.into(),
            files: TempDir::new()?,
        })
    }

    /// Two hosts, joined by a veth pair as the kernel makes it: MTU 1500, with segmentation offload.
    pub(crate) fn veth_pair() -> io::Result<Self> {
        let (client_host, server_host) = (Namespace::new("a"), Namespace::new("b"));
        let target = Ipv4Addr::new(10, 77, 0, 2);
        client_host.ip(&format!(
            "link add e0 type veth peer name e0 netns {}\n\
             addr add 10.77.0.1/24 dev e0\n\
             link set e0 up\n",
            server_host.path()
        ));
        server_host.ip(&format!("addr add {target}/24 dev e0\nlink set e0 up\n"));
        Ok(Self {
            link: "veth pair",
            server_host,
            client_host: Some(client_host),
            target: target.into(),
            files: TempDir::new()?,
        })
    }

    /// The namespace of the servers.
    pub(crate) fn server_host(&self) -> &Namespace {
        &self.server_host
    }

    fn client_host(&self) -> &Namespace {
        self.client_host.as_ref().unwrap_or(&self.server_host)
    }

    /// The congestion control of connections that do not choose one.
    pub(crate) fn congestion_control(&self) -> io::Result<String> {
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        Ok(self.client_host().within(read)?.trim().to_owned())
    }

    /// Path of a file.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Starts a server.
    pub(crate) fn start_server(&self, program: &str, arguments: &[&str]) -> Program {
        let name = program.rsplit('/').next().unwrap_or(program);
        let mut command = self.server_host.command(program);
        Program::start(command.args(arguments), &self.file(&format!("{name}-server")))
    }

    /// Waits until a TCP port is open on the host of the servers.
    pub(crate) fn wait_for_tcp(&self, port: u16) {
        let sockets = || {
            let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
            read("/proc/thread-self/net/tcp") + &read("/proc/thread-self/net/tcp6")
        };
        // Local address, remote address, state; 0A: listening.
        let (local, listening) = (format!(":{port:04X}"), "0A");
        let is_open = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(1).is_some_and(|address| address.ends_with(&local))
                && fields.get(3) == Some(&listening)
        };
        eventually("a server listens", || {
            self.server_host.within(sockets).lines().any(is_open).then_some(())
        });
    }

    /// Starts a client.
    pub(crate) fn start_client(&self, program: &str, arguments: &[String]) -> Program {
        let mut command = self.client_host().command(program);
        Program::start(command.args(arguments), &self.file("client"))
    }
}
