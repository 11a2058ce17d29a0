//! HTTPS for servers and clients: client certificates, trust, passwords, and certificate changes.

mod changes;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as PlainStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pathmeter::http::auth::Signer;
use pathmeter::http::client::{Client, TlsClient};
use pathmeter::tls::{Connector, KeyPair, Trust};
use pathmeter_lab::pki::{Authority, Issued, VALID_UNTIL, Validity};
use pathmeter_proto::key::{Key, Keys};
use tempfile::TempDir;

use crate::drift::undocumented;
use crate::fixture::{Agent, CommandOutput, DEADLINE, Host, request, run, skipped};

const ERRORS: &str = "pathmeter_http_tls_handshake_errors_total";
const EXPIRY: &str = "pathmeter_http_tls_certificate_expiry_timestamp_seconds";
const SUCCESSFUL: &str = "pathmeter_tls_files_last_reload_successful";

/// A folder with a CA and certificates that it signed.
struct TlsFiles {
    folder: TempDir,
    ca: Authority,
}

impl TlsFiles {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let ca = Authority::new("ours");
        ca.write(folder.path(), "ca");
        Self { folder, ca }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn issue(&self, file: &str, names: &[&str]) -> Issued {
        let issued = self.ca.issue(names, Validity::Current);
        issued.write(self.folder.path(), file);
        issued
    }

    /// A web config file with a certificate for `host`; `more` is further YAML of `tls_server_config`.
    fn web(&self, host: &Host, more: &str) -> PathBuf {
        self.issue("server", &[&host.to_string(), "fra-1"]);
        self.write(
            "web.yml",
            &format!("tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n{more}"),
        )
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.at(name), text).unwrap();
        self.at(name)
    }

    /// A client that trusts the CA and presents the certificate `identity`, if given.
    fn connector(&self, identity: Option<&str>) -> Connector {
        let identity = identity.map(|name| KeyPair {
            cert_file: self.at(&format!("{name}.pem")),
            key_file: self.at(&format!("{name}.key")),
        });
        Connector::new(&Trust { ca_file: Some(self.at("ca.pem")), identity }).unwrap()
    }

    fn client(&self, server_name: &str, identity: Option<&str>) -> Client {
        let secure = TlsClient { connector: self.connector(identity), server_name: server_name.to_owned() };
        Client { deadline: DEADLINE, answer_bytes_max: 1 << 24, secure: Some(secure), ..Client::default() }
    }

    /// An agent on `host` that serves HTTPS as `web.yml` configures.
    fn agent(&self, host: &Host, more: &str) -> Agent {
        let config = host
            .config("fra-1", &format!("tls: {{web_config_file: {}}}\n{more}", self.at("web.yml").display()));
        Agent::start_for(host, &config, self.client(&host.to_string(), None))
    }
}

/// Runs `pathmeter healthcheck` for `https://address`.
fn healthcheck(address: SocketAddr, arguments: &[&str]) -> CommandOutput {
    let address = format!("https://{address}");
    run(&[&["healthcheck", "--address", &address], arguments].concat())
}

/// Whether a tool is installed; prints a message if not.
fn is_installed(run_tool: &str) -> bool {
    let mut command = Command::new(run_tool);
    command.arg("version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let is_installed = command.status().is_ok();
    if !is_installed {
        skipped(&format!("{run_tool} is not on PATH"));
    }
    is_installed
}

/// Runs a tool; `None` if it is not installed.
fn run_tool(command: &mut Command) -> Option<CommandOutput> {
    is_installed(&command.get_program().to_string_lossy()).then(|| CommandOutput::of(command))
}

#[test]
fn metrics_are_served_over_https() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "http_server_config: {headers: {Strict-Transport-Security: max-age=60}}");
    let agent = files.agent(&host, "");
    let page = agent.page();
    assert_eq!(page.count(ERRORS, &[]), 0);
    assert_eq!(page.count(SUCCESSFUL, &[]), 1);
    assert!(page.text().contains(&format!("\n{EXPIRY} {VALID_UNTIL}\n")), "{page}");
    assert_eq!(undocumented(&page), Vec::<&str>::new());

    let url = format!("https://{}/metrics", host.service_address());
    let curl = |ca: &Path| {
        let mut curl = Command::new("curl");
        run_tool(curl.args(["-sS", "-i", "--max-time", "20", "--cacert"]).arg(ca).arg(&url))
    };
    let Some(output) = curl(&files.at("ca.pem")) else { return };
    assert!(output.stdout.starts_with("HTTP/1.1 200 OK\r\n"), "{output}");
    assert!(output.stdout.contains("\r\nstrict-transport-security: max-age=60\r\n"), "{output}");
    assert!(output.stdout.contains("\npathmeter_build_info{"), "{output}");
    let other = Authority::new("others").write(files.folder.path(), "others");
    assert_eq!(curl(&other).unwrap().code, Some(60), "a CA that did not sign");
}

