//! Providers of peers and targets (service discovery).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pathmeter_proto::echo::Quirks;
use sha2::{Digest as _, Sha256};

use super::diagnostic::quoted;
use super::file::Node;
use super::hosts::{peer_port, reflector};
use super::reader::{MappingReader, Setting, ValueReader};
use super::tls::{NO_TLS, NO_TLS_REMEDY, TlsTemplate, tls_template};
use super::url::{Url, url};
use super::values::{duration, host, labels, path};
use super::{Https, Listen, Trust};

/// A source of peers or targets that is polled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Its name in metrics and logs: the kind and the source, such as `dns:agents.example.net`. Unique.
    pub name: String,
    /// The source to poll.
    pub source: ProviderSource,
    /// The interval between polls. For DNS it is an upper limit: the TTL of the records may be shorter.
    pub refresh: Duration,
    /// Whether the members are peers or targets, with their defaults.
    pub role: ProviderRole,
}

/// The source that a provider polls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderSource {
    /// Files in the format of Prometheus' `file_sd`. The last part of a path may have one `*`.
    Files(Vec<PathBuf>),
    /// An HTTP server with a list in the format of Prometheus' `http_sd`.
    Http {
        /// The URL of the list.
        url: Url,
        /// TLS parameters; `None`: plain HTTP.
        https: Option<Https>,
        /// Credentials for the server; `None`: none are sent.
        credentials: Option<Credentials>,
    },
    /// DNS records.
    Dns {
        /// The name to look up. Without a final dot, the search domains of the host are applied.
        name: String,
        /// The record types to look up.
        records: Records,
    },
}

/// Credentials for an HTTP server. The files are read for each request, so that their contents may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A bearer token (RFC 6750).
    Bearer {
        /// The file with the token.
        file: PathBuf,
    },
    /// A user name and a password (RFC 7617).
    Basic {
        /// The user name.
        username: String,
        /// The file with the password.
        password_file: PathBuf,
    },
}

/// DNS record types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Records {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Addresses of both families. It is not an error if only one family has addresses.
    Both,
    /// Services: host names and ports.
    Srv,
}

/// Whether the members of a provider are peers or targets, with defaults for what its list does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderRole {
    /// Agents.
    Peers(PeerTemplate),
    /// Hosts without an agent.
    Targets(TargetTemplate),
}

/// The defaults for the peers of a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTemplate {
    /// Their HTTP port.
    pub http_port: u16,
    /// Their STAMP port.
    pub stamp_port: u16,
    /// Their agent port.
    pub agent_port: u16,
    /// TLS parameters for their HTTP port; `None`: plain HTTP.
    pub https: Option<TlsTemplate>,
    /// Their labels, below those that the provider gives.
    pub labels: BTreeMap<String, String>,
}

/// The defaults for the targets of a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetTemplate {
    /// The UDP port of their reflectors.
    pub port: u16,
    /// Known deviations of their reflectors from the protocol.
    pub quirks: Quirks,
    /// TLS parameters for those with an `https://` or `wss://` URL.
    pub https: TlsTemplate,
    /// Their labels, below those that the provider gives.
    pub labels: BTreeMap<String, String>,
}

impl Provider {
    /// The key of the configuration that defines the source: the kind of the provider.
    pub(super) fn key(&self) -> &'static str {
        let kind = self.name.split(':').next();
        KINDS
            .into_iter()
            .find(|known| kind == Some(known))
            .expect("the name of a provider begins with its kind")
    }

    /// The TLS trust for requests to the source and to its members.
    pub(crate) fn trusts(&self) -> impl Iterator<Item = &Trust> {
        let for_source = match &self.source {
            ProviderSource::Http { https, .. } => https.as_ref().map(|https| &https.trust),
            ProviderSource::Files(_) | ProviderSource::Dns { .. } => None,
        };
        let for_members = match &self.role {
            ProviderRole::Peers(pattern) => pattern.https.as_ref().map(|template| &template.trust),
            // Needed only for members with such a URL, which are not known yet.
            ProviderRole::Targets(pattern) => cfg!(feature = "tls").then_some(&pattern.https.trust),
        };
        for_source.into_iter().chain(for_members)
    }
}

/// The keys that make an entry of `peers` or `targets` a provider.
const KINDS: [&str; 4] = ["files", "http", "dns", "kubernetes"];

