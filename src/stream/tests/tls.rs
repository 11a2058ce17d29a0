//! Servers that cannot be believed, over `wss` and `https`.

use pathmeter_lab::pki::{Authority, Valid};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::config::web::{ClientVerification, Pem};
use crate::http::client::TlsClient;
use crate::tls::Acceptor;
use crate::tls::tests::{acceptor, connector, web};

/// Shakes hands, or not, and answers every request with the same words.
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

fn secure(speech: Speech, to: SocketAddr, ca: &Authority) -> Dial {
    let secure = TlsClient { connector: connector(ca, None), server_name: "ams-1".to_owned() };
    let mut dial = speech.dial(to);
    match &mut dial.over {
        StreamProtocol::WebSocket { place, .. } | StreamProtocol::Http { place, .. } => {
            place.secure = Some(secure)
        }
        StreamProtocol::Tcp { .. } => panic!("our echo over TCP has no TLS"),
    }
    dial
}

/// The first trouble of a path towards a server, which is about TLS.
fn trouble(speech: Speech, acceptor: Acceptor, ca: &Authority) -> String {
    let server = serving(acceptor);
    let mut path = StreamPath::start(secure(speech, server.address, ca));
    let told = path.until("a trouble", |told| !told.troubles.is_empty());
    let trouble = told.troubles[0].replace(&server.address.to_string(), "b");
    path.handle.remove(ID);
    let told = path.stop();
    assert_eq!(told.answered(), 0, "{told:?}");
    assert!(path.ended("tls") >= 1 && path.ended_otherwise(&["tls"]) == 0, "{speech:?}: {:?}", path.told);
    trouble
}

#[test]
fn a_certificate_that_cannot_be_believed_is_tls_trouble_with_a_sentence() {
    let (ca, other) = (Authority::new("ours"), Authority::new("others"));
    let serving = |ca: &Authority, name: &str, valid| acceptor(&web(&ca.issue(&[name], valid)));
    for speech in [Speech::WebSocket, Speech::Http] {
        let unknown = trouble(speech, serving(&other, "ams-1", Valid::Always), &ca);
        let sentence = "certificate is signed by an unknown CA; set tls.ca_file to its CA";
        assert_eq!(unknown, format!("tls with b: {sentence}"));
        let wrong = trouble(speech, serving(&ca, "fra-1", Valid::Always), &ca);
        assert!(
            wrong.starts_with("tls with b: certificate is not valid for ams-1 (valid for fra-1); "),
            "{wrong}"
        );
        let expired = trouble(speech, serving(&ca, "ams-1", Valid::Past), &ca);
        assert!(expired.starts_with("tls with b: certificate expired "), "{expired}");
        let early = trouble(speech, serving(&ca, "ams-1", Valid::Future), &ca);
        assert!(early.starts_with("tls with b: certificate is not valid until "), "{early}");
    }
}

#[test]
fn a_server_that_wants_a_certificate_of_ours_is_tls_trouble_in_both_versions() {
    let ca = Authority::new("ours");
    let issued = ca.issue(&["ams-1"], Valid::Always);
    for max_version in [crate::config::web::TlsVersion::Tls12, crate::config::web::TlsVersion::Tls13] {
        let clients = ClientVerification::Verified { ca: Pem::Text(ca.pem()), names: Vec::new() };
        let web = crate::config::web::WebTls { clients, max_version, ..web(&issued) };
        for speech in [Speech::WebSocket, Speech::Http] {
            let trouble = trouble(speech, acceptor(&web), &ca);
            let sentence = "the server requires a client certificate; set tls.cert_file and tls.key_file";
            assert!(trouble.ends_with(&format!(": {sentence}")), "{max_version:?} {speech:?}: {trouble}");
        }
    }
}

#[test]
fn a_port_that_speaks_no_tls_is_tls_trouble_and_one_that_ends_is_not() {
    let ca = Authority::new("ours");
    for speech in [Speech::WebSocket, Speech::Http] {
        let server = Server::start(|number, mut stream| match number {
            0 => {
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
                drop(close(stream));
            }
            1 => drop(close(stream)),
            2 => reset(stream),
            _ => hold(stream),
        });
        let mut path = StreamPath::start(secure(speech, server.address, &ca));
        path.until("three troubles", |told| told.troubles.len() >= 3);
        path.handle.remove(ID);
        let told = path.stop();
        assert!(told.troubles[0].contains("the response is not TLS"), "{told:?}");
        let ended = (path.ended("tls"), path.ended_otherwise(&["tls", "closed", "reset"]));
        assert_eq!(ended, (1, 0), "{speech:?}: {:?}", path.told);
    }
}

#[test]
fn a_server_that_can_be_believed_is_measured_and_its_certificate_is_known() {
    let ca = Authority::new("ours");
    let server = serving(acceptor(&web(&ca.issue(&["ams-1"], Valid::Always))));
    let mut path = StreamPath::start(secure(Speech::Http, server.address, &ca));
    path.until("answers", |told| told.answered() >= 5);
    let told = path.stop();
    assert_eq!((told.answered(), told.connections), (told.sent(), 1), "{told:?}");
    let page = path.scrape();
    let expiry = page.seconds("pathmeter_tls_certificate_expiry_timestamp_seconds", &[]);
    assert!((expiry - 67_090_118_400.0).abs() < 1.0, "{expiry}");
}
