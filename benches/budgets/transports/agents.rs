//! A prober and a responder, configured for one transport.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;

use pathmeter_proto::wire::websocket::MessageFormat;
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

use super::super::agent::{AgentNamespace, AgentPorts, BenchAgent, target};
use super::{CaseTransport, TransportCase};

/// Name in the responder's certificate.
pub(super) const NAME: &str = "bench";

/// File names.
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";
const WEB: &str = "web.yml";

/// How often the prober sends.
pub(super) enum ProberMode {
    /// Each path sends at its interval.
    Probe,
    /// Each path is connected and sends once an hour.
    Idle,
}

/// Ports and certificate of a responder.
pub(super) struct TransportSetup<'a> {
    load: &'a TransportCase,
    pub(super) namespace: AgentNamespace,
    /// Ports of the responder.
    pub(super) ports: AgentPorts,
    /// Folder of the certificate.
    folder: TempDir,
}

impl<'a> TransportSetup<'a> {
    pub(super) fn new(load: &'a TransportCase, namespace: &AgentNamespace) -> io::Result<Self> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let params = CertificateParams::new(vec![NAME.to_owned()]).map_err(io::Error::other)?;
        let certificate = params.self_signed(&key).map_err(io::Error::other)?.pem();
        let web = format!("tls_server_config: {{cert_file: {CERTIFICATE}, key_file: {KEY}}}\n");
        let folder = tempfile::tempdir()?;
        for (name, text) in [(CERTIFICATE, certificate), (KEY, key.serialize_pem()), (WEB, web)] {
            fs::write(folder.path().join(name), text)?;
        }
        Ok(Self { load, namespace: namespace.clone(), ports: AgentPorts::free(namespace)?, folder })
    }

    pub(super) fn is_secure(&self) -> bool {
        match self.load.transport {
            CaseTransport::Udp | CaseTransport::Icmp(_) | CaseTransport::Tcp => false,
            CaseTransport::WebSocket { is_secure, .. } | CaseTransport::Http { is_secure } => is_secure,
        }
    }

    /// The certificate that the prober trusts.
    pub(super) fn certificate(&self) -> PathBuf {
        self.folder.path().join(CERTIFICATE)
    }

    /// Starts the responder on every address.
    pub(super) fn responder(&self) -> io::Result<BenchAgent> {
        let mut text = basics("0.0.0.0", &self.ports);
        if self.is_secure() {
            let _ = writeln!(text, "tls: {{web_config_file: {}}}", self.folder.path().join(WEB).display());
        }
        let agent = BenchAgent::launch(&self.namespace, self.ports, &text)?;
        agent.wait_for(|| agent.connect())?;
        Ok(agent)
    }

    /// Starts the prober.
    pub(super) fn prober(&self, mode: &ProberMode) -> io::Result<BenchAgent> {
        let ports = AgentPorts::free(&self.namespace)?;
        let text = basics("127.0.0.1", &ports) + &self.probe(mode) + &self.hosts();
        let agent = BenchAgent::launch(&self.namespace, ports, &text)?;
        agent.wait_for(|| agent.scrape())?;
        Ok(agent)
    }

    fn probe(&self, mode: &ProberMode) -> String {
        let interval = match mode {
            ProberMode::Probe => format!("{}ms", self.load.interval.as_millis()),
            ProberMode::Idle => "1h".to_owned(),
        };
        let rest = match self.load.transport {
            CaseTransport::Udp => "udp, peers: all",
            CaseTransport::Icmp(_) => "icmp, targets: all",
            CaseTransport::Tcp => "tcp, connect_interval: \"off\", peers: all",
            CaseTransport::WebSocket { format: MessageFormat::Text, .. } => {
                "websocket, format: text, connect_interval: \"off\", peers: all"
            }
            CaseTransport::WebSocket { format: MessageFormat::Binary, .. } => {
                "websocket, format: binary, connect_interval: \"off\", peers: all"
            }
            CaseTransport::Http { .. } => "http, connect_interval: \"off\", peers: all",
        };
        format!("probes: [{{name: echo, interval: {interval}, protocol: {rest}}}]\n")
    }

    /// All hosts are addresses of the responder; ICMP is answered by the kernel.
    fn hosts(&self) -> String {
        let AgentPorts { http, stamp, agent } = self.ports;
        let (kind, mut rest) = match self.load.transport {
            CaseTransport::Icmp(_) => ("targets", String::new()),
            CaseTransport::Udp
            | CaseTransport::Tcp
            | CaseTransport::WebSocket { .. }
            | CaseTransport::Http { .. } => {
                ("peers", format!(", http_port: {http}, stamp_port: {stamp}, agent_port: {agent}"))
            }
        };
        if self.is_secure() {
            let ca = self.certificate();
            let _ = write!(rest, ", scheme: https, tls: {{ca_file: {}, server_name: {NAME}}}", ca.display());
        }
        let mut text = format!("{kind}:\n");
        for n in 0..self.load.paths {
            let _ = writeln!(text, "  - {{name: host-{n}, address: {}{rest}}}", target(n));
        }
        text
    }
}

fn basics(address: &str, ports: &AgentPorts) -> String {
    let AgentPorts { http, stamp, agent } = ports;
    format!(
        "agent: {{name: bench-{http}}}\n\
         listen: {{http: \"{address}:{http}\", stamp: \"{address}:{stamp}\", agent: \"{address}:{agent}\"}}\n\
         responder: {{allow: [127.0.0.0/8]}}\n\
         log: {{level: \"off\"}}\n"
    )
}
