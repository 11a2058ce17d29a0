//! Tests of acceptor and connector against each other, on loopback.

use std::fs;
use std::path::Path;
use std::time::Duration;

use pathmeter_lab::pki::{Authority, Issued, VALID_UNTIL, Validity};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::config::web::{ClientVerification, Pem, TlsVersion, WebTls};

/// Limits every wait, so that a bug causes a failure and not a hang.
const DEADLINE: Duration = Duration::from_secs(20);

async fn within<F: Future>(future: F) -> F::Output {
    timeout(DEADLINE, future).await.expect("completes within the deadline")
}

/// Returns the TLS settings of a server with this certificate.
pub(crate) fn web(issued: &Issued) -> WebTls {
    WebTls {
        certificate: Pem::Text(issued.certificate.clone()),
        key: Pem::Text(issued.key.clone()),
        clients: ClientVerification::Everyone,
        min_version: TlsVersion::Tls12,
        max_version: TlsVersion::Tls13,
        suites: None,
        prefer_server_suites: true,
        curves: Vec::new(),
    }
}

pub(crate) fn acceptor(web: &WebTls) -> Acceptor {
    Acceptor::read(web, &mut WatchedFiles::default()).unwrap()
}

/// Returns a client that trusts a CA, with or without a client certificate.
pub(crate) fn connector(ca: &Authority, identity: Option<&Issued>) -> Connector {
    let folder = tempfile::tempdir().unwrap();
    let identity = identity.map(|issued| {
        let (cert_file, key_file) = issued.write(folder.path(), "client");
        KeyPair { cert_file, key_file }
    });
    Connector::new(&Trust { ca_file: Some(ca.write(folder.path(), "ca")), identity }).unwrap()
}

/// Establishes a connection over which the server returns a byte plus one. Returns the certificate's expiry
/// and the TLS version, or the error, which can occur during or after the handshake.
async fn exchange_byte(
    acceptor: Acceptor,
    connector: &Connector,
    server: &str,
) -> Result<(Option<u64>, Option<&'static str>), TlsError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let Ok(mut stream) = acceptor.accept(stream).await else { return };
        if let Ok(byte) = stream.read_u8().await {
            stream.write_u8(byte + 1).await.unwrap();
            stream.flush().await.unwrap();
        }
    });
    let stream = within(TcpStream::connect(address)).await.unwrap();
    let connected = within(connector.connect(stream, server)).await;
    let outcome = match connected {
        Ok(mut stream) => {
            let exchange = async {
                stream.write_u8(41).await?;
                stream.flush().await?;
                stream.read_u8().await
            };
            match within(exchange).await {
                Ok(byte) => {
                    assert_eq!(byte, 42);
                    Ok((stream.certificate_expiry(), stream.version()))
                }
                Err(error) => Err(connector.explain(&error).unwrap_or_else(|| panic!("{error:?}"))),
            }
        }
        Err(error) => Err(error),
    };
    within(serving).await.unwrap();
    outcome
}

async fn refusal(acceptor: Acceptor, connector: &Connector, server: &str) -> (Cause, String) {
    let error = exchange_byte(acceptor, connector, server).await.unwrap_err();
    (error.cause, error.what)
}

#[tokio::test]
async fn server_signed_by_the_ca_is_accepted_by_name_and_by_address() {
    let ca = Authority::new("ours");
    let issued = ca.issue(&["ams-1", "127.0.0.1", "::1"], Validity::Current);
    let connector = connector(&ca, None);
    for name in ["ams-1", "127.0.0.1", "::1"] {
        let negotiated = exchange_byte(acceptor(&web(&issued)), &connector, name).await.unwrap();
        assert_eq!(negotiated, (Some(VALID_UNTIL), Some("TLSv1_3")), "{name}");
    }
    let old = WebTls { max_version: TlsVersion::Tls12, ..web(&issued) };
    assert_eq!(exchange_byte(acceptor(&old), &connector, "ams-1").await.unwrap().1, Some("TLSv1_2"));
    assert_eq!(acceptor(&web(&issued)).certificate_expiry(), Some(VALID_UNTIL));
}

#[tokio::test]
async fn each_reason_to_reject_a_server_has_its_own_message() {
    let (ca, other) = (Authority::new("ours"), Authority::new("others"));
    let connector = connector(&ca, None);
    let serving = |ca: &Authority, valid| acceptor(&web(&ca.issue(&["ams-1"], valid)));

    let (cause, what) = refusal(serving(&ca, Validity::Current), &connector, "fra-1").await;
    assert_eq!(cause, Cause::WrongName);
    assert_eq!(
        what,
        "certificate is not valid for fra-1 (valid for ams-1); \
         set tls.server_name to a name of the certificate, or issue one for this name"
    );
    let (cause, what) = refusal(serving(&ca, Validity::Expired), &connector, "ams-1").await;
    assert_eq!(cause, Cause::Expired);
    assert!(
        what.starts_with("certificate expired ")
            && what.ends_with("d ago; renew it, or correct the clock of this host")
    );
    let (cause, what) = refusal(serving(&ca, Validity::NotYet), &connector, "ams-1").await;
    assert_eq!(cause, Cause::NotYetValid);
    assert!(
        what.starts_with("certificate is not valid until ")
            && what.ends_with("d from now; check the clock of this host")
    );
    assert_eq!(
        refusal(serving(&other, Validity::Current), &connector, "ams-1").await,
        (
            Cause::UnknownIssuer,
            "certificate is signed by an unknown CA; set tls.ca_file to its CA".to_owned()
        )
    );
    assert_eq!(
        refusal(serving(&ca, Validity::Current), &connector, "two words").await.1,
        "two words is not a valid server name; use a DNS name or an IP address"
    );
}

