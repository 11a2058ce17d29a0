//! `pathmeter run` and `pathmeter check`.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use super::{CheckArguments, Failure, RunArguments, host, print_out, runtime};
use crate::api::routes::ReloadRequest;
use crate::config;
use crate::daemon::{self, Daemon};
use crate::logging;
use crate::settings::{Settings, SettingsError};
use crate::systemd::Notifier;

pub(super) fn run(arguments: &RunArguments) -> Result<(), Failure> {
    let host = host(&arguments.identity);
    let settings = Settings::read(&arguments.config, &host)?;
    let log = &settings.config.log;
    let level = arguments.log_level.as_deref().unwrap_or(&log.level);
    let handle =
        logging::init(level, daemon::log_format(log.format)).map_err(|error| match arguments.log_level {
            Some(_) => Failure::Usage(format!("--log-level: {error}")),
            None => Failure::Runtime(anyhow::Error::new(error).context("initializing logging")),
        })?;
    // A level from the command line overrides the file, also after a reload.
    let handle = arguments.log_level.is_none().then_some(handle);
    if let Err(error) = raise_open_files_limit() {
        warn!(%error, "cannot raise the limit of open files");
    }
    let source =
        daemon::ConfigSource::File { path: arguments.config.clone(), host, is_watched: arguments.watch };
    runtime()?.block_on(async {
        // First, because a signal without a handler ends the process.
        let signals = Signals::register()?;
        let daemon = Daemon::start(settings, source, handle, Notifier::from_environment())?;
        let (stop, stopped) = watch::channel(false);
        let handler = tokio::spawn(signals.handle(stop, daemon.reloads()));
        daemon.run(stopped).await;
        handler.abort();
        Ok(())
    })
}

/// Raises the soft limit of open files to the hard limit: every connection takes a file descriptor, and the
/// usual soft limit is chosen for programs that use `select`.
fn raise_open_files_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// The signals that the agent handles.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn register() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn handle(mut self, stop: watch::Sender<bool>, reloads: mpsc::Sender<ReloadRequest>) {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => {
                    info!("received SIGHUP, reloading the configuration");
                    let (done, _) = oneshot::channel();
                    let _ = reloads.send(done).await;
                }
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
            }
        }
        let _ = stop.send(true);
        // Keeps the sender of `stop` until the daemon has stopped and aborts this task.
        std::future::pending::<()>().await;
    }
}

pub(super) fn check(arguments: &CheckArguments) -> Result<(), Failure> {
    let path = &arguments.file;
    let text = fs::read(path).map_err(|source| SettingsError::Read { path: path.clone(), source })?;
    let file = path.display().to_string();
    if arguments.web_config {
        return check_web(&file, &text);
    }
    let loaded = config::load(&text, &host(&arguments.identity))
        .map_err(|problems| SettingsError::Problems { file: file.clone(), problems })?;
    for warning in &loaded.warnings {
        print_out(&format!("{file}: warning: {warning}\n"))?;
    }
    let config = &loaded.config;
    let counted = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    let mut counts = vec![counted(config.peers.len(), "peer"), counted(config.targets.len(), "target")];
    if !config.providers.is_empty() {
        counts.push(counted(config.providers.len(), "provider"));
    }
    counts.push(counted(config.probes.len(), "probe"));
    print_out(&format!("{file}: ok: agent {}, {}\n", config.agent.name, counts.join(", ")))
}

/// Checks a web config file. The files that it names are not opened, as with a configuration.
fn check_web(file: &str, text: &[u8]) -> Result<(), Failure> {
    let loaded = config::web::load(text, Path::new(""))
        .map_err(|problems| SettingsError::Problems { file: file.to_owned(), problems })?;
    for warning in &loaded.warnings {
        print_out(&format!("{file}: warning: {warning}\n"))?;
    }
    let tls = if loaded.config.tls.is_some() { "with TLS" } else { "without TLS" };
    print_out(&format!("{file}: ok: HTTP {tls}, {} users\n", loaded.config.users.len()))
}