/// Default poll intervals. Chosen: files are cheap to read, and a change should be applied soon; a server is
/// polled by every agent.
const REFRESH_FILES: Duration = Duration::from_secs(10);
const REFRESH_HTTP: Duration = Duration::from_secs(60);
const REFRESH_DNS: Duration = Duration::from_secs(30);
const REFRESH_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// Maximum path patterns of one provider.
const PATTERNS_MAX: usize = 32;

/// Whether an entry of `peers` or `targets` is a provider, not a host.
pub(super) fn is_provider(section: &MappingReader<'_, '_>) -> bool {
    KINDS.iter().any(|kind| section.has(kind))
}

/// Whether an entry of `peers` or `targets` is neither a host nor a provider. Reports this as a problem:
/// usually a key is misspelt.
pub(super) fn is_neither(section: &mut MappingReader<'_, '_>) -> bool {
    if ["name", "address", "url"].iter().any(|key| section.has(key)) {
        return false;
    }
    let remedy = format!("write name and address, or one of {}", KINDS.join(", "));
    section.reject::<()>("name", "neither a host nor a provider", remedy);
    section.ignore_rest::<()>();
    true
}

/// Reads a provider of peers. `default` is the trust for TLS where the section does not have its own.
pub(super) fn peers(
    section: &mut MappingReader<'_, '_>,
    listen: Option<&Listen>,
    default: &Trust,
) -> Option<Provider> {
    let source = source(section, default, true);
    let http_port = peer_port(section, "http_port", listen.map(|listen| listen.http));
    let stamp_port = peer_port(section, "stamp_port", listen.map(|listen| listen.stamp));
    let agent_port = peer_port(section, "agent_port", listen.map(|listen| listen.agent));
    let scheme = section.key("scheme", |value| value.one_of(&[("http", false), ("https", true)])).or(false);
    let https = match scheme {
        Some(is_secure) => tls_template("scheme", section, is_secure, default),
        None => None,
    };
    let labels = section.key("labels", labels).or(BTreeMap::new());
    let (name, source, refresh) = source?;
    let role = ProviderRole::Peers(PeerTemplate {
        http_port: http_port?,
        stamp_port: stamp_port?,
        agent_port: agent_port?,
        https: https?,
        labels: labels?,
    });
    Some(Provider { name, source, refresh, role })
}

/// Reads a provider of targets.
pub(super) fn targets(section: &mut MappingReader<'_, '_>, default: &Trust) -> Option<Provider> {
    let source = source(section, default, false);
    let reflector = reflector(section);
    let https = tls_template("tls", section, cfg!(feature = "tls"), default);
    let labels = section.key("labels", labels).or(BTreeMap::new());
    let (name, source, refresh) = source?;
    let (port, quirks) = reflector?;
    let role = ProviderRole::Targets(TargetTemplate {
        port,
        quirks,
        https: https?.unwrap_or_default(),
        labels: labels?,
    });
    Some(Provider { name, source, refresh, role })
}

/// The name, the source, and the poll interval.
fn source(
    section: &mut MappingReader<'_, '_>,
    default: &Trust,
    finds_agents: bool,
) -> Option<(String, ProviderSource, Duration)> {
    let kinds: Vec<&str> = KINDS.into_iter().filter(|kind| section.has(kind)).collect();
    if let [first, second, ..] = kinds[..] {
        let remedy = "write a separate entry for each";
        section.reject::<()>(second, format!("{first} is also set"), remedy);
        return section.ignore_rest();
    }
    let files = section.key("files", path_patterns);
    let http = section.key("http", |value| http_sd(value, default));
    let dns = section.key("dns", |value| dns_query(value, finds_agents));
    let kubernetes = match (finds_agents, section.has("kubernetes")) {
        (true, _) => section.key("kubernetes", |value| value.section(kubernetes_service)),
        (false, true) => section
            .key("kubernetes", |value| value.reject("the pods of a service are agents", "move it to peers")),
        (false, false) => Setting::Absent,
    };
    let refresh = section.key("refresh", |value| duration(value, &REFRESH_ALLOWED)).optional();
    let (name, source, default) = match (files, http, dns, kubernetes) {
        (Setting::Given(patterns), ..) => {
            let shown: Vec<String> = patterns.iter().map(|path| path.display().to_string()).collect();
            (format!("files:{}", shown.join(",")), ProviderSource::Files(patterns), REFRESH_FILES)
        }
        (_, Setting::Given(source), ..) => {
            let ProviderSource::Http { url, .. } = &source else { return None };
            (format!("http:{}", display_name(url)), source, REFRESH_HTTP)
        }
        (_, _, Setting::Given((name, records)), _) => {
            (format!("dns:{name}"), ProviderSource::Dns { name, records }, REFRESH_DNS)
        }
        (.., Setting::Given(name)) => {
            let records = Records::Both;
            (format!("kubernetes:{name}"), ProviderSource::Dns { name, records }, REFRESH_DNS)
        }
        _ => return None,
    };
    Some((name, source, refresh?.unwrap_or(default)))
}

