//! HTTPS, both ways: whom it lets in, whom it believes, and how certificates change under it.

mod changes;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as PlainStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pathmeter::http::auth::Signer;
use pathmeter::http::client::{Client, TlsClient};
use pathmeter::tls::{Connector, KeyPair, Trust};
use pathmeter_lab::pki::{Authority, FOR_EVER, Issued, Valid};
use pathmeter_proto::key::{Key, Keys};
use tempfile::TempDir;

use crate::drift::undocumented;
use crate::fixture::{Agent, DEADLINE, Ended, Host, request, run, skipped};

const ERRORS: &str = "pathmeter_http_tls_handshake_errors_total";
const EXPIRY: &str = "pathmeter_http_tls_certificate_expiry_timestamp_seconds";
const SUCCESSFUL: &str = "pathmeter_tls_files_last_reload_successful";

/// A folder with a CA, and what it signed.
struct Certified {
    folder: TempDir,
    ca: Authority,
}

impl Certified {
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
        let issued = self.ca.issue(names, Valid::Always);
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

    /// A client that believes the CA, and shows the certificate of that name or none.
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

    /// An agent on `host` that is served as `web.yml` says.
    fn agent(&self, host: &Host, more: &str) -> Agent {
        let config = host
            .config("fra-1", &format!("tls: {{web_config_file: {}}}\n{more}", self.at("web.yml").display()));
        Agent::start_for(host, &config, self.client(&host.to_string(), None))
    }
}

/// The program, told to ask at `https://address`.
fn healthcheck(address: SocketAddr, arguments: &[&str]) -> Ended {
    let address = format!("https://{address}");
    run(&[&["healthcheck", "--address", &address], arguments].concat())
}

/// Whether a tool can be run; says so if not.
fn is_there(tool: &str) -> bool {
    let mut command = Command::new(tool);
    command.arg("version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let is_there = command.status().is_ok();
    if !is_there {
        skipped(&format!("{tool} is not on PATH"));
    }
    is_there
}

/// What a tool says; `None`: it is not there.
fn tool(command: &mut Command) -> Option<Ended> {
    is_there(&command.get_program().to_string_lossy()).then(|| Ended::of(command))
}

#[test]
fn metrics_are_served_over_https_and_tell_of_it() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "http_server_config: {headers: {Strict-Transport-Security: max-age=60}}");
    let agent = site.agent(&host, "");
    let page = agent.page();
    assert_eq!(page.count(ERRORS, &[]), 0);
    assert_eq!(page.count(SUCCESSFUL, &[]), 1);
    assert!(page.text().contains(&format!("\n{EXPIRY} {FOR_EVER}\n")), "{page}");
    assert_eq!(undocumented(&page), Vec::<&str>::new());

    let url = format!("https://{}/metrics", host.front());
    let curl = |ca: &Path| {
        let mut curl = Command::new("curl");
        tool(curl.args(["-sS", "-i", "--max-time", "20", "--cacert"]).arg(ca).arg(&url))
    };
    let Some(ended) = curl(&site.at("ca.pem")) else { return };
    assert!(ended.stdout.starts_with("HTTP/1.1 200 OK\r\n"), "{ended}");
    assert!(ended.stdout.contains("\r\nstrict-transport-security: max-age=60\r\n"), "{ended}");
    assert!(ended.stdout.contains("\npathmeter_build_info{"), "{ended}");
    let other = Authority::new("others").write(site.folder.path(), "others");
    assert_eq!(curl(&other).unwrap().code, Some(60), "a CA that did not sign");
}

#[test]
fn openssl_sees_the_chain_and_the_versions() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "");
    let _agent = site.agent(&host, "");
    let openssl = |version: &str| {
        let mut openssl = Command::new("openssl");
        let address = host.front().to_string();
        openssl.args(["s_client", "-connect", &address, version, "-CAfile"]).arg(site.at("ca.pem"));
        tool(openssl.args(["-cipher", "DEFAULT@SECLEVEL=0", "-showcerts", "-verify_return_error"]))
    };
    for (version, name) in [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")] {
        let Some(ended) = openssl(version) else { return };
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(ended.stdout.contains("Verify return code: 0 (ok)"), "{ended}");
        assert!(ended.stdout.contains("-----BEGIN CERTIFICATE-----"), "{ended}");
        assert!(ended.stdout.contains(&format!("New, {name}, Cipher is ")), "{ended}");
    }
    let ended = openssl("-tls1_1").unwrap();
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains(" alert ") && ended.stdout.contains("Cipher is (NONE)"), "{ended}");
}

