//! What a command is told about TLS.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use crate::config::{Https, KeyPair, Trust};
use crate::http::client::TlsClient;
use crate::settings::SettingsError;
use crate::tls::Connector;

/// How an agent is asked over HTTPS. Each wins over what a configuration says.
#[derive(Debug, Args)]
pub(super) struct TlsArguments {
    /// CA certificates (PEM) that may have signed the agent's, instead of the system's
    #[arg(long, value_name = "FILE")]
    tls_ca_file: Option<PathBuf>,
    /// Our certificate (PEM), if the agent wants one
    #[arg(long, value_name = "FILE", requires = "tls_key_file")]
    tls_cert_file: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    tls_key_file: Option<PathBuf>,
    /// The name that the agent's certificate has, if it is not the host's
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
}

impl TlsArguments {
    /// How a server is asked: these options replace what `https` says.
    pub(super) fn replace(&self, https: Https) -> Https {
        let given = self.tls_cert_file.clone().zip(self.tls_key_file.clone());
        let given = given.map(|(cert_file, key_file)| KeyPair { cert_file, key_file });
        let trust = Trust {
            ca_file: self.tls_ca_file.clone().or(https.trust.ca_file),
            identity: given.or(https.trust.identity),
        };
        Https { trust, server_name: self.tls_server_name.clone().unwrap_or(https.server_name) }
    }

    /// The same, ready to connect.
    ///
    /// # Errors
    /// A file cannot be used.
    pub(super) fn secure(&self, https: Https) -> Result<TlsClient, SettingsError> {
        let Https { trust, server_name } = self.replace(https);
        Ok(TlsClient { connector: Connector::new(&trust)?, server_name })
    }

    /// Refuses the options where `target` is asked without TLS.
    ///
    /// # Errors
    /// One of them was given.
    pub(super) fn refuse(&self, target: &str) -> anyhow::Result<()> {
        let Self { tls_ca_file, tls_cert_file, tls_key_file, tls_server_name } = self;
        let files = [tls_ca_file, tls_cert_file, tls_key_file];
        if files.iter().any(|file| file.is_some()) || tls_server_name.is_some() {
            bail!(
                "{target} is asked without TLS: the --tls-… options are for https://HOST, or a peer with \
                 scheme: https"
            );
        }
        Ok(())
    }
}

/// Whether a URL's scheme stands before it, and says TLS; and what is behind.
pub(super) fn scheme(target: &str) -> (bool, &str) {
    let (is_https, rest) = match target.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, target.strip_prefix("http://").unwrap_or(target)),
    };
    // What a browser adds.
    (is_https, rest.strip_suffix('/').unwrap_or(rest))
}

/// `ADDRESS:PORT` behind a scheme or none.
pub(super) fn address(text: &str) -> Result<(bool, SocketAddr), String> {
    let (is_https, address) = scheme(text);
    let address = address.parse().map_err(|_| format!("{address:?} is not an address and a port"))?;
    Ok((is_https, address))
}
