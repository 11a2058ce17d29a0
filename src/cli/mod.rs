//! The command line.

mod all;
mod bandwidth;
mod demo;
mod echo;
mod interrupt;
mod run;
mod target;
mod tls;
mod trace;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::config::{Https, LoadContext, Trust, label_argument};
use crate::http::auth::Signer;
use crate::http::client::Client;
use crate::keys;
use crate::settings::SettingsError;
use tls::TlsArguments;

/// Measures the network between hosts: loss by direction, RTT and jitter, exported at /metrics
#[derive(Debug, Parser)]
#[command(name = "pathmeter", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

const EXIT_CODES: &str = "\
Exit codes: 0 success, 1 failure, 2 invalid command line, 78 invalid configuration.
To try it without a configuration: `pathmeter demo` runs three agents on loopback.";

#[derive(Debug, Subcommand)]
enum Action {
    /// Run the agent: measure, answer other agents, export metrics
    Run(RunArguments),
    /// Check a configuration file without starting the agent
    Check(CheckArguments),
    /// Measure one host once
    Probe {
        #[command(subcommand)]
        kind: ProbeCommand,
    },
    /// Run three agents on loopback that measure each other
    Demo(DemoArguments),
    /// Exit with 0 if the agent on this host is ready (for container health checks)
    Healthcheck(HealthcheckArguments),
    /// Print the completion script for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages (for packages)
    #[command(hide = true)]
    Man {
        /// Directory to write to
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ProbeCommand {
    /// Measure latency, route, download and upload to one host, one after the other
    All(Box<all::AllArguments>),
    /// Measure loss by direction, RTT and jitter to one host
    Echo(Box<echo::EchoArguments>),
    /// Measure throughput to and from one agent, and the latency under load
    Bandwidth(Box<bandwidth::BandwidthArguments>),
    /// Show the routers on the way to one host and back
    Trace(Box<trace::TraceArguments>),
}

#[derive(Debug, Args)]
struct RunArguments {
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/pathmeter/config.yaml")]
    config: PathBuf,
    #[command(flatten)]
    identity: IdentityArguments,
    /// Reload the configuration when it or a key file changes, as on SIGHUP
    #[arg(long, env = "PATHMETER_WATCH")]
    watch: bool,
    /// Log level instead of log.level: off, error, warn, info, debug, trace, or a filter
    /// (warn,pathmeter=debug)
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Debug, Default, Args)]
struct IdentityArguments {
    /// Name of this agent, instead of agent.name
    #[arg(long, value_name = "NAME", env = "PATHMETER_NAME")]
    name: Option<String>,
    /// Label of this agent, overrides agent.labels; may be repeated; ignored if VALUE is empty
    #[arg(long = "label", value_name = "NAME=VALUE", env = "PATHMETER_LABELS")]
    #[arg(value_delimiter = ',', value_parser = label)]
    labels: Vec<Label>,
}

/// A label; `None` if its value is empty.
type Label = Option<(String, String)>;

#[derive(Debug, Args)]
struct CheckArguments {
    /// Configuration file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// FILE is a web configuration file, as named by tls.web_config_file
    #[arg(long)]
    web_config: bool,
    #[command(flatten)]
    identity: IdentityArguments,
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// Stop after N seconds and print a summary
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
}

#[derive(Debug, Args)]
struct HealthcheckArguments {
    /// HTTP address of the agent, with the prefix https:// if it serves TLS
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9862", value_parser = tls::address)]
    address: (bool, SocketAddr),
    /// Mesh key file, if the agent requires authentication
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArguments,
}

/// Why a command failed; determines the exit code.
#[derive(Debug)]
enum Failure {
    /// Exit 1.
    Runtime(anyhow::Error),
    /// Exit 78 (EX_CONFIG of sysexits.h).
    Config(SettingsError),
    /// Exit 2: the command line is invalid.
    Usage(String),
    /// Exit 1, without a message: the cause was already printed.
    AlreadyReported,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Runtime(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Runtime(error.into())
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Self::Config(error)
    }
}

/// Parses the command line, runs the command, and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = run_command(Cli::parse().action);
    let (code, message) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::AlreadyReported) => return ExitCode::from(1),
        Err(Failure::Usage(message)) => (2, format!("{message}\n\nFor more information, try '--help'.")),
        Err(Failure::Runtime(error)) => (1, error_with_causes(&error)),
        Err(Failure::Config(error)) => (78, error.to_string()),
    };
    // Standard error may be closed; the exit code reports the failure too.
    let _ = writeln!(io::stderr(), "error: {message}");
    ExitCode::from(code)
}

