//! Certificates and keys, from files.

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

/// A text in PEM, and what it is called in an error.
pub(super) struct Text {
    bytes: Vec<u8>,
    what: String,
}

impl Text {
    /// What a file holds; `what` says what it should be.
    pub(super) fn of_file(path: &Path, what: &str, shelf: &mut WatchedFiles) -> Result<Self, FileError> {
        Ok(Self { bytes: shelf.read(path)?, what: format!("the {what} file {}", path.display()) })
    }

    pub(super) fn read(pem: &Pem, what: &str, shelf: &mut WatchedFiles) -> Result<Self, FileError> {
        match pem {
            Pem::File(path) => Self::of_file(path, what, shelf),
            Pem::Text(text) => Ok(Self {
                bytes: text.clone().into_bytes(),
                what: format!("the {what} in the web config file"),
            }),
        }
    }

    fn unusable(&self, problem: impl Into<String>) -> FileError {
        FileError::Unusable { what: self.what.clone(), problem: problem.into() }
    }

    /// All its certificates, one at least.
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, FileError> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.bytes).collect();
        match read {
            Ok(certificates) if certificates.is_empty() => {
                Err(self.unusable("holds no certificate: it begins with -----BEGIN CERTIFICATE-----"))
            }
            Ok(certificates) => Ok(certificates),
            Err(error) => Err(self.unusable(format!("is no PEM: {error}"))),
        }
    }

    /// Its certificates, as those that are believed.
    pub(super) fn roots(&self) -> Result<Arc<RootCertStore>, FileError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots
                .add(certificate)
                .map_err(|error| self.unusable(format!("holds no CA certificate: {error}")))?;
        }
        Ok(Arc::new(roots))
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, FileError> {
        PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|_| {
            let is_encrypted = self.bytes.windows(9).any(|word| word == b"ENCRYPTED");
            self.unusable(match is_encrypted {
                true => "is encrypted: take the passphrase off, openssl pkey -in KEY -out PLAIN_KEY",
                false => "holds no private key: it begins with -----BEGIN PRIVATE KEY-----",
            })
        })
    }
}

/// A certificate with its key, which belong together.
pub(super) fn pair(certificate: &Text, key: &Text) -> Result<CertifiedKey, FileError> {
    let chain = certificate.certificates()?;
    CertifiedKey::from_der(chain, key.key()?, &provider()).map_err(|error| {
        let is_anothers = matches!(error, rustls::Error::InconsistentKeys(_));
        key.unusable(match is_anothers {
            true => format!("is not the key of {}", certificate.what),
            false => format!("cannot be used with {}: {error}", certificate.what),
        })
    })
}
