//! The web config file: how our HTTP port is served, in the format that Prometheus and its exporters have for it.
//!
//! Source: prometheus/exporter-toolkit, docs/web-configuration.md. What rustls cannot do is a problem with a remedy, never
//! ignored. Differs in that the certificates are read when the file is, not with each connection.

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

/// Reads a web config file that lies in `folder`: paths in it are relative to that.
///
/// # Errors
/// Everything that is wrong with the text at once; only what makes it no YAML hides the rest.
pub fn load(text: &[u8], folder: &Path) -> Result<Loaded<WebConfig>, Problems> {
    let tree = file::read(text)?;
    let diagnostics = Diagnostics::default();
    let config = ValueReader::top(&tree, &diagnostics).section(|file| {
        let tls = server(file, folder);
        let headers = file.section("http_server_config", http);
        let users = file.key("basic_auth_users", users).or(BTreeMap::new());
        if !matches!(file.key("rate_limit", |_| Some(())), Setting::Absent) {
            let remedy = "remove it: requests are not limited by rate here, connections are (512 at once)";
            return file.reject("rate_limit", "not supported", remedy);
        }
        let config = WebConfig { tls: tls?, headers: headers?, users: users? };
        if config.tls.is_none() && !config.users.is_empty() {
            let remedy = "give tls_server_config a certificate";
            file.warn("basic_auth_users", "passwords are sent for everybody on the way to read", remedy);
        }
        Some(config)
    });
    finish(text, config, diagnostics)
}

/// How our HTTP port is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebConfig {
    /// With TLS; `None`: plain.
    pub tls: Option<WebTls>,
    /// Headers of every answer.
    pub headers: Vec<(&'static str, String)>,
    /// Who may ask: the bcrypt hash of each user's password. Empty: everyone.
    pub users: BTreeMap<String, String>,
}

/// How TLS is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebTls {
    /// Our certificate, and those that lead from it to a CA.
    pub certificate: Pem,
    /// Its private key.
    pub key: Pem,
    /// Who may connect.
    pub clients: ClientVerification,
    /// The lowest version.
    pub min_version: TlsVersion,
    /// The highest one.
    pub max_version: TlsVersion,
    /// Cipher suites of TLS 1.2 in the order of preference; `None`: all that there are. Those of TLS 1.3 are always on.
    pub suites: Option<Vec<Suite>>,
    /// Whether our preference of suites goes before the client's.
    pub prefer_ours: bool,
    /// Groups for the key exchange in the order of preference; empty: all that there are.
    pub curves: Vec<Curve>,
}

/// A text in PEM.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// In a file.
    File(PathBuf),
    /// Written out.
    Text(String),
}

impl fmt::Debug for Pem {
    /// Without the text, which may be a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text"),
        }
    }
}