#[test]
fn openssl_accepts_the_chain_and_tls_1_2_and_1_3() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "");
    let _agent = files.agent(&host, "");
    let openssl = |version: &str| {
        let mut openssl = Command::new("openssl");
        let address = host.service_address().to_string();
        openssl.args(["s_client", "-connect", &address, version, "-CAfile"]).arg(files.at("ca.pem"));
        run_tool(openssl.args(["-cipher", "DEFAULT@SECLEVEL=0", "-showcerts", "-verify_return_error"]))
    };
    for (version, name) in [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")] {
        let Some(output) = openssl(version) else { return };
        assert_eq!(output.code, Some(0), "{output}");
        assert!(output.stdout.contains("Verify return code: 0 (ok)"), "{output}");
        assert!(output.stdout.contains("-----BEGIN CERTIFICATE-----"), "{output}");
        assert!(output.stdout.contains(&format!("New, {name}, Cipher is ")), "{output}");
    }
    let output = openssl("-tls1_1").unwrap();
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.stderr.contains(" alert ") && output.stdout.contains("Cipher is (NONE)"), "{output}");
}

#[test]
fn plain_http_on_the_https_port_is_explained() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "");
    let agent = files.agent(&host, "");
    let answer = request("GET", host.service_address(), "/metrics").unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (400, "this port requires HTTPS; use https://…\n"));
    assert_eq!(agent.page().count(ERRORS, &[]), 1);
}

#[test]
fn client_without_an_accepted_certificate_is_refused_with_a_reason() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n");
    files.issue("client", &["prometheus"]);
    let (ca, other) = (files.at("ca.pem"), Authority::new("others"));
    other.issue(&["prometheus"], Validity::Current).write(files.folder.path(), "strange");
    let config =
        host.config("fra-1", &format!("tls: {{web_config_file: {}}}", files.at("web.yml").display()));
    let agent = Agent::start_for(&host, &config, files.client(&host.to_string(), Some("client")));
    assert_eq!(agent.get("/-/ready").status, 200);

    let [ca, certificate, key, untrusted, untrusted_key] = [
        ca,
        files.at("client.pem"),
        files.at("client.key"),
        files.at("strange.pem"),
        files.at("strange.key"),
    ]
    .map(|path| path.display().to_string());
    let ca_arguments = ["--tls-ca-file", &ca];
    let output = healthcheck(host.service_address(), &ca_arguments);
    let error = format!(
        "error: tls with {}: the server requires a client certificate; set tls.cert_file and tls.key_file\n",
        host.service_address()
    );
    assert_eq!((output.code, output.stderr.as_str()), (Some(1), error.as_str()));

    let client_arguments = ["--tls-cert-file", &certificate, "--tls-key-file", &key];
    let output = healthcheck(host.service_address(), &[&ca_arguments[..], &client_arguments].concat());
    assert_eq!(output.code, Some(0), "{output}");

    let client_arguments = ["--tls-cert-file", &untrusted, "--tls-key-file", &untrusted_key];
    let output = healthcheck(host.service_address(), &[&ca_arguments[..], &client_arguments].concat());
    assert!(output.stderr.contains("the server rejected the client certificate ("), "{output}");
    assert_eq!(agent.page().count(ERRORS, &[]), 2);
}

