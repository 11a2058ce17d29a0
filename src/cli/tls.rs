//! The `--tls-…` options.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use crate::config::{Https, KeyPair, Trust};
use crate::http::client::TlsClient;
use crate::settings::SettingsError;
use crate::tls::Connector;

/// How a command connects with TLS. Each option overrides the configuration.
#[derive(Debug, Clone, Args)]
pub(super) struct TlsArguments {
    /// CA certificates (PEM) to trust, instead of those of the system
    #[arg(long, value_name = "FILE")]
    tls_ca_file: Option<PathBuf>,
    /// Client certificate (PEM), if the server requires one
    #[arg(long, value_name = "FILE", requires = "tls_key_file")]
    tls_cert_file: Option<PathBuf>,
    /// Private key (PEM) of the client certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    tls_key_file: Option<PathBuf>,
    /// Name in the server certificate, if it is not the host
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
}

impl TlsArguments {
    /// Returns `https` with the values that these options override.
    pub(super) fn replace(&self, https: Https) -> Https {
        let identity = self.tls_cert_file.clone().zip(self.tls_key_file.clone());
        let identity = identity.map(|(cert_file, key_file)| KeyPair { cert_file, key_file });
        let trust = Trust {
            ca_file: self.tls_ca_file.clone().or(https.trust.ca_file),
            identity: identity.or(https.trust.identity),
        };
        Https { trust, server_name: self.tls_server_name.clone().unwrap_or(https.server_name) }
    }

    /// Like [`replace`](Self::replace), with the files read.
    ///
    /// # Errors
    /// If a file cannot be used.
    pub(super) fn secure(&self, https: Https) -> Result<TlsClient, SettingsError> {
        let Https { trust, server_name } = self.replace(https);
        Ok(TlsClient { connector: Connector::new(&trust)?, server_name })
    }

    /// Rejects these options for a `target` without TLS.
    ///
    /// # Errors
    /// If one of them was given.
    pub(super) fn refuse(&self, target: &str) -> anyhow::Result<()> {
        let Self { tls_ca_file, tls_cert_file, tls_key_file, tls_server_name } = self;
        let files = [tls_ca_file, tls_cert_file, tls_key_file];
        if files.iter().any(|file| file.is_some()) || tls_server_name.is_some() {
            bail!(
                "{target} is not reached over TLS: the --tls-… options require https://HOST, or a peer with \
                 scheme: https"
            );
        }
        Ok(())
    }
}

/// Splits off the prefix `http://` or `https://`. Returns whether it is `https://`, and the rest.
pub(super) fn scheme(target: &str) -> (bool, &str) {
    let (is_https, rest) = match target.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, target.strip_prefix("http://").unwrap_or(target)),
    };
    // Browsers add this slash.
    (is_https, rest.strip_suffix('/').unwrap_or(rest))
}

/// Parses `ADDRESS:PORT` with an optional scheme.
pub(super) fn address(text: &str) -> Result<(bool, SocketAddr), String> {
    let (is_https, address) = scheme(text);
    let address = address
        .parse()
        .map_err(|_| format!("{address:?} is not an address and a port, such as 192.0.2.1:9862"))?;
    Ok((is_https, address))
}
