//! Our side of connections that we make.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::{Resumption, WebPkiServerVerifier};
use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
use tokio_rustls::rustls::sign::SingleCertAndKey;
use tokio_rustls::rustls::{
    AlertDescription, CertificateError, ClientConfig, Error as RustlsError, RootCertStore,
};

use super::pem::{self, Text};
use super::stream::TlsStream;
use super::{ALPN, Cause, FileError, TlsError, Trust, WatchedFiles};

/// Makes connections to servers that can be believed. Clones share what is in force.
#[derive(Clone)]
pub struct Connector {
    shared: Arc<ArcSwap<ConnectorConfig>>,
}

/// How connections are made.
struct ConnectorConfig {
    config: Arc<ClientConfig>,
    has_identity: bool,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("has_identity", &self.shared.load().has_identity).finish()
    }
}

impl PartialEq for Connector {
    /// Whether one is a clone of the other.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Connector {
    /// Reads the files that are named, and the system's CA certificates where no CA is.
    ///
    /// # Errors
    /// [`FileError`] names the file.
    pub fn new(trust: &Trust) -> Result<Self, FileError> {
        Self::read(trust, &mut WatchedFiles::default())
    }

    /// The same through a shelf. The system's certificates do not stand in it.
    ///
    /// # Errors
    /// [`FileError`] names the file.
    pub fn read(trust: &Trust, shelf: &mut WatchedFiles) -> Result<Self, FileError> {
        let roots = match &trust.ca_file {
            Some(path) => Text::of_file(path, "CA", shelf)?.roots()?,
            None => system_roots()?,
        };
        let identity = match &trust.identity {
            Some(pair) => {
                let certificate = Text::of_file(&pair.cert_file, "certificate", shelf)?;
                let key = Text::of_file(&pair.key_file, "key", shelf)?;
                Some(pem::pair(&certificate, &key)?)
            }
            None => None,
        };
        let unusable = |problem: String| FileError::Unusable { what: "the CA".to_owned(), problem };
        let provider = Arc::new(pem::provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(format!("cannot verify anybody: {error}")))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(error.to_string()))?
            .with_webpki_verifier(verifier);
        let has_identity = identity.is_some();
        let mut config = match identity {
            Some(pair) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair))),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let terms = ConnectorConfig { config: Arc::new(config), has_identity };
        Ok(Self { shared: Arc::new(ArcSwap::from_pointee(terms)) })
    }

    /// From now on this and all its clones connect as `other` does at this moment.
    pub fn follow(&self, other: &Self) {
        self.shared.store(other.shared.load_full());
    }

    /// Shakes hands with `server`, a DNS name or an IP address that its certificate must have.
    ///
    /// # Errors
    /// [`TlsError`] with a sentence. There is no deadline: that is the caller's.
    pub async fn connect<S>(&self, stream: S, server: &str) -> Result<TlsStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let name = ServerName::try_from(server.to_owned()).map_err(|_| TlsError {
            cause: Cause::WrongName,
            what: format!(
                "{server} is no name that a certificate can have; write a DNS name or an IP address"
            ),
        })?;
        let terms = self.shared.load_full();
        match TlsConnector::from(Arc::clone(&terms.config)).connect(name, stream).await {
            Ok(stream) => Ok(TlsStream(stream.into())),
            Err(error) => Err(match rustls_error(&error) {
                Some(error) => explained(error, terms.has_identity),
                None => TlsError { cause: Cause::Io, what: format!("shaking hands: {error}") },
            }),
        }
    }

    /// The reason of TLS in the causes of an error that came from a stream of ours; `None`: there is none.
    #[must_use]
    pub fn explain(&self, error: &(dyn Error + 'static)) -> Option<TlsError> {
        let mut chain = std::iter::successors(Some(error), |error| (*error).source());
        let found = chain.find_map(|error| rustls_error(error.downcast_ref::<io::Error>()?))?;
        Some(explained(found, self.shared.load().has_identity))
    }
}

fn system_roots() -> Result<Arc<RootCertStore>, FileError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
        return Err(FileError::NoSystemRoots { why });
    }
    Ok(Arc::new(roots))
}

