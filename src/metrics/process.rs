//! Metrics of the process, in a `prometheus` registry that is updated on each scrape.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{SysconfVar, sysconf};
use prometheus::core::Collector as _;
use prometheus::proto::MetricFamily;
use prometheus::{Counter, CounterVec, Gauge, GaugeVec, IntCounter, Registry};

use super::discovery::{ProviderCounts, ProviderMetrics};
use super::registry::{VALID, counter, counters, gauge, gauges, integer};

/// Metrics of the process and of the daemon's tasks.
#[derive(Debug)]
pub struct ProcessMetrics {
    registry: Registry,
    reload_successful: Gauge,
    reload_at: Gauge,
    config_info: GaugeVec,
    peers: GaugeVec,
    resolve_failures: IntCounter,
    state_dir_write_failures: IntCounter,
    series_dropped: Gauge,
    http_connections: Gauge,
    http_accept_errors: Counter,
    http_responses: CounterVec,
    tls: TlsMetrics,
    discovery: ProviderMetrics,
    proc: Proc,
    hash: Mutex<Option<String>>,
}

/// The state of a peer or target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PeerState {
    /// A reply was received within the last `lost_after`.
    Up,
    /// No replies are received.
    Down,
    /// It announced its shutdown.
    Draining,
    /// Its name has no address.
    Unresolved,
}

impl PeerState {
    /// All states, in the order of the exported lines.
    pub const ALL: [Self; 4] = [Self::Up, Self::Down, Self::Draining, Self::Unresolved];

    /// Returns the value of the label `state`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Unresolved => "unresolved",
        }
    }
}