/// The name of a server in metrics and logs. The query may contain a secret, so only a digest of it is shown.
fn display_name(url: &Url) -> String {
    let scheme = if url.scheme.is_secure() { "https://" } else { "" };
    let (path, query) = url.path.split_once('?').unwrap_or((&url.path, ""));
    let digest = Sha256::digest(query);
    let query = match query {
        "" => String::new(),
        _ => digest.iter().take(4).fold("?".to_owned(), |text, byte| text + &format!("{byte:02x}")),
    };
    format!("{scheme}{}{path}{query}", url.authority())
}

/// Reads one path or a list of paths.
fn path_patterns(value: ValueReader<'_, '_>) -> Option<Vec<PathBuf>> {
    let whole = value.clone();
    let patterns = match value.node() {
        Node::Text(_) => vec![path_pattern(value)?],
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => {
            value.list("a list of paths such as [/etc/pathmeter/peers/*.yaml]", path_pattern)?
        }
    };
    match patterns.len() {
        0 => whole.reject("empty list", "for example [/etc/pathmeter/peers/*.yaml]"),
        1..=PATTERNS_MAX => Some(patterns),
        more => whole.reject(format!("{more} paths"), format!("at most {PATTERNS_MAX} are allowed: use `*`")),
    }
}

/// Reads a path as in `file_sd`: it ends in .json, .yml or .yaml, and may have one `*`, in its last part.
fn path_pattern(value: ValueReader<'_, '_>) -> Option<PathBuf> {
    let text = value.text("a file path")?;
    let found = |what: &str| format!("{} {what}", quoted(text));
    let (folder, last) = text.rsplit_once('/').unwrap_or(("", text));
    let ends_well = Path::new(last)
        .extension()
        .is_some_and(|extension| ["json", "yml", "yaml"].iter().any(|known| extension == *known));
    if !ends_well || text.contains('\0') {
        return value
            .reject(found("is not the path of a JSON or YAML file"), "it must end in .json, .yml or .yaml");
    }
    if folder.contains('*') || last.matches('*').count() > 1 {
        return value.reject(
            found("has a `*` that is not allowed"),
            "use at most one `*`, in the last part of the path",
        );
    }
    Some(PathBuf::from(text))
}

/// Reads an HTTP server: its URL, or a section with the URL and further keys.
fn http_sd(value: ValueReader<'_, '_>, default: &Trust) -> Option<ProviderSource> {
    let http_url = |value: ValueReader<'_, '_>| {
        let whole = value.clone();
        let url = url(value)?;
        match url.scheme {
            super::Scheme::Http | super::Scheme::Https => Some(url),
            super::Scheme::Ws | super::Scheme::Wss => {
                whole.reject("a list cannot be read over a WebSocket", "write a URL with http:// or https://")
            }
        }
    };
    if let Node::Text(_) = value.node() {
        let whole = value.clone();
        let url = http_url(value)?;
        if url.scheme.is_secure() && !cfg!(feature = "tls") {
            return whole.reject(NO_TLS, NO_TLS_REMEDY);
        }
        let https =
            url.scheme.is_secure().then(|| Https { trust: default.clone(), server_name: url.host.clone() });
        return Some(ProviderSource::Http { url, https, credentials: None });
    }
    value.section(|section| {
        let url = section.required("url", http_url);
        let is_secure = url.as_ref().is_some_and(|url| url.scheme.is_secure());
        let template = tls_template("url", section, is_secure, default);
        let credentials = credentials(section, is_secure);
        let url = url?;
        let https = template?.map(|template| template.for_host(&url.host));
        Some(ProviderSource::Http { url, https, credentials: credentials? })
    })
}

