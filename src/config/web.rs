//! The web config file: TLS, users and headers of the HTTP port, in the format of Prometheus and its
//! exporters.
//!
//! Source: prometheus/exporter-toolkit, docs/web-configuration.md. An option that rustls does not support is
//! a problem with a remedy; it is never ignored. Differs in that certificates are read together with the
//! file, not for each connection.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use super::diagnostic::quoted;
use super::file::{self, Node};
use super::reader::{Diagnostics, MappingReader, Setting, ValueReader};
use super::tls::{NO_TLS, NO_TLS_REMEDY};
use super::values::path;
use super::{Loaded, Problems, finish};

/// Reads a web config file. Paths in it are relative to its folder, `folder`.
///
/// # Errors
/// All problems of the text at once. If the text is not valid YAML, only the first problem.
pub fn load(text: &[u8], folder: &Path) -> Result<Loaded<WebConfig>, Problems> {
    let tree = file::read(text)?;
    let diagnostics = Diagnostics::default();
    let config = ValueReader::top(&tree, &diagnostics).section(|file| {
        let tls = tls_server(file, folder);
        let headers = file.section("http_server_config", http_server);
        let users = file.key("basic_auth_users", users).or(BTreeMap::new());
        if !matches!(file.key("rate_limit", |_| Some(())), Setting::Absent) {
            let remedy = "remove it: the number of connections is limited instead (512 at once)";
            return file.reject("rate_limit", "not supported", remedy);
        }
        let config = WebConfig { tls: tls?, headers: headers?, users: users? };
        if config.tls.is_none() && !config.users.is_empty() {
            let remedy = "set a certificate in tls_server_config";
            file.warn("basic_auth_users", "passwords are sent unencrypted", remedy);
        }
        Some(config)
    });
    finish(text, config, diagnostics)
}

/// How the HTTP port is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebConfig {
    /// TLS parameters; `None`: plain HTTP.
    pub tls: Option<WebTls>,
    /// Headers that are added to every response.
    pub headers: Vec<(&'static str, String)>,
    /// The bcrypt hash of the password of each user. Empty: no password is required.
    pub users: BTreeMap<String, String>,
}

/// The TLS parameters of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebTls {
    /// The certificate of the server, followed by its chain of intermediate certificates.
    pub certificate: Pem,
    /// The private key of the certificate.
    pub key: Pem,
    /// Which client certificates are required.
    pub clients: ClientVerification,
    /// The lowest TLS version.
    pub min_version: TlsVersion,
    /// The highest TLS version.
    pub max_version: TlsVersion,
    /// Cipher suites of TLS 1.2 in order of preference; `None`: all. Those of TLS 1.3 are always enabled.
    pub suites: Option<Vec<Suite>>,
    /// Whether the order of the server decides on the cipher suite, and not that of the client.
    pub prefer_server_suites: bool,
    /// Groups for the key exchange in order of preference; empty: all.
    pub curves: Vec<Curve>,
}

/// Certificates or a key in PEM format.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// In a file.
    File(PathBuf),
    /// The text itself.
    Text(String),
}

impl fmt::Debug for Pem {
    /// Does not show the text, which may be a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text"),
        }
    }
}

/// Which client certificates a server requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientVerification {
    /// No certificate is requested.
    Everyone,
    /// A certificate is optional; if one is presented, this CA must have signed it.
    VerifiedIfGiven(Pem),
    /// A certificate that this CA signed is required.
    Verified {
        /// The CA.
        ca: Pem,
        /// DNS names, IP addresses, email addresses or URIs, of which the certificate must have one; empty:
        /// any.
        names: Vec<String>,
    },
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum TlsVersion {
    Tls12,
    Tls13,
}

/// A cipher suite of TLS 1.2: the signature algorithm and the cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Suite {
    EcdsaAes128,
    EcdsaAes256,
    EcdsaChacha20,
    RsaAes128,
    RsaAes256,
    RsaChacha20,
}

/// A group for the key exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Curve {
    X25519,
    P256,
    P384,
}

/// The names of cipher suites in the standard library of Go. As there, those of TLS 1.3 are accepted and have
/// no effect.
const SUITES: [(&str, Option<Suite>); 9] = [
    ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", Some(Suite::EcdsaAes128)),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", Some(Suite::EcdsaAes256)),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", Some(Suite::EcdsaChacha20)),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", Some(Suite::RsaAes128)),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", Some(Suite::RsaAes256)),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", Some(Suite::RsaChacha20)),
    ("TLS_AES_128_GCM_SHA256", None),
    ("TLS_AES_256_GCM_SHA384", None),
    ("TLS_CHACHA20_POLY1305_SHA256", None),
];

const CURVES: [(&str, Curve); 3] =
    [("X25519", Curve::X25519), ("CurveP256", Curve::P256), ("CurveP384", Curve::P384)];