/// Counters of the HTTP server.
#[derive(Debug, Clone, Copy)]
pub struct HttpCounts {
    /// Open connections.
    pub connections: u64,
    /// Errors while accepting connections.
    pub accept_errors: u64,
    /// Responses by class of status code.
    pub responses: [(&'static str, u64); 5],
    /// Counters of TLS; `None` if the port does not use TLS.
    pub tls: Option<TlsCounts>,
}

/// TLS counters of the HTTP server.
#[derive(Debug, Clone, Copy)]
pub struct TlsCounts {
    /// Failed handshakes.
    pub handshake_errors: u64,
    /// Expiry of the server certificate, in seconds since the Unix epoch; `None` if not known.
    pub certificate_expiry: Option<u64>,
}

/// Metrics of TLS. Not in the registry, because they are exported only where TLS is used.
#[derive(Debug)]
struct TlsMetrics {
    handshake_errors: Counter,
    certificate_expiry: Gauge,
    reload_successful: Gauge,
    /// Whether any TLS file is watched for changes.
    has_files: AtomicBool,
}

/// Values from `/proc/self`, under the standard names of the Prometheus client libraries.
#[derive(Debug)]
struct Proc {
    cpu: Counter,
    open_fds: Gauge,
    max_fds: Gauge,
    virtual_memory: Gauge,
    resident_memory: Gauge,
    start: Gauge,
    threads: Gauge,
}

impl ProcessMetrics {
    /// Returns all metrics, at zero.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let build = gauges(
            &registry,
            "pathmeter_build_info",
            "Version and target of this build.",
            &["version", "target"],
        );
        let target = concat!(env!("PATHMETER_TARGET"));
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), target]).set(1.0);
        let metrics = Self {
            reload_successful: gauge(
                &registry,
                "pathmeter_config_last_reload_successful",
                "1 if the last configuration read is in use, 0 if it was rejected.",
            ),
            reload_at: gauge(
                &registry,
                "pathmeter_config_last_reload_success_timestamp_seconds",
                "Unix time at which the configuration in use was read.",
            ),
            config_info: gauges(
                &registry,
                "pathmeter_config_info",
                "First 16 hexadecimal digits of the SHA-256 of the configuration in use.",
                &["hash"],
            ),
            peers: gauges(&registry, "pathmeter_peers", "Peers and targets by state.", &["state"]),
            resolve_failures: integer(
                &registry,
                "pathmeter_resolve_failures_total",
                "Failed DNS lookups of peer and target names.",
            ),
            state_dir_write_failures: integer(
                &registry,
                "pathmeter_state_dir_write_failures_total",
                "Failed attempts to store events, traces and budgets in state_dir.",
            ),
            series_dropped: gauge(
                &registry,
                "pathmeter_paths_not_exported",
                "Paths that are measured but not exported because of metrics.series_max.",
            ),
            http_connections: gauge(&registry, "pathmeter_http_connections", "Open HTTP connections."),
            http_accept_errors: counter(
                &registry,
                "pathmeter_http_accept_errors_total",
                "Errors while accepting HTTP connections.",
            ),
            http_responses: counters(
                &registry,
                "pathmeter_http_responses_total",
                "HTTP responses by class of status code.",
                &["code"],
            ),
            tls: TlsMetrics {
                handshake_errors: Counter::new(
                    "pathmeter_http_tls_handshake_errors_total",
                    "HTTP connections whose TLS handshake failed.",
                )
                .expect(VALID),
                certificate_expiry: Gauge::new(
                    "pathmeter_http_tls_certificate_expiry_timestamp_seconds",
                    "Unix time at which the certificate of the HTTP port expires.",
                )
                .expect(VALID),
                reload_successful: Gauge::new(
                    "pathmeter_tls_files_last_reload_successful",
                    "1 if the latest version of every certificate, key and web config file is in use, else 0.",
                )
                .expect(VALID),
                has_files: AtomicBool::new(false),
            },
            discovery: ProviderMetrics::new(&registry),
            proc: Proc {
                cpu: counter(
                    &registry,
                    "process_cpu_seconds_total",
                    "Total user and system CPU time spent in seconds.",
                ),
                open_fds: gauge(&registry, "process_open_fds", "Number of open file descriptors."),
                max_fds: gauge(&registry, "process_max_fds", "Maximum number of open file descriptors."),
                virtual_memory: gauge(
                    &registry,
                    "process_virtual_memory_bytes",
                    "Virtual memory size in bytes.",
                ),
                resident_memory: gauge(
                    &registry,
                    "process_resident_memory_bytes",
                    "Resident memory size in bytes.",
                ),
                start: gauge(
                    &registry,
                    "process_start_time_seconds",
                    "Start time of the process since unix epoch in seconds.",
                ),
                threads: gauge(&registry, "process_threads", "Number of OS threads in the process."),
            },
            hash: Mutex::new(None),
            registry,
        };
        metrics.proc.start.set(seconds_since_1970());
        metrics
    }

    /// Records that the configuration with this hash was applied, or that one was rejected (`None`).
    pub fn reloaded(&self, hash: Option<&str>) {
        self.reload_successful.set(if hash.is_some() { 1.0 } else { 0.0 });
        let Some(hash) = hash else { return };
        self.reload_at.set(seconds_since_1970().floor());
        let mut known = self.hash.lock().expect("no holder of the lock panics");
        if let Some(old) = known.replace(hash.to_owned()) {
            // The label is already gone if the same configuration was read twice.
            let _ = self.config_info.remove_label_values(&[&old]);
        }
        self.config_info.with_label_values(&[hash]).set(1.0);
    }

    /// Sets whether the latest TLS files are in use; `None` if there are none.
    pub fn set_tls_files(&self, are_latest: Option<bool>) {
        self.tls.has_files.store(are_latest.is_some(), Relaxed);
        self.tls.reload_successful.set(if are_latest == Some(true) { 1.0 } else { 0.0 });
    }

    /// Sets the number of peers and targets in each state.
    pub fn set_peers(&self, count: impl Fn(PeerState) -> usize) {
        for state in PeerState::ALL {
            #[expect(clippy::cast_precision_loss, reason = "there are fewer than 2⁵² peers")]
            self.peers.with_label_values(&[state.name()]).set(count(state) as f64);
        }
    }

    /// Replaces the metrics of all discovery providers. Providers that are not listed lose their series.
    pub fn set_providers<'a>(&self, providers: impl Iterator<Item = ProviderCounts<'a>>) {
        self.discovery.set(providers);
    }

    /// Counts a failed DNS lookup of a peer's name.
    pub fn resolve_failed(&self) {
        self.resolve_failures.inc();
    }

    /// Counts a failed attempt to store events, traces and budgets.
    pub fn state_write_failed(&self) {
        self.state_dir_write_failures.inc();
    }

    /// Sets the number of paths that are not exported.
    pub fn set_series_dropped(&self, paths: usize) {
        #[expect(clippy::cast_precision_loss, reason = "there are fewer than 2⁵² paths")]
        self.series_dropped.set(paths as f64);
    }

    /// Updates the metrics that are read on demand, and returns all families.
    #[must_use]
    pub fn gather(&self, http: &HttpCounts) -> Vec<MetricFamily> {
        #[expect(clippy::cast_precision_loss, reason = "counts below 2⁵²")]
        let float = |value: u64| value as f64;
        self.http_connections.set(float(http.connections));
        let behind = float(http.accept_errors) - self.http_accept_errors.get();
        self.http_accept_errors.inc_by(behind.max(0.0));
        for (code, count) in http.responses {
            let counter = self.http_responses.with_label_values(&[code]);
            counter.inc_by((float(count) - counter.get()).max(0.0));
        }
        self.proc.read();
        let mut families = self.registry.gather();
        if let Some(counts) = http.tls {
            let behind = float(counts.handshake_errors) - self.tls.handshake_errors.get();
            self.tls.handshake_errors.inc_by(behind.max(0.0));
            families.extend(self.tls.handshake_errors.collect());
            if let Some(expiry) = counts.certificate_expiry {
                self.tls.certificate_expiry.set(float(expiry));
                families.extend(self.tls.certificate_expiry.collect());
            }
        }
        if self.tls.has_files.load(Relaxed) {
            families.extend(self.tls.reload_successful.collect());
        }
        families
    }
}

