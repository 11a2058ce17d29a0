//! Where further peers and targets are found.

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

/// Something that knows of peers or targets, and is asked again and again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// What it is called in metrics and logs: its kind and where it looks. Unique.
    pub name: String,
    /// Whom to ask.
    pub source: Source,
    /// How often; for DNS at most so long after the answer, whose time to live may be shorter.
    pub refresh: Duration,
    /// What is found.
    pub role: ProviderRole,
}

/// Who knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Files in the format of Prometheus' `file_sd`. The last part of a path may have one `*`.
    Files(Vec<PathBuf>),
    /// A server that speaks Prometheus' `http_sd`.
    Http {
        /// What is asked for.
        url: Url,
        /// With TLS; `None`: without.
        https: Option<Https>,
        /// Who we say that we are; `None`: nobody.
        credentials: Option<Credentials>,
    },
    /// The DNS.
    Dns {
        /// Completed by the search domains of the host, unless it ends in a dot.
        name: String,
        /// What is asked for.
        records: Records,
    },
}

/// What a server wants to see before it answers. The files are read each time, so what is in them may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A token (RFC 6750).
    Bearer {
        /// Where it is.
        file: PathBuf,
    },
    /// A name and a password (RFC 7617).
    Basic {
        /// The name.
        username: String,
        /// Where the password is.
        password_file: PathBuf,
    },
}

/// Records of the DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Records {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Addresses of both families; one without any is no error as long as the other has some.
    Both,
    /// Services: names and ports.
    Srv,
}

/// What the hosts that are found are, as far as they do not say otherwise themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderRole {
    /// Agents.
    Peers(PeerTemplate),
    /// Hosts without an agent.
    Targets(TargetTemplate),
}

/// What all peers of a provider have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTemplate {
    /// Their HTTP port.
    pub http_port: u16,
    /// Their STAMP port.
    pub stamp_port: u16,
    /// Their agent port.
    pub agent_port: u16,
    /// How their HTTP port is asked with TLS; `None`: it speaks plain HTTP.
    pub https: Option<TlsTemplate>,
    /// Their labels, below those that the provider gives.
    pub labels: BTreeMap<String, String>,
}

/// What all targets of a provider have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetTemplate {
    /// Their reflectors' UDP port.
    pub port: u16,
    /// What their reflectors do otherwise than they should.
    pub quirks: Quirks,
    /// How those with an `https://` or `wss://` URL are asked.
    pub https: TlsTemplate,
    /// Their labels, below those that the provider gives.
    pub labels: BTreeMap<String, String>,
}

impl Provider {
    /// The key that made it one.
    pub(super) fn key(&self) -> &'static str {
        let kind = self.name.split(':').next();
        KINDS.into_iter().find(|known| kind == Some(known)).expect("a provider is called by its kind")
    }

    /// How TLS is spoken, to the source and to what it finds.
    pub(crate) fn trusts(&self) -> impl Iterator<Item = &Trust> {
        let asked = match &self.source {
            Source::Http { https, .. } => https.as_ref().map(|https| &https.trust),
            Source::Files(_) | Source::Dns { .. } => None,
        };
        let found = match &self.role {
            ProviderRole::Peers(pattern) => pattern.https.as_ref().map(|template| &template.trust),
            // Only those with such a URL need it, and which those are is not known yet.
            ProviderRole::Targets(pattern) => cfg!(feature = "tls").then_some(&pattern.https.trust),
        };
        asked.into_iter().chain(found)
    }
}

/// The keys that make an entry of `peers` or `targets` a provider.
const KINDS: [&str; 4] = ["files", "http", "dns", "kubernetes"];

/// How often is asked by default. Chosen: files are cheap to read and are wanted in force; a server is asked by every agent.
const REFRESH_FILES: Duration = Duration::from_secs(10);
const REFRESH_HTTP: Duration = Duration::from_secs(60);
const REFRESH_DNS: Duration = Duration::from_secs(30);
const REFRESH_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// Patterns of one provider.
const PATTERNS_MAX: usize = 32;

