//! Client side: establishes TLS connections.

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

/// Establishes TLS connections to verified servers. Clones share the current configuration.
#[derive(Clone)]
pub struct Connector {
    shared: Arc<ArcSwap<ConnectorConfig>>,
}

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
    /// Returns whether one is a clone of the other.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Connector {
    /// Reads the configured files, and the system's CA certificates if no CA file is configured.
    ///
    /// # Errors
    /// [`FileError`] names the file.
    pub fn new(trust: &Trust) -> Result<Self, FileError> {
        Self::read(trust, &mut WatchedFiles::default())
    }

    /// Like [`Connector::new`], but registers the files in `files`. The system's CA certificates are not
    /// watched.
    ///
    /// # Errors
    /// [`FileError`] names the file.
    pub fn read(trust: &Trust, files: &mut WatchedFiles) -> Result<Self, FileError> {
        let roots = match &trust.ca_file {
            Some(path) => Text::of_file(path, "CA", files)?.roots()?,
            None => system_roots()?,
        };
        let identity = match &trust.identity {
            Some(pair) => {
                let certificate = Text::of_file(&pair.cert_file, "certificate", files)?;
                let key = Text::of_file(&pair.key_file, "key", files)?;
                Some(pem::pair(&certificate, &key)?)
            }
            None => None,
        };
        let unusable = |problem: String| FileError::Unusable { what: "CA".to_owned(), problem };
        let provider = Arc::new(pem::provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(format!("cannot be used for verification: {error}")))?;
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
        let config = ConnectorConfig { config: Arc::new(config), has_identity };
        Ok(Self { shared: Arc::new(ArcSwap::from_pointee(config)) })
    }

    /// Makes this connector and all its clones use the current configuration of `other`.
    pub fn follow(&self, other: &Self) {
        self.shared.store(other.shared.load_full());
    }

    /// Performs the handshake with `server`, a DNS name or an IP address for which its certificate must be
    /// valid.
    ///
    /// # Errors
    /// [`TlsError`] with a message for users. There is no deadline; the caller sets one.
    pub async fn connect<S>(&self, stream: S, server: &str) -> Result<TlsStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let name = ServerName::try_from(server.to_owned()).map_err(|_| TlsError {
            cause: Cause::WrongName,
            what: format!("{server} is not a valid server name; use a DNS name or an IP address"),
        })?;
        let config = self.shared.load_full();
        match TlsConnector::from(Arc::clone(&config.config)).connect(name, stream).await {
            Ok(stream) => Ok(TlsStream(stream.into())),
            Err(error) => Err(match rustls_error(&error) {
                Some(error) => explain_error(error, config.has_identity),
                None => TlsError { cause: Cause::Io, what: format!("handshake: {error}") },
            }),
        }
    }

    /// Finds the TLS error among the sources of an error of a stream; `None` if there is none.
    #[must_use]
    pub fn explain(&self, error: &(dyn Error + 'static)) -> Option<TlsError> {
        let mut chain = std::iter::successors(Some(error), |error| (*error).source());
        let found = chain.find_map(|error| rustls_error(error.downcast_ref::<io::Error>()?))?;
        Some(explain_error(found, self.shared.load().has_identity))
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

#[expect(clippy::wildcard_enum_match_arm, reason = "enum of a library; other errors use the library's text")]
fn explain_error(error: &RustlsError, has_identity: bool) -> TlsError {
    let (cause, what) = match error {
        RustlsError::InvalidCertificate(error) => explain_certificate_error(error),
        RustlsError::AlertReceived(alert) => explain_alert(*alert, has_identity),
        RustlsError::InvalidMessage(_) => {
            (Cause::NotTls, "the response is not TLS; if the port uses plain HTTP, use http".to_owned())
        }
        RustlsError::PeerIncompatible(why) => {
            (Cause::Protocol, format!("no TLS version or cipher suite in common with the server ({why:?})"))
        }
        other => (Cause::Protocol, other.to_string()),
    };
    TlsError { cause, what }
}

/// Explains why a server's certificate was rejected.
#[expect(clippy::wildcard_enum_match_arm, reason = "enum of a library; other errors use the library's text")]
fn explain_certificate_error(error: &CertificateError) -> (Cause, String) {
    match error {
        CertificateError::Expired => (Cause::Expired, format!("certificate has expired; {RENEW}")),
        CertificateError::ExpiredContext { time, not_after } => {
            let ago = duration_text(*not_after, *time);
            (Cause::Expired, format!("certificate expired {ago} ago; {RENEW}"))
        }
        CertificateError::NotValidYet => {
            (Cause::NotYetValid, format!("certificate is not valid yet; {CLOCK}"))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let ahead = duration_text(*time, *not_before);
            (Cause::NotYetValid, format!("certificate is not valid until {ahead} from now; {CLOCK}"))
        }
        CertificateError::UnknownIssuer => (
            Cause::UnknownIssuer,
            "certificate is signed by an unknown CA; set tls.ca_file to its CA".to_owned(),
        ),
        CertificateError::NotValidForName => {
            (Cause::WrongName, format!("certificate is for other names; {RENAME}"))
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            // The library writes DnsName("ams-1") and IpAddress(192.0.2.1).
            let plain = |name: &String| match name.split_once('(') {
                Some((_, name)) => name.trim_end_matches(')').trim_matches('"').to_owned(),
                None => name.clone(),
            };
            let names: Vec<String> = presented.iter().take(NAMES_SHOWN).map(plain).collect();
            let valid_for = match names.is_empty() {
                true => "it has no names".to_owned(),
                false => format!("valid for {}", names.join(", ")),
            };
            (Cause::WrongName, format!("certificate is not valid for {expected} ({valid_for}); {RENAME}"))
        }
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => (
            Cause::BadCertificate,
            "server uses a CA certificate; install a server certificate signed by a CA, with CA:FALSE"
                .to_owned(),
        ),
        other => (Cause::BadCertificate, format!("certificate cannot be used: {other}")),
    }
}

/// Maximum number of certificate names shown. Chosen: certificates of large hosting setups have hundreds.
const NAMES_SHOWN: usize = 8;

const RENEW: &str = "renew it, or correct the clock of this host";
const CLOCK: &str = "check the clock of this host";
const RENAME: &str = "set tls.server_name to a name of the certificate, or issue one for this name";

/// Explains an alert with which the server aborted the connection.
fn explain_alert(alert: AlertDescription, has_identity: bool) -> (Cause, String) {
    use AlertDescription as A;
    let is_about_client_certificate = matches!(
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
    match (is_about_client_certificate, has_identity) {
        (true, false) => (
            Cause::ClientCertificateRequired,
            "the server requires a client certificate; set tls.cert_file and tls.key_file".to_owned(),
        ),
        (true, true) => (
            Cause::ClientCertificateRefused,
            format!("the server rejected the client certificate ({alert:?}); check its validity and its CA"),
        ),
        (false, _) if alert == A::ProtocolVersion => {
            (Cause::Protocol, "the server supports neither TLS 1.2 nor 1.3".to_owned())
        }
        (false, _) => (Cause::Protocol, format!("the server aborted the handshake ({alert:?})")),
    }
}

fn duration_text(from: UnixTime, to: UnixTime) -> String {
    let seconds = to.as_secs().saturating_sub(from.as_secs());
    // Truncated to the largest unit that is not zero.
    let unit = [86_400, 3_600, 60].into_iter().find(|unit| seconds >= *unit).unwrap_or(1);
    match unit {
        86_400 => format!("{}d", seconds / unit),
        unit => crate::config::units::display(Duration::from_secs(seconds - seconds % unit)),
    }
}