/// Headers that may be set, with the allowed values of each; empty: any value.
const HEADERS: [(&str, &[&str]); 6] = [
    ("Cache-Control", &[]),
    ("Content-Security-Policy", &[]),
    ("Strict-Transport-Security", &[]),
    ("X-Content-Type-Options", &["nosniff"]),
    ("X-Frame-Options", &["deny", "sameorigin"]),
    ("X-XSS-Protection", &[]),
];

/// Maximum users of a file.
const USERS_MAX: usize = 1000;

/// Maximum cost of a bcrypt hash; the work doubles with each step. Chosen: with 16 one password takes seconds
/// of a core.
const COST_MAX: u32 = 16;

fn tls_server(file: &mut MappingReader<'_, '_>, folder: &Path) -> Option<Option<WebTls>> {
    let is_empty = |node: &Node| match node {
        Node::Null => true,
        Node::Mapping(entries) => entries.is_empty(),
        Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Text(_) | Node::List(_) => false,
    };
    let tls = file.key("tls_server_config", |value| match is_empty(value.node()) {
        true => Some(None),
        false if !cfg!(feature = "tls") => value.reject(NO_TLS, NO_TLS_REMEDY),
        false => value.section(|section| web_tls(section, folder)).map(Some),
    });
    tls.or(None)
}

fn web_tls(section: &mut MappingReader<'_, '_>, folder: &Path) -> Option<WebTls> {
    let required = |section: &mut MappingReader<'_, '_>, text, file| match pem(section, folder, text, file)? {
        Some(pem) => Some(pem),
        None => section.reject(file, "missing", "TLS requires a certificate and its private key"),
    };
    let certificate = required(section, "cert", "cert_file");
    let key = required(section, "key", "key_file");
    let clients = client_verification(section, folder);
    let min_version = section.key("min_version", version).or(TlsVersion::Tls12);
    let max_version = section.key("max_version", version).or(TlsVersion::Tls13);
    let suites = section
        .key("cipher_suites", |value| value.list("a list of cipher suites", |suite| suite.one_of(&SUITES)));
    let prefer_server_suites = section.key("prefer_server_cipher_suites", ValueReader::boolean).or(true);
    let curves = section
        .key("curve_preferences", |value| value.list("a list of curves", |curve| curve.one_of(&CURVES)))
        .or(Vec::new());
    let (min_version, max_version) = (min_version?, max_version?);
    if min_version > max_version {
        return section.reject(
            "min_version",
            "higher than max_version",
            "lower min_version, or raise max_version",
        );
    }
    let suites = suites.optional()?.filter(|suites| !suites.is_empty());
    Some(WebTls {
        certificate: certificate?,
        key: key?,
        clients: clients?,
        min_version,
        max_version,
        suites: suites.map(|suites| suites.into_iter().flatten().collect()),
        prefer_server_suites: prefer_server_suites?,
        curves: curves?,
    })
}

/// Reads PEM from the key `text`, or the name of a PEM file from the key `file`.
fn pem(
    section: &mut MappingReader<'_, '_>,
    folder: &Path,
    text: &'static str,
    file: &'static str,
) -> Option<Option<Pem>> {
    let inline = section.key(text, |value| value.text("PEM text").map(str::to_owned)).optional();
    let path = section.key(file, path).optional();
    match (inline?, path?) {
        (Some(_), Some(_)) => section.reject(text, format!("{file} is also set"), "remove one of the two"),
        (Some(text), None) => Some(Some(Pem::Text(text))),
        (None, Some(path)) => Some(Some(Pem::File(folder.join(path)))),
        (None, None) => Some(None),
    }
}

/// The values of `client_auth_type`; see [`ClientVerification`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientAuth {
    No,
    Request,
    RequireAny,
    VerifyIfGiven,
    RequireAndVerify,
}

const CLIENT_AUTHS: [(&str, ClientAuth); 5] = [
    ("NoClientCert", ClientAuth::No),
    ("RequestClientCert", ClientAuth::Request),
    ("RequireAnyClientCert", ClientAuth::RequireAny),
    ("VerifyClientCertIfGiven", ClientAuth::VerifyIfGiven),
    ("RequireAndVerifyClientCert", ClientAuth::RequireAndVerify),
];