fn run_command(action: Action) -> Result<(), Failure> {
    #[cfg(feature = "clock-faults")]
    if crate::clock::fault_injection::begin().map_err(anyhow::Error::from)? {
        let _ = writeln!(io::stderr(), "warning: clock faults are injected: times are wrong on purpose");
    }
    match action {
        Action::Run(arguments) => run::run(&arguments),
        Action::Check(arguments) => run::check(&arguments),
        Action::Probe { kind: ProbeCommand::All(arguments) } => all::run(&arguments),
        Action::Probe { kind: ProbeCommand::Echo(arguments) } => echo::run(&arguments),
        Action::Probe { kind: ProbeCommand::Bandwidth(arguments) } => bandwidth::run(&arguments),
        Action::Probe { kind: ProbeCommand::Trace(arguments) } => trace::run(&arguments),
        Action::Demo(arguments) => demo::demo(&arguments),
        Action::Healthcheck(arguments) => healthcheck(&arguments),
        Action::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pathmeter", &mut io::stdout());
            Ok(())
        }
        Action::Man { folder } => Ok(clap_mangen::generate_to(Cli::command(), folder)?),
    }
}

/// A random seed.
fn seed() -> anyhow::Result<u64> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|error| anyhow::anyhow!("reading random bytes: {error}"))?;
    Ok(u64::from_ne_bytes(seed))
}

/// An error and its causes, joined by `: `. A cause that the text already contains is not repeated.
fn error_with_causes(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).fold(error.to_string(), |text, cause| {
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

fn healthcheck(arguments: &HealthcheckArguments) -> Result<(), Failure> {
    let (is_https, address) = arguments.address;
    let host = address.to_string();
    let secure = match is_https {
        true => {
            let https = Https { trust: Trust::default(), server_name: address.ip().to_string() };
            Some(arguments.tls.secure(https)?)
        }
        false => {
            arguments.tls.refuse(&host)?;
            None
        }
    };
    let keys = arguments.key_file.as_deref().map(keys::read).transpose().map_err(SettingsError::from)?;
    let signer = keys.map(|(keys, _)| Signer::new(&keys));
    runtime()?.block_on(async {
        let answer = Client { signer, secure, ..Client::default() }.get(address, &host, "/-/ready").await;
        match answer {
            Ok(answer) if answer.status.is_success() => Ok(()),
            Ok(answer) => {
                let reason = String::from_utf8_lossy(&answer.body).trim().to_owned();
                Err(anyhow::anyhow!("{address} is not ready: {} {reason}", answer.status).into())
            }
            Err(error) => Err(anyhow::Error::from(error).into()),
        }
    })
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// The name and labels of this host, which a configuration is read with.
fn host(identity: &IdentityArguments) -> LoadContext {
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    LoadContext {
        name_override: identity.name.clone(),
        hostname: hostname.unwrap_or_else(|| "localhost".to_owned()),
        labels: identity.labels.iter().flatten().cloned().collect(),
        state_dir: state_directory(std::env::var_os(STATE_DIRECTORY)),
    }
}

/// Set by systemd for `StateDirectory=` (systemd.exec(5)).
const STATE_DIRECTORY: &str = "STATE_DIRECTORY";

/// The first folder of a list that is separated by colons; `None` if there is none.
fn state_directory(list: Option<OsString>) -> Option<PathBuf> {
    let list = list?;
    std::env::split_paths(&list).next().filter(|first| !first.as_os_str().is_empty())
}

/// Parses a label. An empty text is accepted, because an environment variable may be set and empty.
fn label(text: &str) -> Result<Label, String> {
    if text.is_empty() { Ok(None) } else { label_argument(text) }
}

/// Writes to standard output. If its reader has closed it, as `| head` does, the command stops silently.
fn print_out(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::AlreadyReported),
        outcome => Ok(outcome?),
    }
}