#[tokio::test]
async fn missing_or_wrong_client_certificate_is_reported_in_both_tls_versions() {
    let (ca, other) = (Authority::new("ours"), Authority::new("others"));
    let server = ca.issue(&["ams-1"], Validity::Current);
    let [ours, theirs] = [&ca, &other].map(|ca| ca.issue(&["client-1"], Validity::Current));
    for max_version in [TlsVersion::Tls12, TlsVersion::Tls13] {
        let verified = |names: &[&str]| ClientVerification::Verified {
            ca: Pem::Text(ca.pem()),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let serving = |clients| acceptor(&WebTls { clients, max_version, ..web(&server) });
        let cause = async |clients, identity| {
            let error = exchange_byte(serving(clients), &connector(&ca, identity), "ams-1").await.err();
            error.map(|error| error.cause)
        };
        assert_eq!(
            cause(verified(&[]), None).await,
            Some(Cause::ClientCertificateRequired),
            "{max_version:?}"
        );
        assert_eq!(
            cause(verified(&[]), Some(&theirs)).await,
            Some(Cause::ClientCertificateRefused),
            "{max_version:?}"
        );
        assert_eq!(cause(verified(&[]), Some(&ours)).await, None, "{max_version:?}");
        assert_eq!(cause(verified(&["x", "client-1"]), Some(&ours)).await, None, "{max_version:?}");
        assert_eq!(cause(verified(&["x"]), Some(&ours)).await, Some(Cause::ClientCertificateRefused));

        let if_given = || ClientVerification::VerifiedIfGiven(Pem::Text(ca.pem()));
        assert_eq!(cause(if_given(), None).await, None);
        assert_eq!(cause(if_given(), Some(&ours)).await, None);
        assert_eq!(cause(if_given(), Some(&theirs)).await, Some(Cause::ClientCertificateRefused));
    }
}

#[tokio::test]
async fn port_without_tls_is_distinguished_from_a_closed_connection() {
    let ca = Authority::new("ours");
    let connector = connector(&ca, None);
    for (sent, cause) in [(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], Cause::NotTls), (b"", Cause::Io)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(sent).await.unwrap();
            stream.shutdown().await.unwrap();
            // Unread data would reset the connection.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        let stream = within(TcpStream::connect(address)).await.unwrap();
        let error = within(connector.connect(stream, "ams-1")).await.unwrap_err();
        assert_eq!(error.cause, cause, "{error}");
        within(serving).await.unwrap();
    }
}

#[tokio::test]
async fn clones_of_a_connector_share_its_configuration() {
    let (ca, other) = (Authority::new("ours"), Authority::new("others"));
    let serving = || acceptor(&web(&other.issue(&["ams-1"], Validity::Current)));
    let first = connector(&ca, None);
    let clone = first.clone();
    assert_eq!(refusal(serving(), &clone, "ams-1").await.0, Cause::UnknownIssuer);
    first.follow(&connector(&other, None));
    exchange_byte(serving(), &clone, "ams-1").await.unwrap();
    assert!(first == clone && first != connector(&other, None));
}

/// Returns the error message for a certificate and a key file.
fn error_message(folder: &Path, certificate: &str, key: &str) -> String {
    fs::write(folder.join("a.pem"), certificate).unwrap();
    fs::write(folder.join("a.key"), key).unwrap();
    let pair = KeyPair { cert_file: folder.join("a.pem"), key_file: folder.join("a.key") };
    let trust = Trust { ca_file: Some(folder.join("ca.pem")), identity: Some(pair) };
    let error = Connector::new(&trust).unwrap_err();
    error.to_string().replace(&format!("{}/", folder.display()), "")
}

#[test]
fn unusable_file_is_reported_by_name_with_a_remedy() {
    let folder = TempDir::new().unwrap();
    let ca = Authority::new("ours");
    ca.write(folder.path(), "ca");
    let [one, two] = [(); 2].map(|()| ca.issue(&["a"], Validity::Current));
    let error_message = |certificate, key| error_message(folder.path(), certificate, key);
    assert_eq!(
        error_message(&one.certificate, &two.key),
        "key file a.key does not match certificate file a.pem"
    );
    assert_eq!(
        error_message(&one.key, &one.key),
        "certificate file a.pem contains no certificate; expected -----BEGIN CERTIFICATE-----"
    );
    assert_eq!(
        error_message(&one.certificate, ""),
        "key file a.key contains no private key; expected -----BEGIN PRIVATE KEY-----"
    );
    assert_eq!(
        error_message(
            &one.certificate,
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAo=\n-----END ENCRYPTED PRIVATE KEY-----\n"
        ),
        "key file a.key is encrypted; remove the passphrase with openssl pkey -in KEY -out PLAIN_KEY"
    );
    let broken = one.certificate.replace("-----END", "----END");
    assert!(
        error_message(&broken, &one.key).starts_with("certificate file a.pem is not valid PEM: "),
        "{}",
        error_message(&broken, &one.key)
    );
    fs::remove_file(folder.path().join("ca.pem")).unwrap();
    assert_eq!(
        error_message(&one.certificate, &one.key),
        "reading ca.pem: No such file or directory (os error 2)"
    );
}
