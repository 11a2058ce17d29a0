//! The loaded web config file: TLS, users and response headers of the HTTP port.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::basic::Users;
use crate::config::web;
use crate::tls::{Acceptor, FileError, WatchedFiles};

/// Settings of the HTTP port. The default is plain HTTP without authentication.
#[derive(Debug, Clone, Default)]
pub struct LoadedWebConfig {
    /// Accepts TLS connections; `None` uses plain HTTP.
    pub acceptor: Option<Acceptor>,
    /// Users allowed to access the port; `None` allows everyone.
    pub users: Option<Users>,
    /// Headers added to every response.
    pub headers: HeaderMap,
    /// Warnings about likely mistakes in the file.
    pub warnings: Vec<String>,
}

impl LoadedWebConfig {
    /// Reads a web config file and the files to which it refers.
    ///
    /// # Errors
    /// [`FileError`] with all problems of the file, or with the first referenced file that cannot be used.
    pub fn read(path: &Path, files: &mut WatchedFiles) -> Result<Self, FileError> {
        let text = files.read(path)?;
        let file = path.display().to_string();
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        let loaded =
            web::load(&text, folder).map_err(|problems| FileError::Web { file: file.clone(), problems })?;
        let config = loaded.config;
        let header = |(name, value): &(&'static str, String)| {
            let value = HeaderValue::from_str(value).expect("the configuration allows only ASCII");
            (HeaderName::from_bytes(name.as_bytes()).expect("the names are valid constants"), value)
        };
        let acceptor = config.tls.as_ref().map(|tls| Acceptor::read(tls, files)).transpose()?;
        let mut warnings: Vec<String> =
            loaded.warnings.iter().map(|warning| format!("{file}: {warning}")).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if acceptor.as_ref().and_then(Acceptor::certificate_expiry).is_some_and(|expiry| expiry < now) {
            warnings
                .push(format!("{file}: certificate has expired and will be rejected by clients; renew it"));
        }
        Ok(Self {
            acceptor,
            users: (!config.users.is_empty()).then(|| Users::new(config.users)),
            headers: config.headers.iter().map(header).collect(),
            warnings,
        })
    }
}