fn client_verification(section: &mut MappingReader<'_, '_>, folder: &Path) -> Option<ClientVerification> {
    const TYPE: &str = "client_auth_type";
    const CA: &str = "client_ca_file";
    const NAMES: &str = "client_allowed_sans";
    let auth = section.key(TYPE, |value| value.one_of(&CLIENT_AUTHS)).or(ClientAuth::No);
    let ca = pem(section, folder, "client_ca", CA);
    let names = section
        .key(NAMES, |value| value.list("a list of names", |name| name.text("a name").map(str::to_owned)))
        .or(Vec::new());
    let (auth, ca, names) = (auth?, ca?, names?);
    if !names.is_empty() && auth != ClientAuth::RequireAndVerify {
        return section.reject(
            NAMES,
            "client certificates are not required",
            "write client_auth_type: RequireAndVerifyClientCert",
        );
    }
    match (auth, ca) {
        (ClientAuth::No, None) => Some(ClientVerification::Everyone),
        (ClientAuth::Request, None) => {
            section.warn(
                TYPE,
                "client certificates are not requested",
                "they would not be verified: write NoClientCert",
            );
            Some(ClientVerification::Everyone)
        }
        (ClientAuth::No | ClientAuth::Request, Some(_)) => {
            let remedy = "write VerifyClientCertIfGiven or RequireAndVerifyClientCert, or remove the CA";
            section.reject(TYPE, "a client CA is set, but client certificates are not verified", remedy)
        }
        (ClientAuth::RequireAny, _) => {
            let remedy = "an unverified certificate proves nothing: write \
                          RequireAndVerifyClientCert, and set client_ca_file";
            section.reject(TYPE, "RequireAnyClientCert is not supported", remedy)
        }
        (ClientAuth::VerifyIfGiven | ClientAuth::RequireAndVerify, None) => {
            section.reject(CA, "missing", "set the CA that signs client certificates")
        }
        (ClientAuth::VerifyIfGiven, Some(ca)) => Some(ClientVerification::VerifiedIfGiven(ca)),
        (ClientAuth::RequireAndVerify, Some(ca)) => Some(ClientVerification::Verified { ca, names }),
    }
}

fn version(value: ValueReader<'_, '_>) -> Option<TlsVersion> {
    match value.text("TLS12 or TLS13")? {
        "TLS12" => Some(TlsVersion::Tls12),
        "TLS13" => Some(TlsVersion::Tls13),
        old @ ("TLS10" | "TLS11") => value
            .reject(format!("{old} is not supported"), "it is deprecated (RFC 8996): write TLS12 or TLS13"),
        other => value.reject(format!("{} is not supported", quoted(other)), "allowed: TLS12, TLS13"),
    }
}

fn http_server(section: &mut MappingReader<'_, '_>) -> Option<Vec<(&'static str, String)>> {
    let http2 = section.key("http2", ValueReader::boolean).or(false);
    let headers = section.key("headers", |value| value.section(headers)).or(Vec::new());
    if http2? {
        section.warn("http2", "has no effect", "only HTTP/1.1 is supported: write false, or remove it");
    }
    headers
}

fn headers(section: &mut MappingReader<'_, '_>) -> Option<Vec<(&'static str, String)>> {
    let read =
        HEADERS.map(|(name, allowed)| (name, section.key(name, |value| header(&value, allowed)).optional()));
    let given = read.into_iter().map(|(name, value)| Some((name, value?)));
    let given: Option<Vec<_>> = given.collect();
    Some(given?.into_iter().filter_map(|(name, value)| Some((name, value?))).collect())
}

fn header(value: &ValueReader<'_, '_>, allowed: &[&str]) -> Option<String> {
    let text = value.text("the value of a header")?;
    if !allowed.is_empty() && !allowed.contains(&text) {
        return value.reject(
            format!("{} is not supported", quoted(text)),
            format!("allowed: {}", allowed.join(", ")),
        );
    }
    if !text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return value.reject("not a valid header value", "use printable ASCII on one line");
    }
    Some(text.to_owned())
}

fn users(value: ValueReader<'_, '_>) -> Option<BTreeMap<String, String>> {
    if matches!(value.node(), Node::Null) {
        return Some(BTreeMap::new());
    }
    let whole = value.clone();
    let users = value.entries("a mapping of users to the bcrypt hashes of their passwords", user)?;
    if users.len() > USERS_MAX {
        return whole.reject(format!("{} users", users.len()), format!("at most {USERS_MAX} are allowed"));
    }
    Some(users.into_iter().collect())
}

fn user(name: &str, value: ValueReader<'_, '_>) -> Option<(String, String)> {
    if name.is_empty() || name.contains(':') || name.chars().any(char::is_control) {
        return value.reject_key(
            format!("{} is not a valid user name", quoted(name)),
            "remove colons and control characters",
        );
    }
    // The value may be a password, so it is not shown.
    let remedy = "create one with: htpasswd -nBC 10 \"\" | tr -d ':\\n'";
    let Node::Text(hash) = value.node() else {
        return value.reject_type("the bcrypt hash of the password");
    };
    match bcrypt::HashParts::from_str(hash) {
        Ok(parts) if parts.get_cost() <= COST_MAX => Some((name.to_owned(), hash.clone())),
        Ok(parts) => {
            let what = format!("the hash has a cost of {}", parts.get_cost());
            value.reject(what, format!("at most {COST_MAX} is allowed, 10 is usual: {remedy}"))
        }
        Err(_) => value.reject("not a bcrypt hash", remedy),
    }
}