impl Default for ProcessMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Proc {
    /// Reads the current values. Values that cannot be read stay unchanged: `/proc` may not be mounted.
    fn read(&self) {
        if let Ok(stat) = fs::read_to_string("/proc/self/stat") {
            self.stat(&stat);
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // The descriptor of the directory being read does not count.
            #[expect(clippy::cast_precision_loss, reason = "there are fewer than 2⁵² descriptors")]
            self.open_fds.set(open.count().saturating_sub(1) as f64);
        }
        if let Ok((soft, _)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
            #[expect(clippy::cast_precision_loss, reason = "displayed only")]
            self.max_fds.set(soft as f64);
        }
    }

    /// Reads the fields of `/proc/self/stat`, numbered from 1 as in proc(5). Fields are counted from the
    /// closing parenthesis of the process name, which can contain spaces.
    fn stat(&self, stat: &str) {
        let ticks = system(SysconfVar::CLK_TCK, 100);
        let page = system(SysconfVar::PAGE_SIZE, 4_096);
        let Some((_, rest)) = stat.rsplit_once(')') else { return };
        let fields: Vec<f64> = rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0.0);
        let cpu = (field(14) + field(15)) / ticks;
        self.cpu.inc_by((cpu - self.cpu.get()).max(0.0));
        self.threads.set(field(20));
        self.virtual_memory.set(field(23));
        self.resident_memory.set(field(24) * page);
    }
}

fn system(what: SysconfVar, usual: u32) -> f64 {
    let value = sysconf(what).ok().flatten().and_then(|value| u32::try_from(value).ok());
    f64::from(value.unwrap_or(usual))
}

fn seconds_since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