#[test]
fn plain_http_is_told_where_it_is() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "");
    let agent = site.agent(&host, "");
    let answer = request("GET", host.front(), "/metrics").unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (400, "this port requires HTTPS; use https://…\n"));
    assert_eq!(agent.page().count(ERRORS, &[]), 1);
}

#[test]
fn a_client_without_the_right_certificate_is_refused_and_told() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n");
    site.issue("client", &["prometheus"]);
    let (ca, other) = (site.at("ca.pem"), Authority::new("others"));
    other.issue(&["prometheus"], Valid::Always).write(site.folder.path(), "strange");
    let config = host.config("fra-1", &format!("tls: {{web_config_file: {}}}", site.at("web.yml").display()));
    let agent = Agent::start_for(&host, &config, site.client(&host.to_string(), Some("client")));
    assert_eq!(agent.get("/-/ready").status, 200);

    let [ca, certificate, key, strange, strange_key] =
        [ca, site.at("client.pem"), site.at("client.key"), site.at("strange.pem"), site.at("strange.key")]
            .map(|path| path.display().to_string());
    let trust = ["--tls-ca-file", &ca];
    let ended = healthcheck(host.front(), &trust);
    let error = format!(
        "error: tls with {}: the server requires a client certificate; set tls.cert_file and tls.key_file\n",
        host.front()
    );
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(1), error.as_str()));

    let shown = ["--tls-cert-file", &certificate, "--tls-key-file", &key];
    let ended = healthcheck(host.front(), &[&trust[..], &shown].concat());
    assert_eq!(ended.code, Some(0), "{ended}");

    let shown = ["--tls-cert-file", &strange, "--tls-key-file", &strange_key];
    let ended = healthcheck(host.front(), &[&trust[..], &shown].concat());
    assert!(ended.stderr.contains("the server rejected the client certificate ("), "{ended}");
    assert_eq!(agent.page().count(ERRORS, &[]), 2);
}

