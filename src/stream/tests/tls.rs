//! Echo over `wss` and `https`, with untrusted and faulty servers.

use pathmeter_lab::pki::{Authority, Validity};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::config::web::{ClientVerification, Pem};
use crate::http::client::TlsClient;
use crate::tls::Acceptor;
use crate::tls::tests::{acceptor, connector, web};

/// A TLS server that answers every request with the same response.
fn serving(acceptor: Acceptor) -> Server {
    Server::start(move |_, stream| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            stream.set_nonblocking(true).unwrap();
            let stream = tokio::net::TcpStream::from_std(stream).unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut head = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                head.push(byte);
                if head.ends_with(b"\r\n\r\n") {
                    head.clear();
                    if stream.write_all(answer("200 OK", "ok").as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
    })
}

fn secure(test_protocol: TestProtocol, to: SocketAddr, ca: &Authority) -> Dial {
    let secure = TlsClient { connector: connector(ca, None), server_name: "ams-1".to_owned() };
    let mut dial = test_protocol.dial(to);
    match &mut dial.protocol {
        StreamProtocol::WebSocket { target, .. } | StreamProtocol::Http { target, .. } => {
            target.secure = Some(secure)
        }
        StreamProtocol::Tcp { .. } => panic!("our echo over TCP has no TLS"),
    }
    dial
}

/// The first error of a path to a server, which is a TLS error.
fn first_error(test_protocol: TestProtocol, acceptor: Acceptor, ca: &Authority) -> String {
    let server = serving(acceptor);
    let mut path = RunningPath::start(secure(test_protocol, server.address, ca));
    let observed = path.until("an error", |observed| !observed.errors.is_empty());
    let error = observed.errors[0].replace(&server.address.to_string(), "b");
    path.handle.remove(ID);
    let observed = path.stop();
    assert_eq!(observed.answered(), 0, "{observed:?}");
    assert!(
        path.ended("tls") >= 1 && path.ended_otherwise(&["tls"]) == 0,
        "{test_protocol:?}: {:?}",
        path.observed
    );
    error
}

#[test]
fn invalid_certificate_is_a_tls_error_with_its_cause() {
    let (ca, other) = (Authority::new("trusted"), Authority::new("unknown"));
    let serving = |ca: &Authority, name: &str, valid| acceptor(&web(&ca.issue(&[name], valid)));
    for test_protocol in [TestProtocol::WebSocket, TestProtocol::Http] {
        let unknown = first_error(test_protocol, serving(&other, "ams-1", Validity::Current), &ca);
        let text = "certificate is signed by an unknown CA; set tls.ca_file to its CA";
        assert_eq!(unknown, format!("tls with b: {text}"));
        let wrong = first_error(test_protocol, serving(&ca, "fra-1", Validity::Current), &ca);
        assert!(
            wrong.starts_with("tls with b: certificate is not valid for ams-1 (valid for fra-1); "),
            "{wrong}"
        );
        let expired = first_error(test_protocol, serving(&ca, "ams-1", Validity::Expired), &ca);
        assert!(expired.starts_with("tls with b: certificate expired "), "{expired}");
        let early = first_error(test_protocol, serving(&ca, "ams-1", Validity::NotYet), &ca);
        assert!(early.starts_with("tls with b: certificate is not valid until "), "{early}");
    }
}

#[test]
fn missing_client_certificate_is_a_tls_error_in_both_versions() {
    let ca = Authority::new("trusted");
    let issued = ca.issue(&["ams-1"], Validity::Current);
    for max_version in [crate::config::web::TlsVersion::Tls12, crate::config::web::TlsVersion::Tls13] {
        let clients = ClientVerification::Verified { ca: Pem::Text(ca.pem()), names: Vec::new() };
        let web = crate::config::web::WebTls { clients, max_version, ..web(&issued) };
        for test_protocol in [TestProtocol::WebSocket, TestProtocol::Http] {
            let error = first_error(test_protocol, acceptor(&web), &ca);
            let text = "the server requires a client certificate; set tls.cert_file and tls.key_file";
            assert!(error.ends_with(&format!(": {text}")), "{max_version:?} {test_protocol:?}: {error}");
        }
    }
}

#[test]
fn plain_text_server_is_a_tls_error_and_a_closed_one_is_not() {
    let ca = Authority::new("trusted");
    for test_protocol in [TestProtocol::WebSocket, TestProtocol::Http] {
        let server = Server::start(|number, mut stream| match number {
            0 => {
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
                drop(close(stream));
            }
            1 => drop(close(stream)),
            2 => reset(stream),
            _ => hold(stream),
        });
        let mut path = RunningPath::start(secure(test_protocol, server.address, &ca));
        path.until("three errors", |observed| observed.errors.len() >= 3);
        path.handle.remove(ID);
        let observed = path.stop();
        assert!(observed.errors[0].contains("the response is not TLS"), "{observed:?}");
        let ended = (path.ended("tls"), path.ended_otherwise(&["tls", "closed", "reset"]));
        assert_eq!(ended, (1, 0), "{test_protocol:?}: {:?}", path.observed);
    }
}

#[test]
fn trusted_server_is_measured_and_its_certificate_expiry_reported() {
    let ca = Authority::new("trusted");
    let server = serving(acceptor(&web(&ca.issue(&["ams-1"], Validity::Current))));
    let mut path = RunningPath::start(secure(TestProtocol::Http, server.address, &ca));
    path.until("answers", |observed| observed.answered() >= 5);
    let observed = path.stop();
    assert_eq!((observed.answered(), observed.connections), (observed.sent(), 1), "{observed:?}");
    let page = path.scrape();
    let expiry = page.seconds("pathmeter_tls_certificate_expiry_timestamp_seconds", &[]);
    assert!((expiry - 67_090_118_400.0).abs() < 1.0, "{expiry}");
}