#[test]
fn untrusted_server_is_named_with_a_reason() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "");
    let agent = files.agent(&host, "");
    let address = host.service_address();
    let ca = files.at("ca.pem").display().to_string();
    let other = Authority::new("others").write(files.folder.path(), "others").display().to_string();
    for (arguments, reason) in [
        (
            &["--tls-ca-file", other.as_str()][..],
            "certificate is signed by an unknown CA; set tls.ca_file to its CA".to_owned(),
        ),
        (
            &["--tls-ca-file", &ca, "--tls-server-name", "ams-1"],
            format!(
                "certificate is not valid for ams-1 (valid for {host}, fra-1); \
                 set tls.server_name to a name of the certificate, or issue one for this name"
            ),
        ),
    ] {
        let output = healthcheck(address, arguments);
        assert_eq!((output.code, output.stderr), (Some(1), format!("error: tls with {address}: {reason}\n")));
    }
    let output = healthcheck(address, &["--tls-ca-file", &ca, "--tls-server-name", "fra-1"]);
    assert_eq!(output.code, Some(0), "{output}");
    drop(agent);

    for (valid, begin, end) in [
        (Validity::Expired, "certificate expired ", "d ago; renew it, or correct the clock of this host\n"),
        (Validity::NotYet, "certificate is not valid until ", "d from now; check the clock of this host\n"),
    ] {
        files.ca.issue(&["fra-1"], valid).write(files.folder.path(), "server");
        let agent = files.agent(&host, "");
        assert_eq!(
            agent.log().contains("certificate has expired"),
            valid == Validity::Expired,
            "{}",
            agent.log()
        );
        let output = healthcheck(address, &["--tls-ca-file", &ca, "--tls-server-name", "fra-1"]);
        let begin = format!("error: tls with {address}: {begin}");
        assert!(output.stderr.starts_with(&begin) && output.stderr.ends_with(end), "{output}");
    }
}

#[test]
fn probe_reads_the_agent_api_over_https() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    files.web(&host, "");
    let _agent = files.agent(&host, "responder: {allow: [127.0.0.0/8]}");
    let ca = files.at("ca.pem").display().to_string();
    let target = format!("https://{host}:{}", Host::PORT);
    let probe = |target: &str, more: &[&str]| {
        run(&[&["probe", "echo", target, "-c", "2", "-i", "20ms"], more].concat())
    };
    let output = probe(&target, &["--tls-ca-file", &ca]);
    assert_eq!(output.code, Some(0), "{output}");
    let output = probe(&target, &[]);
    assert!(
        output.stderr.contains(&format!(
            "error: tls with {}: certificate is signed by an unknown CA",
            host.service_address()
        )),
        "{output}"
    );
    let output = probe(&host.to_string(), &["--tls-ca-file", &ca]);
    assert!(output.stderr.contains(&format!("{host} is not reached over TLS: ")), "{output}");

    let config = files.write(
        "probe.yaml",
        &format!("tls: {{ca_file: {ca}}}\npeers: [{{name: other, address: {host}, scheme: https}}]\n"),
    );
    let output = probe("other", &["--config", &config.display().to_string()]);
    assert_eq!(output.code, Some(0), "{output}");
}