#[test]
fn a_server_that_is_not_believed_is_named_with_a_reason() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "");
    let agent = site.agent(&host, "");
    let front = host.front();
    let ca = site.at("ca.pem").display().to_string();
    let other = Authority::new("others").write(site.folder.path(), "others").display().to_string();
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
        let ended = healthcheck(front, arguments);
        assert_eq!((ended.code, ended.stderr), (Some(1), format!("error: tls with {front}: {reason}\n")));
    }
    let ended = healthcheck(front, &["--tls-ca-file", &ca, "--tls-server-name", "fra-1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    drop(agent);

    for (valid, begin, end) in [
        (Valid::Past, "certificate expired ", "d ago; renew it, or correct the clock of this host\n"),
        (Valid::Future, "certificate is not valid until ", "d from now; check the clock of this host\n"),
    ] {
        site.ca.issue(&["fra-1"], valid).write(site.folder.path(), "server");
        let agent = site.agent(&host, "");
        assert_eq!(agent.log().contains("certificate has expired"), valid == Valid::Past, "{}", agent.log());
        let ended = healthcheck(front, &["--tls-ca-file", &ca, "--tls-server-name", "fra-1"]);
        let begin = format!("error: tls with {front}: {begin}");
        assert!(ended.stderr.starts_with(&begin) && ended.stderr.ends_with(end), "{ended}");
    }
}

#[test]
fn a_probe_asks_an_agent_over_https() {
    let (host, site) = (Host::claim(), Certified::new());
    site.web(&host, "");
    let _agent = site.agent(&host, "responder: {allow: [127.0.0.0/8]}");
    let ca = site.at("ca.pem").display().to_string();
    let target = format!("https://{host}:{}", Host::PORT);
    let probe = |target: &str, more: &[&str]| {
        run(&[&["probe", "echo", target, "-c", "2", "-i", "20ms"], more].concat())
    };
    let ended = probe(&target, &["--tls-ca-file", &ca]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let ended = probe(&target, &[]);
    assert!(
        ended
            .stderr
            .contains(&format!("error: tls with {}: certificate is signed by an unknown CA", host.front())),
        "{ended}"
    );
    let ended = probe(&host.to_string(), &["--tls-ca-file", &ca]);
    assert!(ended.stderr.contains(&format!("{host} is not reached over TLS: ")), "{ended}");

    let config = site.write(
        "probe.yaml",
        &format!("tls: {{ca_file: {ca}}}\npeers: [{{name: other, address: {host}, scheme: https}}]\n"),
    );
    let ended = probe("other", &["--config", &config.display().to_string()]);
    assert_eq!(ended.code, Some(0), "{ended}");
}

/// Status, and the whole answer, of a request with this `Authorization`.
fn asking_as(host: &Host, authorization: &str) -> (u16, String) {
    let mut stream = PlainStream::connect(host.front()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let header =
        if authorization.is_empty() { String::new() } else { format!("Authorization: {authorization}\r\n") };
    write!(stream, "GET /-/ready HTTP/1.0\r\nHost: x\r\n{header}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

#[test]
fn with_users_everybody_needs_a_password_but_agents() {
    let (host, site) = (Host::claim(), Certified::new());
    // Of the lowest cost.
    let hash = bcrypt::hash("test", 4).unwrap();
    site.write(
        "web.yml",
        &format!("http_server_config: {{headers: {{X-Frame-Options: deny}}}}\nbasic_auth_users: {{alice: \"{hash}\"}}"),
    );
    let key = site.write("mesh.key", "the key of this year\n");
    let more =
        format!("key_file: {}\ntls: {{web_config_file: {}}}", key.display(), site.at("web.yml").display());
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
        let (found, answer) = asking_as(&host, authorization);
        assert_eq!(found, status, "{authorization}: {answer}");
        assert_eq!(answer.contains("www-authenticate: Basic realm="), status == 401, "{answer}");
        assert!(answer.contains("x-frame-options: deny\r\n"), "{answer}");
    }
    assert!(agent.log().contains("passwords are sent"), "{}", agent.log());
    assert!(!agent.page().has(ERRORS, &[]) && agent.page().has(SUCCESSFUL, &[]));

    let [plain, keyed] = [&[][..], &["--key-file", key.to_str().unwrap()]]
        .map(|more| run(&[&["healthcheck", "--address", &host.front().to_string()], more].concat()));
    assert!(plain.code == Some(1) && plain.stderr.contains("401 Unauthorized user and password"), "{plain}");
    assert_eq!(keyed.code, Some(0), "{keyed}");
}

#[test]
fn check_leaves_other_files_alone_unless_it_is_given_one() {
    let site = Certified::new();
    let config = site.write(
        "config.yaml",
        "key_file: k\ntls: {web_config_file: /nowhere/web.yml, ca_file: /nowhere/ca}\n",
    );
    let ended = run(&["check", config.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let ended = run(&["run", "--config", config.to_str().unwrap()]);
    assert_eq!(ended.code, Some(78), "{ended}");

    let web = site.write("web.yml", "tls_server_config: {cert_file: no, key_file: no, min_version: TLS10}\n");
    let ended = run(&["check", "--web-config", web.to_str().unwrap()]);
    assert_eq!(ended.code, Some(78), "{ended}");
    assert!(
        ended.stderr.contains("line 1, column 63: tls_server_config.min_version: TLS10 is not supported"),
        "{ended}"
    );
    site.write(
        "web.yml",
        "tls_server_config: {cert_file: no, key_file: no}\nhttp_server_config: {http2: true}\n",
    );
    let ended = run(&["check", "--web-config", web.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(
        ended.stdout.contains(": warning: line 2, column 29: http_server_config.http2: has no effect"),
        "{ended}"
    );
    assert!(ended.stdout.ends_with(": ok: HTTP with TLS, 0 users\n"), "{ended}");
}

#[test]
fn the_commands_of_the_documentation_make_what_they_say() {
    let (host, site) = (Host::claim(), Certified::new());
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/how-to/tls.md")).unwrap();

    let commands = text.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(commands.starts_with("openssl req -x509 "), "{commands}");
    let mut shell = Command::new("sh");
    shell.args(["-euc", commands]).current_dir(site.folder.path());
    if !is_there("openssl") {
        return;
    }
    let ended = Ended::of(&mut shell);
    assert_eq!(ended.code, Some(0), "{ended}");
    let more = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem";
    site.write(
        "web.yml",
        &format!("tls_server_config: {{cert_file: agent.pem, key_file: agent.key, {more}}}"),
    );
    let config = host.config("fra-1", &format!("tls: {{web_config_file: {}}}", site.at("web.yml").display()));
    for name in ["fra-1.example.net", "localhost", "127.0.0.1"] {
        let agent = Agent::start_for(&host, &config, site.client(name, Some("agent")));
        assert_eq!(agent.get("/-/ready").status, 200, "{name}");
    }
}
