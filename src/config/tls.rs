//! The keys that are about TLS.

use super::reader::{MappingReader, Setting};
use super::values::{host, path};
use super::{Https, KeyPair, Tls, Trust};

/// How hosts are asked with TLS whose names are not known yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsTemplate {
    /// Whom we believe, and who we are.
    pub trust: Trust,
    /// The name that all their certificates have; `None`: each has its own.
    pub server_name: Option<String>,
}

impl TlsTemplate {
    /// The same for a host.
    #[must_use]
    pub fn for_host(&self, host: &str) -> Https {
        let server_name = self.server_name.clone().unwrap_or_else(|| host.to_owned());
        Https { trust: self.trust.clone(), server_name }
    }
}
/// What is said where this program cannot do what is asked.
pub(super) const NO_TLS: &str = "this build has no TLS";
pub(super) const NO_TLS_REMEDY: &str = "build it with the feature `tls`, a default one, or remove the key";

pub(super) fn tls(section: &mut MappingReader<'_, '_>) -> Option<Tls> {
    let web_config_file = section.key("web_config_file", path).optional();
    let client = trust(section);
    Some(Tls { web_config_file: web_config_file?, client: client? })
}

/// How a peer is asked, `Some(None)` for plain HTTP. What its own section leaves open is as for all peers.
pub(super) fn peer_https(
    section: &mut MappingReader<'_, '_>,
    address: Option<&str>,
    default: &Trust,
) -> Option<Option<Https>> {
    let scheme = section.key("scheme", |value| value.one_of(&[("http", false), ("https", true)]));
    https_for("scheme", section, scheme.or(false)?, address, default)
}

/// How something is asked: with TLS if `is_secure`, which is what `key` says.
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

/// The same where the address is not known yet.
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
            let remedy = "write scheme: https beside it, or remove it";
            return section.reject("tls", "not used: the scheme is http", remedy);
        }
        Setting::Given(_) if !is_secure => {
            let what = if section.has("url") {
                "not used: the url is not one with TLS"
            } else {
                "not used: there is no url for it"
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
            return section.reject("key_file", "missing", "cert_file needs the file with its private key");
        }
        (None, Some(_)) => {
            return section.reject("cert_file", "missing", "key_file needs the file with its certificate");
        }
    };
    let trust = Trust { ca_file: ca_file?, identity };
    if !cfg!(feature = "tls") && trust != Trust::default() {
        let key = if trust.ca_file.is_some() { "ca_file" } else { "cert_file" };
        return section.reject(key, NO_TLS, NO_TLS_REMEDY);
    }
    Some(trust)
}
