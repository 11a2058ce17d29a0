//! Changing files: certificate rotation with open connections, reloads, corrected CA files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pathmeter_lab::pki::{Authority, Validity};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{EXPIRY, SUCCESSFUL, TlsFiles};
use crate::fixture::{Agent, DEADLINE, Host, MetricsPage, eventually, request};

/// [`eventually`] with a longer deadline: files are checked every 10 s.
fn eventually_after_file_check<T>(what: &str, condition: impl Fn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < 3 * DEADLINE, "timed out waiting for: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// A TLS connection that is kept open.
struct KeepAliveConnection {
    runtime: tokio::runtime::Runtime,
    stream: pathmeter::tls::TlsStream<TcpStream>,
}

impl KeepAliveConnection {
    /// Connects; `None` if the certificate is not for `name`.
    fn connect(files: &TlsFiles, host: &Host, name: &str) -> Option<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(async {
            let stream = TcpStream::connect(host.service_address()).await.unwrap();
            files.connector(None).connect(stream, name).await.ok()
        })?;
        Some(Self { runtime, stream })
    }

    fn request(&mut self) {
        self.runtime.block_on(async {
            self.stream.write_all(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            self.stream.flush().await.unwrap();
            let mut read = Vec::new();
            while !read.ends_with(b"\r\n\r\nhealthy\n") {
                assert_ne!(self.stream.read_buf(&mut read).await.unwrap(), 0, "closed");
            }
        });
    }
}

#[test]
fn certificates_are_rotated_under_open_connections() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    // The layout of a Kubernetes secret: files are symlinks into a folder that is a symlink, which is
    // replaced.
    for name in ["first", "second", "broken"] {
        fs::create_dir(files.at(name)).unwrap();
        let issued = files.ca.issue(&[name, &host.to_string()], Validity::Current);
        issued.write(&files.at(name), "tls");
    }
    fs::write(files.at("broken/tls.key"), "-----BEGIN PRIVATE KEY-----\n").unwrap();
    let point_to = |name: &str| {
        symlink(name, files.at("..next")).unwrap();
        fs::rename(files.at("..next"), files.at("..data")).unwrap();
    };
    point_to("first");
    for name in ["tls.pem", "tls.key"] {
        symlink(format!("..data/{name}"), files.at(name)).unwrap();
    }
    files.write("web.yml", "tls_server_config: {cert_file: tls.pem, key_file: tls.key}");
    let agent = files.agent(&host, "");
    let mut connection = KeepAliveConnection::connect(&files, &host, "first").unwrap();
    connection.request();
    let mut request_until = |what: &str, condition: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !condition() {
            connection.request();
            assert!(start.elapsed() < 3 * DEADLINE, "timed out waiting for: {what}\n{}", agent.log());
            thread::sleep(Duration::from_millis(50));
        }
        connection.request();
    };
    let is_serving = |name: &str| KeepAliveConnection::connect(&files, &host, name).is_some();
    let last_reload_succeeded = |page: &MetricsPage| page.count(SUCCESSFUL, &[]) == 1;

    point_to("second");
    request_until("the second certificate", &|| is_serving("second"));
    assert!(!is_serving("first") && last_reload_succeeded(&agent.page()));

    point_to("broken");
    request_until("the invalid certificate is detected", &|| !last_reload_succeeded(&agent.page()));
    assert!(is_serving("second"));

    fs::remove_file(files.at("tls.pem")).unwrap();
    fs::copy(files.at("first/tls.pem"), files.at("tls.pem")).unwrap();
    fs::remove_file(files.at("tls.key")).unwrap();
    fs::copy(files.at("first/tls.key"), files.at("tls.key")).unwrap();
    request_until("the first one again", &|| is_serving("first"));
    assert!(last_reload_succeeded(&agent.page()));
    let log = agent.log();
    let warning = "contains no private key";
    assert_eq!(log.matches(warning).count(), 1, "{log}");
    assert!(log.contains("files of the HTTP port changed but cannot be used; the previous ones stay in use"));
}