fn rustls_error(error: &io::Error) -> Option<&RustlsError> {
    error.get_ref()?.downcast_ref()
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors; the others have no sentence of their own"
)]
fn explained(error: &RustlsError, has_identity: bool) -> TlsError {
    let (cause, what) = match error {
        RustlsError::InvalidCertificate(error) => judged(error),
        RustlsError::AlertReceived(alert) => refused(*alert, has_identity),
        RustlsError::InvalidMessage(_) => (
            Cause::NotTls,
            "what came back is not TLS; does the port speak plain HTTP? then write http".to_owned(),
        ),
        RustlsError::PeerIncompatible(why) => {
            (Cause::Protocol, format!("the server and we have nothing in common that is safe ({why:?})"))
        }
        other => (Cause::Protocol, other.to_string()),
    };
    TlsError { cause, what }
}

/// What is wrong with a server's certificate.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors; the others have no sentence of their own"
)]
fn judged(error: &CertificateError) -> (Cause, String) {
    match error {
        CertificateError::Expired => (Cause::Expired, format!("the certificate has expired; {RENEW}")),
        CertificateError::ExpiredContext { time, not_after } => {
            let ago = between(*not_after, *time);
            (Cause::Expired, format!("the certificate expired {ago} ago; {RENEW}"))
        }
        CertificateError::NotValidYet => {
            (Cause::NotYetValid, format!("the certificate is not valid yet; {CLOCK}"))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let ahead = between(*time, *not_before);
            (Cause::NotYetValid, format!("the certificate is not valid before {ahead} from now; {CLOCK}"))
        }
        CertificateError::UnknownIssuer => (
            Cause::UnknownIssuer,
            "nobody whom we trust signed the certificate; give the CA that did as tls.ca_file".to_owned(),
        ),
        CertificateError::NotValidForName => {
            (Cause::WrongName, format!("the certificate is for other names; {RENAME}"))
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            // The library writes DnsName("ams-1") and IpAddress(192.0.2.1).
            let plain = |name: &String| match name.split_once('(') {
                Some((_, name)) => name.trim_end_matches(')').trim_matches('"').to_owned(),
                None => name.clone(),
            };
            let names: Vec<String> = presented.iter().take(NAMES_SHOWN).map(plain).collect();
            let is_for = match names.is_empty() {
                true => "it is for no name".to_owned(),
                false => format!("it is for {}", names.join(", ")),
            };
            (Cause::WrongName, format!("the certificate is not valid for {expected} ({is_for}); {RENAME}"))
        }
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => (
            Cause::BadCertificate,
            "the certificate is a CA's; give the server one that a CA signed, with CA:FALSE".to_owned(),
        ),
        other => (Cause::BadCertificate, format!("the certificate cannot be used: {other}")),
    }
}

/// Names of a certificate that are shown. Chosen: those of a wildcard farm would fill a page.
const NAMES_SHOWN: usize = 8;

const RENEW: &str = "renew it, or set our clock right";
const CLOCK: &str = "is our clock right?";
const RENAME: &str = "give it the name, or say with tls.server_name which one it has";

/// Why a server refused us.
fn refused(alert: AlertDescription, has_identity: bool) -> (Cause, String) {
    use AlertDescription as A;
    let is_about_us = matches!(
        alert,
        A::CertificateRequired
            | A::NoCertificate
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied
    );
    match (is_about_us, has_identity) {
        (true, false) => (
            Cause::ClientCertificateRequired,
            "the server wants a client certificate; give one as tls.cert_file and tls.key_file".to_owned(),
        ),
        (true, true) => (
            Cause::ClientCertificateRefused,
            format!(
                "the server did not take our client certificate ({alert:?}); has its CA signed it, and is it valid?"
            ),
        ),
        (false, _) if alert == A::ProtocolVersion => {
            (Cause::Protocol, "the server speaks neither TLS 1.2 nor 1.3".to_owned())
        }
        (false, _) => (Cause::Protocol, format!("the server refused the handshake ({alert:?})")),
    }
}

fn between(from: UnixTime, to: UnixTime) -> String {
    let seconds = to.as_secs().saturating_sub(from.as_secs());
    // To the largest unit that is there at all.
    let unit = [86_400, 3_600, 60].into_iter().find(|unit| seconds >= *unit).unwrap_or(1);
    match unit {
        86_400 => format!("{}d", seconds / unit),
        unit => crate::config::units::display(Duration::from_secs(seconds - seconds % unit)),
    }
}
