//! Reads the keys for TLS.

use super::reader::{MappingReader, Setting};
use super::values::{host, path};
use super::{Https, KeyPair, Tls, Trust};

/// The TLS parameters for hosts whose names are not known yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsTemplate {
    /// The trusted CAs and the client certificate.
    pub trust: Trust,
    /// The name in the certificates of all hosts; `None`: each has that of its host.
    pub server_name: Option<String>,
}

impl TlsTemplate {
    /// The TLS parameters for one host.
    #[must_use]
    pub fn for_host(&self, host: &str) -> Https {
        let server_name = self.server_name.clone().unwrap_or_else(|| host.to_owned());
        Https { trust: self.trust.clone(), server_name }
    }
}

/// The problem of a key that requires TLS in a build without it.
pub(super) const NO_TLS: &str = "this build does not support TLS";
pub(super) const NO_TLS_REMEDY: &str = "build with the default feature `tls`, or remove the key";

pub(super) fn tls(section: &mut MappingReader<'_, '_>) -> Option<Tls> {
    let web_config_file = section.key("web_config_file", path).optional();
    let client = trust(section);
    Some(Tls { web_config_file: web_config_file?, client: client? })
}

/// Reads the TLS parameters of a peer, `Some(None)` for plain HTTP. `default` applies to what its section
/// `tls` does not have.
pub(super) fn peer_https(
    section: &mut MappingReader<'_, '_>,
    address: Option<&str>,
    default: &Trust,
) -> Option<Option<Https>> {
    let scheme = section.key("scheme", |value| value.one_of(&[("http", false), ("https", true)]));
    https_for("scheme", section, scheme.or(false)?, address, default)
}

/// Reads the TLS parameters of a host; `Some(None)` without TLS. `key` is the key that decides on TLS,
/// `is_secure` its value.
pub(super) fn https_for(
    key: &'static str,
    section: &mut MappingReader<'_, '_>,
    is_secure: bool,
    address: Option<&str>,
    default: &Trust,
) -> Option<Option<Https>> {
    match tls_template(key, section, is_secure, default)? {
        None => Some(None),
        Some(template) => {
            let server_name = template.server_name.or_else(|| address.map(str::to_owned))?;
            Some(Some(Https { trust: template.trust, server_name }))
        }
    }
}

/// Like [`https_for`], for hosts whose addresses are not known yet.
pub(super) fn tls_template(
    key: &'static str,
    section: &mut MappingReader<'_, '_>,
    is_secure: bool,
    default: &Trust,
) -> Option<Option<TlsTemplate>> {
    let given = section.key("tls", |value| value.section(tls_section));
    if is_secure && !cfg!(feature = "tls") {
        return section.reject(key, NO_TLS, NO_TLS_REMEDY);
    }
    let (own, server_name) = match given {
        Setting::Invalid => return None,
        Setting::Given(_) if !is_secure && key == "scheme" => {
            let remedy = "write scheme: https, or remove it";
            return section.reject("tls", "has no effect with scheme: http", remedy);
        }
        Setting::Given(_) if !is_secure => {
            let what = if section.has("url") {
                "has no effect with this url, which does not use TLS"
            } else {
                "has no effect without a url"
            };
            return section.reject(
                "tls",
                what,
                "write a url that begins with https:// or wss://, or remove it",
            );
        }
        Setting::Given(given) => given,
        Setting::Absent => (Trust::default(), None),
    };
    if !is_secure {
        return Some(None);
    }
    let trust = Trust {
        ca_file: own.ca_file.or_else(|| default.ca_file.clone()),
        identity: own.identity.or_else(|| default.identity.clone()),
    };
    Some(Some(TlsTemplate { trust, server_name }))
}

fn tls_section(section: &mut MappingReader<'_, '_>) -> Option<(Trust, Option<String>)> {
    let trust = trust(section);
    let server_name = section.key("server_name", host).optional();
    Some((trust?, server_name?))
}

fn trust(section: &mut MappingReader<'_, '_>) -> Option<Trust> {
    let ca_file = section.key("ca_file", path).optional();
    let cert_file = section.key("cert_file", path).optional();
    let key_file = section.key("key_file", path).optional();
    let identity = match (cert_file?, key_file?) {
        (Some(cert_file), Some(key_file)) => Some(KeyPair { cert_file, key_file }),
        (None, None) => None,
        (Some(_), None) => {
            return section.reject("key_file", "missing", "cert_file requires the file with its private key");
        }
        (None, Some(_)) => {
            return section.reject("cert_file", "missing", "key_file requires the file with its certificate");
        }
    };
    let trust = Trust { ca_file: ca_file?, identity };
    if !cfg!(feature = "tls") && trust != Trust::default() {
        let key = if trust.ca_file.is_some() { "ca_file" } else { "cert_file" };
        return section.reject(key, NO_TLS, NO_TLS_REMEDY);
    }
    Some(trust)
}