#[test]
fn reload_applies_the_web_config_file_or_changes_nothing() {
    let (host, files) = (Host::claim(), TlsFiles::new());
    let agent = Agent::start(&host, &host.config("fra-1", ""));
    let page = agent.page();
    assert!(!page.has(EXPIRY, &[]) && !page.has(SUCCESSFUL, &[]), "{page}");

    let web = files.web(&host, "");
    let good = fs::read_to_string(&web).unwrap();
    let config = host.config("fra-1", &format!("tls: {{web_config_file: {}}}", web.display()));
    agent.rewrite(&config);
    for (text, problem) in [
        (good.replace("cert_file", "certfile"), "line 2, column 3: tls_server_config.certfile: unknown key"),
        (good.replace("server.key", "ca.pem"), "ca.pem contains no private key"),
        (good.clone() + "  min_version: TLS11\n", "TLS11 is not supported"),
    ] {
        fs::write(&web, text).unwrap();
        let answer = agent.reload();
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.body.contains(problem), "{}", answer.body);
        assert!(answer.body.ends_with("the old configuration stays in use\n"), "{}", answer.body);
        assert_eq!(agent.page().count("pathmeter_config_last_reload_successful", &[]), 0);
    }
    fs::write(&web, &good).unwrap();
    assert_eq!(agent.reload().status, 200);
    let client = files.client(&host.to_string(), None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let get = |path: &str| runtime.block_on(client.get(host.service_address(), "x", path)).unwrap();
    assert_eq!(get("/-/ready").status.as_u16(), 200);
    let successful = || {
        let page = MetricsPage::parse(std::str::from_utf8(&get("/metrics").body).unwrap());
        page.count("pathmeter_config_last_reload_successful", &[])
    };
    // Metrics pages are cached for a second.
    eventually("a page with the result of the reload", || (successful() == 1).then_some(()));

    fs::write(&web, "tls_server_config: {}\nbasic_auth_users: [").unwrap();
    agent.signal(Signal::SIGHUP);
    eventually("the failed reload is exported", || (successful() == 0).then_some(()));

    agent.rewrite(&host.config("fra-1", ""));
    agent.signal(Signal::SIGHUP);
    eventually("plain HTTP again", || {
        request("GET", host.service_address(), "/-/ready").ok().filter(|a| a.status == 200)
    });
}

#[test]
fn agents_identify_each_other_with_client_certificates() {
    let (hosts, files) = ([Host::claim(), Host::claim()], TlsFiles::new());
    let key = files.write("mesh.key", "the key of this year\n");
    let auth = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem";
    let [a, b] = &hosts;
    let start = |own: &Host, name: &str, other: &Host, other_name: &str, ca: &Path| {
        files.issue(name, &[name, &own.to_string()]);
        let web = format!("tls_server_config: {{cert_file: {name}.pem, key_file: {name}.key, {auth}}}");
        let web = files.write(&format!("{name}.yml"), &web);
        let config = own.config(
            name,
            &format!(
                "key_file: {}\n\
                 tls:\n  web_config_file: {}\n  ca_file: {}\n  cert_file: {}\n  key_file: {}\n\
                 peers: [{{name: {other_name}, address: {other}, scheme: https, tls: {{server_name: {other_name}}}}}]\n\
                 probes: [{{name: fast, interval: 20ms}}]",
                key.display(),
                web.display(),
                ca.display(),
                files.at(&format!("{name}.pem")).display(),
                files.at(&format!("{name}.key")).display(),
            ),
        );
        Agent::start_for(own, &config, files.client(name, Some(name)))
    };
    let wait_until_identified = |agent: &Agent, other: &str| {
        let label = format!("agent=\"{other}\"");
        // An agent that did not run yet is polled again after 15 s.
        eventually_after_file_check("the other agent is identified", || {
            agent.page().has("pathmeter_peer_info", &[&label]).then_some(())
        });
    };
    let ca = files.at("ca.pem");
    let first = start(a, "a", b, "b", &ca);
    let second = start(b, "b", a, "a", &ca);
    wait_until_identified(&first, "b");
    wait_until_identified(&second, "a");
    drop(second);

    let others = Authority::new("others").write(files.folder.path(), "others");
    let distrusting = start(b, "b", a, "a", &others);
    let sentence = format!("tls with {}: certificate is signed by an unknown CA", a.service_address());
    eventually("the other is not believed, and that is said", || {
        distrusting.log().contains(&sentence).then_some(())
    });
    // The corrected CA file is used without a reload.
    fs::copy(&ca, &others).unwrap();
    eventually_after_file_check("the CA is taken", || {
        distrusting.page().has("pathmeter_peer_info", &["agent=\"a\""]).then_some(())
    });
    assert!(distrusting.log().contains("TLS files for outgoing connections changed and are now in use"));
}