/// Whether an entry of a list is a provider and no host.
pub(super) fn is_provider(section: &MappingReader<'_, '_>) -> bool {
    KINDS.iter().any(|kind| section.has(kind))
}

/// Whether an entry of a list is neither a host nor a provider, and says so: a key is misspelt, as a rule.
pub(super) fn is_neither(section: &mut MappingReader<'_, '_>) -> bool {
    if ["name", "address", "url"].iter().any(|key| section.has(key)) {
        return false;
    }
    let remedy = format!("write name and address, or one of {}", KINDS.join(", "));
    section.reject::<()>("name", "there is neither a host nor something that finds hosts", remedy);
    section.ignore_rest::<()>();
    true
}

/// Reads a provider of peers. `all` is how TLS is spoken where nothing else is said.
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

/// The name, the source, and how often it is asked.
fn source(
    section: &mut MappingReader<'_, '_>,
    default: &Trust,
    finds_agents: bool,
) -> Option<(String, Source, Duration)> {
    let kinds: Vec<&str> = KINDS.into_iter().filter(|kind| section.has(kind)).collect();
    if let [first, second, ..] = kinds[..] {
        let remedy = "make each an entry of its own";
        section.reject::<()>(second, format!("there is {first}, too"), remedy);
        return section.ignore_rest();
    }
    let files = section.key("files", path_patterns);
    let http = section.key("http", |value| http_sd(value, default));
    let dns = section.key("dns", |value| dns_query(value, finds_agents));
    let kubernetes = match (finds_agents, section.has("kubernetes")) {
        (true, _) => section.key("kubernetes", |value| value.section(kubernetes_service)),
        (false, true) => {
            section.key("kubernetes", |value| value.reject("its pods are agents", "write it under peers"))
        }
        (false, false) => Setting::Absent,
    };
    let refresh = section.key("refresh", |value| duration(value, &REFRESH_ALLOWED)).optional();
    let (name, source, default) = match (files, http, dns, kubernetes) {
        (Setting::Given(patterns), ..) => {
            let shown: Vec<String> = patterns.iter().map(|path| path.display().to_string()).collect();
            (format!("files:{}", shown.join(",")), Source::Files(patterns), REFRESH_FILES)
        }
        (_, Setting::Given(source), ..) => {
            let Source::Http { url, .. } = &source else { return None };
            (format!("http:{}", display_name(url)), source, REFRESH_HTTP)
        }
        (_, _, Setting::Given((name, records)), _) => {
            (format!("dns:{name}"), Source::Dns { name, records }, REFRESH_DNS)
        }
        (.., Setting::Given(name)) => {
            let records = Records::Both;
            (format!("kubernetes:{name}"), Source::Dns { name, records }, REFRESH_DNS)
        }
        _ => return None,
    };
    Some((name, source, refresh?.unwrap_or(default)))
}

/// What a server is called where everybody can read it. A query may hold a secret: its digest tells two of them apart.
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

/// One path or several.
fn path_patterns(value: ValueReader<'_, '_>) -> Option<Vec<PathBuf>> {
    let whole = value.clone();
    let patterns = match value.node() {
        Node::Text(_) => vec![path_pattern(value)?],
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => {
            value.list("a list of paths such as [/etc/pathmeter/peers/*.yaml]", path_pattern)?
        }
    };
    match patterns.len() {
        0 => whole.reject("no path", "for example [/etc/pathmeter/peers/*.yaml]"),
        1..=PATTERNS_MAX => Some(patterns),
        more => whole.reject(format!("{more} paths"), format!("at most {PATTERNS_MAX} are allowed: use `*`")),
    }
}

/// As `file_sd` has it: a path that ends in .json, .yml or .yaml, with one `*` at most, in its last part.
fn path_pattern(value: ValueReader<'_, '_>) -> Option<PathBuf> {
    let text = value.text("the path of a file")?;
    let found = |what: &str| format!("{} {what}", quoted(text));
    let (folder, last) = text.rsplit_once('/').unwrap_or(("", text));
    let ends_well = Path::new(last)
        .extension()
        .is_some_and(|extension| ["json", "yml", "yaml"].iter().any(|known| extension == *known));
    if !ends_well || text.contains('\0') {
        return value.reject(found("is not the path of such a file"), "it must end in .json, .yml or .yaml");
    }
    if folder.contains('*') || last.matches('*').count() > 1 {
        return value.reject(found("has another `*`"), "one `*` is allowed, in the last part of the path");
    }
    Some(PathBuf::from(text))
}

