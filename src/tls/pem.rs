//! Certificates and keys in PEM files.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, RootCertStore};

use super::{FileError, WatchedFiles};
use crate::config::web::Pem;

pub(super) fn provider() -> CryptoProvider {
    ring::default_provider()
}

/// Contents of a PEM source, and its name in errors.
pub(super) struct Text {
    bytes: Vec<u8>,
    what: String,
}

impl Text {
    /// Reads a file; `what` is its expected contents, for errors.
    pub(super) fn of_file(path: &Path, what: &str, files: &mut WatchedFiles) -> Result<Self, FileError> {
        Ok(Self { bytes: files.read(path)?, what: format!("{what} file {}", path.display()) })
    }

    pub(super) fn read(pem: &Pem, what: &str, files: &mut WatchedFiles) -> Result<Self, FileError> {
        match pem {
            Pem::File(path) => Self::of_file(path, what, files),
            Pem::Text(text) => {
                Ok(Self { bytes: text.clone().into_bytes(), what: format!("{what} in the web config file") })
            }
        }
    }

    fn unusable(&self, problem: impl Into<String>) -> FileError {
        FileError::Unusable { what: self.what.clone(), problem: problem.into() }
    }

    /// Returns all certificates, at least one.
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, FileError> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.bytes).collect();
        match read {
            Ok(certificates) if certificates.is_empty() => {
                Err(self.unusable("contains no certificate; expected -----BEGIN CERTIFICATE-----"))
            }
            Ok(certificates) => Ok(certificates),
            Err(error) => Err(self.unusable(format!("is not valid PEM: {error}"))),
        }
    }

    /// Returns its certificates as trusted CAs.
    pub(super) fn roots(&self) -> Result<Arc<RootCertStore>, FileError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots
                .add(certificate)
                .map_err(|error| self.unusable(format!("contains an invalid CA certificate: {error}")))?;
        }
        Ok(Arc::new(roots))
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, FileError> {
        PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|_| {
            let is_encrypted = self.bytes.windows(9).any(|word| word == b"ENCRYPTED");
            self.unusable(match is_encrypted {
                true => "is encrypted; remove the passphrase with openssl pkey -in KEY -out PLAIN_KEY",
                false => "contains no private key; expected -----BEGIN PRIVATE KEY-----",
            })
        })
    }
}

/// Returns a certificate chain with its private key. Fails if they do not match.
pub(super) fn pair(certificate: &Text, key: &Text) -> Result<CertifiedKey, FileError> {
    let chain = certificate.certificates()?;
    CertifiedKey::from_der(chain, key.key()?, &provider()).map_err(|error| {
        let is_mismatch = matches!(error, rustls::Error::InconsistentKeys(_));
        key.unusable(match is_mismatch {
            true => format!("does not match {}", certificate.what),
            false => format!("cannot be used with {}: {error}", certificate.what),
        })
    })
}