/// Who may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientVerification {
    /// Everyone; no certificate is asked for.
    Everyone,
    /// Everyone without a certificate, and who has one that this CA signed.
    VerifiedIfGiven(Pem),
    /// Who has a certificate that this CA signed.
    Verified {
        /// The CA.
        ca: Pem,
        /// The certificate must be for one of these DNS names, addresses, mail addresses or URIs; empty: for any.
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

/// A cipher suite of TLS 1.2: who signs, and what encrypts.
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

/// The names of suites in Go's standard library. Those of TLS 1.3 may be listed and make no difference, as there.
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

/// Headers that may be set, and the values that may be given to each; none: any.
const HEADERS: [(&str, &[&str]); 6] = [
    ("Cache-Control", &[]),
    ("Content-Security-Policy", &[]),
    ("Strict-Transport-Security", &[]),
    ("X-Content-Type-Options", &["nosniff"]),
    ("X-Frame-Options", &["deny", "sameorigin"]),
    ("X-XSS-Protection", &[]),
];

/// Users of a file.
const USERS_MAX: usize = 1000;

/// The highest cost of a hash: the work doubles with each. Chosen: 16 takes seconds of a core for one password.
const COST_MAX: u32 = 16;

fn server(file: &mut MappingReader<'_, '_>, folder: &Path) -> Option<Option<WebTls>> {
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
    let needed = |section: &mut MappingReader<'_, '_>, text, file| match pem(section, folder, text, file)? {
        Some(pem) => Some(pem),
        None => section.reject(file, "missing", "TLS is served with a certificate and its key"),
    };
    let certificate = needed(section, "cert", "cert_file");
    let key = needed(section, "key", "key_file");
    let clients = clients(section, folder);
    let min_version = section.key("min_version", version).or(TlsVersion::Tls12);
    let max_version = section.key("max_version", version).or(TlsVersion::Tls13);
    let suites = section
        .key("cipher_suites", |value| value.list("a list of cipher suites", |suite| suite.one_of(&SUITES)));
    let prefer_ours = section.key("prefer_server_cipher_suites", ValueReader::boolean).or(true);
    let curves = section
        .key("curve_preferences", |value| value.list("a list of curves", |curve| curve.one_of(&CURVES)))
        .or(Vec::new());
    let (min_version, max_version) = (min_version?, max_version?);
    if min_version > max_version {
        return section.reject(
            "min_version",
            "higher than max_version",
            "write TLS12 for one of them, or none",
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
        prefer_ours: prefer_ours?,
        curves: curves?,
    })
}

/// A text that is given by one of two keys.
fn pem(
    section: &mut MappingReader<'_, '_>,
    folder: &Path,
    text: &'static str,
    file: &'static str,
) -> Option<Option<Pem>> {
    let written = section.key(text, |value| value.text("a text in PEM").map(str::to_owned)).optional();
    let path = section.key(file, path).optional();
    match (written?, path?) {
        (Some(_), Some(_)) => section.reject(text, format!("{file} is given, too"), "remove one of the two"),
        (Some(text), None) => Some(Some(Pem::Text(text))),
        (None, Some(path)) => Some(Some(Pem::File(folder.join(path)))),
        (None, None) => Some(None),
    }
}

/// How the file calls [`ClientVerification`].
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

fn clients(section: &mut MappingReader<'_, '_>, folder: &Path) -> Option<ClientVerification> {
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
            "nobody must show a certificate",
            "write client_auth_type: RequireAndVerifyClientCert",
        );
    }
    match (auth, ca) {
        (ClientAuth::No, None) => Some(ClientVerification::Everyone),
        (ClientAuth::Request, None) => {
            section.warn(
                TYPE,
                "no certificate is asked for",
                "nothing would be done with one: write NoClientCert",
            );
            Some(ClientVerification::Everyone)
        }
        (ClientAuth::No | ClientAuth::Request, Some(_)) => {
            let remedy = "write VerifyClientCertIfGiven or RequireAndVerifyClientCert, or remove the CA";
            section.reject(TYPE, "the CA of clients is given, and nobody is verified", remedy)
        }
        (ClientAuth::RequireAny, _) => {
            let remedy = "a certificate that nobody verifies proves nothing: write RequireAndVerifyClientCert and client_ca_file";
            section.reject(TYPE, "RequireAnyClientCert is not supported", remedy)
        }
        (ClientAuth::VerifyIfGiven | ClientAuth::RequireAndVerify, None) => {
            section.reject(CA, "missing", "give the CA that signs the certificates of clients")
        }
        (ClientAuth::VerifyIfGiven, Some(ca)) => Some(ClientVerification::VerifiedIfGiven(ca)),
        (ClientAuth::RequireAndVerify, Some(ca)) => Some(ClientVerification::Verified { ca, names }),
    }
}

fn version(value: ValueReader<'_, '_>) -> Option<TlsVersion> {
    match value.text("TLS12 or TLS13")? {
        "TLS12" => Some(TlsVersion::Tls12),
        "TLS13" => Some(TlsVersion::Tls13),
        old @ ("TLS10" | "TLS11") => {
            value.reject(format!("{old} is not supported"), "it is broken (RFC 8996): write TLS12 or TLS13")
        }
        other => value.reject(format!("{} is not supported", quoted(other)), "allowed: TLS12, TLS13"),
    }
}

fn http(section: &mut MappingReader<'_, '_>) -> Option<Vec<(&'static str, String)>> {
    let http2 = section.key("http2", ValueReader::boolean).or(false);
    let headers = section.key("headers", |value| value.section(headers)).or(Vec::new());
    if http2? {
        section.warn("http2", "has no effect", "HTTP/1.1 is spoken: write false, or remove it");
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
        return value.reject("not the value of a header", "write it in one line, in ASCII");
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
        return value.reject_key(format!("{} is not a user", quoted(name)), "a user's name has no colon");
    }
    // What stands here may be a password: it is not shown.
    let remedy = "make one with: htpasswd -nBC 10 \"\" | tr -d ':\\n'";
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
