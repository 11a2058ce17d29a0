//! Server side: accepts TLS connections.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::{CryptoProvider, SupportedKxGroup, ring};
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::server::{NoClientAuth, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::SingleCertAndKey;
use tokio_rustls::rustls::{
    self, CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme, SupportedCipherSuite, SupportedProtocolVersion, version,
};

use super::pem::{self, Text};
use super::stream::TlsStream;
use super::{ALPN, FileError, WatchedFiles, certificate};
use crate::config::web::{ClientVerification, Curve, Suite, TlsVersion, WebTls};

/// Accepts TLS connections with one server certificate. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    expiry: Option<u64>,
}

impl Acceptor {
    /// Reads the certificate, key and CA files of a web config file.
    ///
    /// # Errors
    /// [`FileError`] names the file.
    pub fn read(web: &WebTls, files: &mut WatchedFiles) -> Result<Self, FileError> {
        let certificate = Text::read(&web.certificate, "certificate", files)?;
        let key = Text::read(&web.key, "key", files)?;
        let pair = pem::pair(&certificate, &key)?;
        let expiry = pair.cert.first().and_then(certificate::expiry);
        let provider = Arc::new(provider(web));
        let clients = verifier(&web.clients, &provider, files)?;
        let unusable = |error: rustls::Error| FileError::Unusable {
            what: "tls_server_config".to_owned(),
            problem: format!("cannot be used: {error}"),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions(web))
            .map_err(unusable)?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)));
        config.ignore_client_order = web.prefer_server_suites;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { config: Arc::new(config), expiry })
    }

    /// Performs the handshake. A rejected client receives a TLS alert with the reason.
    ///
    /// # Errors
    /// The error of the TLS library or of the connection. There is no deadline.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        match TlsAcceptor::from(Arc::clone(&self.config)).accept(stream).into_fallible().await {
            Ok(stream) => Ok(TlsStream(stream.into())),
            Err((error, stream)) => {
                linger(stream).await;
                Err(error)
            }
        }
    }

    /// Returns the expiry of the server certificate in seconds since the Unix epoch; `None` if it cannot be
    /// parsed.
    #[must_use]
    pub fn certificate_expiry(&self) -> Option<u64> {
        self.expiry
    }
}

/// Maximum number of bytes read from a rejected client. Chosen: more than a request that it sent without
/// waiting.
const LINGER_BYTES: u64 = 64 * 1024;

/// Lets the client read the alert: closing with unread data would reset the connection and discard the alert.
async fn linger(mut stream: TcpStream) {
    if stream.shutdown().await.is_ok() {
        let _ = tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await;
    }
}

fn provider(web: &WebTls) -> CryptoProvider {
    let mut provider = pem::provider();
    if let Some(suites) = &web.suites {
        let of_tls13 = provider.cipher_suites.iter().filter(|suite| suite.tls13().is_some()).copied();
        provider.cipher_suites = of_tls13.chain(suites.iter().map(|suite| suite_of(*suite))).collect();
    }
    if !web.curves.is_empty() {
        provider.kx_groups = web.curves.iter().map(|curve| group_of(*curve)).collect();
    }
    provider
}

fn suite_of(suite: Suite) -> SupportedCipherSuite {
    use ring::cipher_suite as rustls_suite;
    match suite {
        Suite::EcdsaAes128 => rustls_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        Suite::EcdsaAes256 => rustls_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        Suite::EcdsaChacha20 => rustls_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        Suite::RsaAes128 => rustls_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        Suite::RsaAes256 => rustls_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        Suite::RsaChacha20 => rustls_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    }
}

fn group_of(curve: Curve) -> &'static dyn SupportedKxGroup {
    match curve {
        Curve::X25519 => ring::kx_group::X25519,
        Curve::P256 => ring::kx_group::SECP256R1,
        Curve::P384 => ring::kx_group::SECP384R1,
    }
}

fn versions(web: &WebTls) -> Vec<&'static SupportedProtocolVersion> {
    let all = [(TlsVersion::Tls13, &version::TLS13), (TlsVersion::Tls12, &version::TLS12)];
    let allowed = web.min_version..=web.max_version;
    all.into_iter().filter(|(name, _)| allowed.contains(name)).map(|(_, version)| version).collect()
}

fn verifier(
    clients: &ClientVerification,
    provider: &Arc<CryptoProvider>,
    files: &mut WatchedFiles,
) -> Result<Arc<dyn ClientCertVerifier>, FileError> {
    let (ca, names) = match clients {
        ClientVerification::Everyone => return Ok(Arc::new(NoClientAuth)),
        ClientVerification::VerifiedIfGiven(ca) => (ca, None),
        ClientVerification::Verified { ca, names } => (ca, Some(names)),
    };
    let roots: Arc<RootCertStore> = Text::read(ca, "client CA", files)?.roots()?;
    let builder = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider));
    let builder = if names.is_none() { builder.allow_unauthenticated() } else { builder };
    let verifier = builder.build().map_err(|error| FileError::Unusable {
        what: "client CA".to_owned(),
        problem: format!("cannot be used for verification: {error}"),
    })?;
    match names {
        Some(names) if !names.is_empty() => {
            Ok(Arc::new(AllowedNamesVerifier { inner: verifier, names: names.clone() }))
        }
        Some(_) | None => Ok(verifier),
    }
}

/// Verifies that a client certificate is signed by the CA and valid for one of the allowed names.
#[derive(Debug)]
struct AllowedNamesVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    names: Vec<String>,
}

impl ClientCertVerifier for AllowedNamesVerifier {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        if certificate::names(end_entity).iter().any(|name| self.names.contains(name)) {
            return Ok(verified);
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
