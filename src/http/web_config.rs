//! How the HTTP port is served, by the web config file: with TLS or without, to whom, and under which headers.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::basic::Users;
use crate::config::web;
use crate::tls::{Acceptor, FileError, WatchedFiles};

/// How the port is served. The default is plain, and for everyone.
#[derive(Debug, Clone, Default)]
pub struct LoadedWebConfig {
    /// Takes connections with TLS; `None`: without.
    pub acceptor: Option<Acceptor>,
    /// Who may ask; `None`: everyone.
    pub users: Option<Users>,
    /// Headers of every answer.
    pub headers: HeaderMap,
    /// What in the file is probably not meant.
    pub warnings: Vec<String>,
}

impl LoadedWebConfig {
    /// Reads a web config file and the files that it names.
    ///
    /// # Errors
    /// [`FileError`] with all problems of the file at once, or with the first file that cannot be used.
    pub fn read(path: &Path, shelf: &mut WatchedFiles) -> Result<Self, FileError> {
        let text = shelf.read(path)?;
        let file = path.display().to_string();
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        let loaded =
            web::load(&text, folder).map_err(|problems| FileError::Web { file: file.clone(), problems })?;
        let config = loaded.config;
        let header = |(name, value): &(&'static str, String)| {
            let value = HeaderValue::from_str(value).expect("the file's reader takes ASCII only");
            (HeaderName::from_bytes(name.as_bytes()).expect("the names are constants"), value)
        };
        let acceptor = config.tls.as_ref().map(|tls| Acceptor::read(tls, shelf)).transpose()?;
        let mut warnings: Vec<String> =
            loaded.warnings.iter().map(|warning| format!("{file}: {warning}")).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if acceptor.as_ref().and_then(Acceptor::certificate_expiry).is_some_and(|expiry| expiry < now) {
            warnings.push(format!("{file}: the certificate has expired: nobody will believe it; renew it"));
        }
        Ok(Self {
            acceptor,
            users: (!config.users.is_empty()).then(|| Users::new(config.users)),
            headers: config.headers.iter().map(header).collect(),
            warnings,
        })
    }
}
