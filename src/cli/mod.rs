//! The command line.

mod demo;
mod echo;
mod run;
mod tls;

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

/// Measures the network between hosts: loss by direction, RTT and jitter, on /metrics.
#[derive(Debug, Parser)]
#[command(name = "pathmeter", version, about, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

const EXIT_CODES: &str = "\
Exit codes: 0 ok, 1 it did not work, 2 the command line is wrong, 78 the configuration is wrong.
Try `pathmeter demo`: three agents on loopback, no configuration.";

#[derive(Debug, Subcommand)]
enum Action {
    /// Run the agent: measure, answer, export
    Run(RunArguments),
    /// Check a configuration file without opening a socket
    Check(CheckArguments),
    /// Measure once, now
    Probe {
        #[command(subcommand)]
        kind: ProbeCommand,
    },
    /// Run three agents on loopback that measure each other
    Demo(DemoArguments),
    /// Exit 0 if the agent on this host is ready; for containers
    Healthcheck(HealthcheckArguments),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages, for packages
    #[command(hide = true)]
    Man {
        /// The folder in which they are written
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ProbeCommand {
    /// Loss by direction, RTT and jitter to one host
    Echo(Box<echo::EchoArguments>),
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/pathmeter/config.yaml")]
    config: PathBuf,
    #[command(flatten)]
    identity: IdentityArguments,
    /// Read the configuration again whenever it or a key file has changed, as at SIGHUP
    #[arg(long, env = "PATHMETER_WATCH")]
    watch: bool,
    /// Log this instead of log.level: error, warn, info, debug, trace, or a filter such as warn,pathmeter=debug
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Debug, Default, Args)]
struct IdentityArguments {
    /// Our name among the peers, instead of agent.name
    #[arg(long, value_name = "NAME", env = "PATHMETER_NAME")]
    name: Option<String>,
    /// A label of ours, above agent.labels; one without a text is none
    #[arg(long = "label", value_name = "NAME=TEXT", env = "PATHMETER_LABELS", value_delimiter = ',', value_parser = label)]
    labels: Vec<Label>,
}

/// A label, if it has a text.
type Label = Option<(String, String)>;

#[derive(Debug, Args)]
struct CheckArguments {
    /// The configuration file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// FILE is not a configuration, but what tls.web_config_file names
    #[arg(long)]
    web_config: bool,
    #[command(flatten)]
    identity: IdentityArguments,
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// End after this long, with a summary
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
}

#[derive(Debug, Args)]
struct HealthcheckArguments {
    /// Where the agent serves HTTP, behind https:// if with TLS
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9862", value_parser = tls::address)]
    address: (bool, SocketAddr),
    /// The mesh key, if the agent wants to know who asks
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArguments,
}

/// Why a command did not do what it was asked, with the exit code that says so.
#[derive(Debug)]
enum Failure {
    /// Exit 1.
    Runtime(anyhow::Error),
    /// Exit 78 (EX_CONFIG of sysexits.h).
    Config(SettingsError),
    /// Exit 2: the command line asks for what there is not.
    Usage(String),
    /// Exit 1; everything that is to be said has been said.
    Quiet,
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

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = act(Cli::parse().action);
    let (code, message) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Quiet) => return ExitCode::from(1),
        Err(Failure::Usage(message)) => (2, format!("{message}\n\nFor more information, try '--help'.")),
        Err(Failure::Runtime(error)) => (1, told(&error)),
        Err(Failure::Config(error)) => (78, error.to_string()),
    };
    // Standard error may be closed; the exit code says it too.
    let _ = writeln!(io::stderr(), "error: {message}");
    ExitCode::from(code)
}

fn act(action: Action) -> Result<(), Failure> {
    #[cfg(feature = "clock-faults")]
    if crate::clock::fault_injection::begin().map_err(anyhow::Error::from)? {
        let _ = writeln!(io::stderr(), "warning: a clock drill is on: times are wrong on purpose");
    }
    match action {
        Action::Run(arguments) => run::run(&arguments),
        Action::Check(arguments) => run::check(&arguments),
        Action::Probe { kind: ProbeCommand::Echo(arguments) } => echo::run(&arguments),
        Action::Demo(arguments) => demo::demo(&arguments),
        Action::Healthcheck(arguments) => healthcheck(&arguments),
        Action::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pathmeter", &mut io::stdout());
            Ok(())
        }
        Action::Man { folder } => Ok(clap_mangen::generate_to(Cli::command(), folder)?),
    }
}

/// An error with its causes, each once: many errors already say what caused them.
fn told(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).fold(error.to_string(), |told, cause| {
        if told.contains(&cause) { told } else { format!("{told}: {cause}") }
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
                let words = String::from_utf8_lossy(&answer.body).trim().to_owned();
                Err(anyhow::anyhow!("{address} is not ready: {} {words}", answer.status).into())
            }
            Err(error) => Err(anyhow::Error::from(error).into()),
        }
    })
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// What a configuration is read for on this host.
fn host(identity: &IdentityArguments) -> LoadContext {
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    LoadContext {
        name_override: identity.name.clone(),
        hostname: hostname.unwrap_or_else(|| "localhost".to_owned()),
        labels: identity.labels.iter().flatten().cloned().collect(),
    }
}

/// An environment that has nothing to say says an empty text.
fn label(text: &str) -> Result<Label, String> {
    if text.is_empty() { Ok(None) } else { label_argument(text) }
}

/// Writes to standard output; a reader that has gone, as in `| head`, is a reason to stop and no error to show.
fn say(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Quiet),
        outcome => Ok(outcome?),
    }
}