/// A server: its URL, or that and more.
fn http_sd(value: ValueReader<'_, '_>, default: &Trust) -> Option<Source> {
    let http_url = |value: ValueReader<'_, '_>| {
        let whole = value.clone();
        let url = url(value)?;
        match url.scheme {
            super::Scheme::Http | super::Scheme::Https => Some(url),
            super::Scheme::Ws | super::Scheme::Wss => {
                whole.reject("a WebSocket has no inventory", "write a URL with http:// or https://")
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
        return Some(Source::Http { url, https, credentials: None });
    }
    value.section(|section| {
        let url = section.required("url", http_url);
        let is_secure = url.as_ref().is_some_and(|url| url.scheme.is_secure());
        let template = tls_template("url", section, is_secure, default);
        let credentials = credentials(section, is_secure);
        let url = url?;
        let https = template?.map(|template| template.for_host(&url.host));
        Some(Source::Http { url, https, credentials: credentials? })
    })
}

/// The keys that Prometheus has for it, as far as they name files.
fn credentials(section: &mut MappingReader<'_, '_>, is_secure: bool) -> Option<Option<Credentials>> {
    let bearer = section.key("authorization", |value| value.section(bearer)).optional();
    let basic = section.key("basic_auth", |value| value.section(basic)).optional();
    let (key, given) = match (bearer?, basic?) {
        (Some(_), Some(_)) => {
            return section.reject("basic_auth", "there is authorization, too", "remove one of the two");
        }
        (Some(bearer), None) => ("authorization", bearer),
        (None, Some(basic)) => ("basic_auth", basic),
        (None, None) => return Some(None),
    };
    if !is_secure {
        section.warn(key, "it is sent for everybody on the way to read", "ask over https");
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

/// A name before a password: RFC 7617 forbids colons and control characters in it.
fn user(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a name")?;
    match text.is_empty() || text.contains(|c: char| c == ':' || c.is_control()) {
        true => value.reject(format!("{} is not a name", quoted(text)), "write one without colons"),
        false => Some(text.to_owned()),
    }
}

/// A name, or that and what to ask for.
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
        // An agent says what it is called.
        let remedy = "write {name: …, type: srv}, or name them in a file";
        return whole.reject("addresses of hosts without an agent have no names", remedy);
    }
    Some((name, records))
}

fn name(value: ValueReader<'_, '_>) -> Option<String> {
    let whole = value.clone();
    let name = host(value)?;
    match name.parse::<std::net::IpAddr>() {
        Ok(_) => whole.reject(format!("{name} is an address"), "write a name that has addresses"),
        Err(_) => Some(name),
    }
}

/// The name of a headless service.
fn kubernetes_service(section: &mut MappingReader<'_, '_>) -> Option<String> {
    let service = section.required("service", dns_label);
    let namespace = section.key("namespace", dns_label).optional();
    let domain = section.key("cluster_domain", host).optional();
    let (service, namespace, domain) = (service?, namespace?, domain?);
    match (namespace, domain) {
        // A pod's search domains are those of its own namespace, of all services, and of the cluster.
        (None, None) => Some(service),
        (Some(namespace), None) => Some(format!("{service}.{namespace}.svc")),
        (Some(namespace), Some(domain)) => {
            Some(format!("{service}.{namespace}.svc.{}.", domain.trim_end_matches('.')))
        }
        (None, Some(_)) => section.reject(
            "namespace",
            "missing",
            "a service is found by namespace and cluster_domain, or by neither",
        ),
    }
}

/// RFC 1035 section 2.3.1, as Kubernetes wants it of names.
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
            format!("{} is not the name of a Kubernetes object", quoted(text)),
            "it has 1 to 63 small letters, digits and `-`",
        ),
    }
}