/// Sends a request with this `Authorization`; returns the status and the whole response.
fn request_as(host: &Host, authorization: &str) -> (u16, String) {
    let mut stream = PlainStream::connect(host.service_address()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let header =
        if authorization.is_empty() { String::new() } else { format!("Authorization: {authorization}\r\n") };
    write!(stream, "GET /-/ready HTTP/1.0\r\nHost: x\r\n{header}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

#[test]
fn basic_auth_users_apply_to_all_but_agents() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    // The lowest cost.
    let hash = bcrypt::hash("test", 4).unwrap();
    files.write(
        "web.yml",
        &format!("http_server_config: {{headers: {{X-Frame-Options: deny}}}}\nbasic_auth_users: {{alice: \"{hash}\"}}"),
    );
    let key = files.write("mesh.key", "the key of this year\n");
    let more =
        format!("key_file: {}\ntls: {{web_config_file: {}}}", key.display(), files.at("web.yml").display());
    let signer = Signer::new(&Keys::only(Key::new(b"the key of this year")));
    let client =
        Client { signer: Some(signer), deadline: DEADLINE, answer_bytes_max: 1 << 24, ..Client::default() };
    let agent = Agent::start_for(&host, &host.config("fra-1", &more), client);
    assert_eq!(agent.get("/-/ready").body, "ready\n");

    // alice:test, twice, alice:wrong, eve:test
    for (authorization, status) in [
        ("", 401),
        ("Basic YWxpY2U6dGVzdA==", 200),
        ("Basic YWxpY2U6dGVzdA==", 200),
        ("Basic YWxpY2U6d3Jvbmc=", 401),
        ("Basic ZXZlOnRlc3Q=", 401),
        ("Bearer YWxpY2U6dGVzdA==", 401),
        ("Pathmeter-HMAC time=1,nonce=2,mac=3", 401),
    ] {
        let (found, answer) = request_as(&host, authorization);
        assert_eq!(found, status, "{authorization}: {answer}");
        assert_eq!(answer.contains("www-authenticate: Basic realm="), status == 401, "{answer}");
        assert!(answer.contains("x-frame-options: deny\r\n"), "{answer}");
    }
    assert!(agent.log().contains("passwords are sent"), "{}", agent.log());
    assert!(!agent.page().has(ERRORS, &[]) && agent.page().has(SUCCESSFUL, &[]));

    let [plain, keyed] = [&[][..], &["--key-file", key.to_str().unwrap()]].map(|more| {
        run(&[&["healthcheck", "--address", &host.service_address().to_string()], more].concat())
    });
    assert!(plain.code == Some(1) && plain.stderr.contains("401 Unauthorized user and password"), "{plain}");
    assert_eq!(keyed.code, Some(0), "{keyed}");
}

#[test]
fn check_reads_referenced_files_only_when_named() {
    let files = TlsFiles::new();
    let config = files.write(
        "config.yaml",
        "key_file: k\ntls: {web_config_file: /nowhere/web.yml, ca_file: /nowhere/ca}\n",
    );
    let output = run(&["check", config.to_str().unwrap()]);
    assert_eq!(output.code, Some(0), "{output}");
    let output = run(&["run", "--config", config.to_str().unwrap()]);
    assert_eq!(output.code, Some(78), "{output}");

    let web =
        files.write("web.yml", "tls_server_config: {cert_file: no, key_file: no, min_version: TLS10}\n");
    let output = run(&["check", "--web-config", web.to_str().unwrap()]);
    assert_eq!(output.code, Some(78), "{output}");
    assert!(
        output.stderr.contains("line 1, column 63: tls_server_config.min_version: TLS10 is not supported"),
        "{output}"
    );
    files.write(
        "web.yml",
        "tls_server_config: {cert_file: no, key_file: no}\nhttp_server_config: {http2: true}\n",
    );
    let output = run(&["check", "--web-config", web.to_str().unwrap()]);
    assert_eq!(output.code, Some(0), "{output}");
    assert!(
        output.stdout.contains(": warning: line 2, column 29: http_server_config.http2: has no effect"),
        "{output}"
    );
    assert!(output.stdout.ends_with(": ok: HTTP with TLS, 0 users\n"), "{output}");
}

#[test]
fn documented_openssl_commands_make_working_certificates() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/how-to/tls.md")).unwrap();
    let commands = text.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(commands.starts_with("openssl req -x509 "), "{commands}");
    let mut shell = Command::new("sh");
    shell.args(["-euc", commands]).current_dir(files.folder.path());
    if !is_installed("openssl") {
        return;
    }
    let output = CommandOutput::of(&mut shell);
    assert_eq!(output.code, Some(0), "{output}");
    let more = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem";
    files.write(
        "web.yml",
        &format!("tls_server_config: {{cert_file: agent.pem, key_file: agent.key, {more}}}"),
    );
    let config =
        host.config("fra-1", &format!("tls: {{web_config_file: {}}}", files.at("web.yml").display()));
    for name in ["fra-1.example.net", "localhost", "127.0.0.1"] {
        let agent = Agent::start_for(&host, &config, files.client(name, Some("agent")));
        assert_eq!(agent.get("/-/ready").status, 200, "{name}");
    }
}