/// Reads the credentials. The keys are those of Prometheus that name files.
fn credentials(section: &mut MappingReader<'_, '_>, is_secure: bool) -> Option<Option<Credentials>> {
    let bearer = section.key("authorization", |value| value.section(bearer)).optional();
    let basic = section.key("basic_auth", |value| value.section(basic)).optional();
    let (key, given) = match (bearer?, basic?) {
        (Some(_), Some(_)) => {
            return section.reject("basic_auth", "authorization is also set", "remove one of the two");
        }
        (Some(bearer), None) => ("authorization", bearer),
        (None, Some(basic)) => ("basic_auth", basic),
        (None, None) => return Some(None),
    };
    if !is_secure {
        section.warn(key, "the credentials are sent unencrypted", "use an https:// URL");
    }
    Some(Some(given))
}

fn bearer(section: &mut MappingReader<'_, '_>) -> Option<Credentials> {
    let scheme = section.key("type", |value| value.one_of(&[("Bearer", ())])).or(());
    let file = section.required("credentials_file", path);
    scheme?;
    Some(Credentials::Bearer { file: file? })
}

fn basic(section: &mut MappingReader<'_, '_>) -> Option<Credentials> {
    let username = section.required("username", user);
    let password_file = section.required("password_file", path);
    Some(Credentials::Basic { username: username?, password_file: password_file? })
}

/// A user name. RFC 7617 forbids colons and control characters in it.
fn user(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a user name")?;
    match text.is_empty() || text.contains(|c: char| c == ':' || c.is_control()) {
        true => value.reject(
            format!("{} is not a valid user name", quoted(text)),
            "remove colons and control characters",
        ),
        false => Some(text.to_owned()),
    }
}

/// Reads a DNS name, or a section with the name and the record type.
fn dns_query(value: ValueReader<'_, '_>, finds_agents: bool) -> Option<(String, Records)> {
    const RECORDS: [(&str, Records); 4] =
        [("both", Records::Both), ("a", Records::A), ("aaaa", Records::Aaaa), ("srv", Records::Srv)];
    let whole = value.clone();
    let (name, records) = match value.node() {
        Node::Text(_) => (name(value)?, Records::Both),
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => {
            value.section(|section| {
                let name = section.required("name", name);
                let records = section.key("type", |value| value.one_of(&RECORDS)).or(Records::Both);
                Some((name?, records?))
            })?
        }
    };
    if !finds_agents && records != Records::Srv {
        // Agents report their own names.
        let remedy = "write {name: …, type: srv}, or list the targets in a file";
        return whole.reject("address records do not contain the names that targets need", remedy);
    }
    Some((name, records))
}

fn name(value: ValueReader<'_, '_>) -> Option<String> {
    let whole = value.clone();
    let name = host(value)?;
    match name.parse::<std::net::IpAddr>() {
        Ok(_) => whole.reject(format!("{name} is an address"), "write a DNS name"),
        Err(_) => Some(name),
    }
}

/// Reads a headless service; returns its DNS name.
fn kubernetes_service(section: &mut MappingReader<'_, '_>) -> Option<String> {
    let service = section.required("service", dns_label);
    let namespace = section.key("namespace", dns_label).optional();
    let domain = section.key("cluster_domain", host).optional();
    let (service, namespace, domain) = (service?, namespace?, domain?);
    match (namespace, domain) {
        // The search domains of a pod are its own namespace, all services, and the cluster.
        (None, None) => Some(service),
        (Some(namespace), None) => Some(format!("{service}.{namespace}.svc")),
        (Some(namespace), Some(domain)) => {
            Some(format!("{service}.{namespace}.svc.{}.", domain.trim_end_matches('.')))
        }
        (None, Some(_)) => section.reject("namespace", "missing", "cluster_domain requires namespace"),
    }
}

/// Reads a DNS label (RFC 1035 section 2.3.1) in lower case, as Kubernetes requires of names.
fn dns_label(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a name such as pathmeter")?;
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = (1..=63).contains(&text.len())
        && text.bytes().all(|byte| is_inner(byte) || byte == b'-')
        && text.bytes().next().is_some_and(is_inner)
        && text.bytes().last().is_some_and(is_inner);
    match is_label {
        true => Some(text.to_owned()),
        false => value.reject(
            format!("{} is not a valid Kubernetes name", quoted(text)),
            "use 1 to 63 lowercase letters, digits and `-`",
        ),
    }
}
