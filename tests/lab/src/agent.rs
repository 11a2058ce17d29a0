//! A running agent process.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{DEADLINE, MetricsPage, Program, Response, eventually};

/// Sends an HTTP request, a method and a path, to the agent.
pub type SendRequest<'a> = Box<dyn Fn(&str, &str) -> io::Result<Response> + Send + Sync + 'a>;

/// A running agent with its configuration and log in a folder of its own. Killed when dropped.
pub struct AgentProcess<'a> {
    program: Program,
    folder: TempDir,
    send_request: SendRequest<'a>,
}

impl<'a> AgentProcess<'a> {
    /// Starts `command run --config FILE`, with the file [`CONFIG`] of a folder, and without the environment
    /// variables of [`clear_environment`]. Does not wait until the agent is ready.
    ///
    /// # Panics
    /// When the program cannot be started.
    #[must_use]
    pub fn start(
        mut command: Command,
        environment: &[(&str, &str)],
        folder: TempDir,
        send_request: SendRequest<'a>,
    ) -> Self {
        clear_environment(&mut command);
        command.arg("run").arg("--config").arg(folder.path().join(CONFIG)).envs(environment.iter().copied());
        let program = Program::start(&mut command, &folder.path().join(LOG));
        Self { program, folder, send_request }
    }

    /// Wraps an agent that was started elsewhere and logs to the file [`LOG`] of `folder`.
    #[must_use]
    pub fn from_child(child: Child, folder: TempDir, send_request: SendRequest<'a>) -> Self {
        Self { program: Program::from_child(child, &folder.path().join(LOG)), folder, send_request }
    }

    /// Waits until the agent is ready.
    ///
    /// # Errors
    /// The log, if the agent exited instead.
    pub fn when_ready(mut self) -> Result<Self, String> {
        let is_ready = eventually("the agent is ready", || match self.program.try_wait() {
            Some(_) => Some(false),
            None => (self.send_request)("GET", "/-/ready")
                .ok()
                .filter(|answer| answer.status == 200)
                .map(|_| true),
        });
        if is_ready { Ok(self) } else { Err(self.log()) }
    }

    /// Returns the response to a request.
    ///
    /// # Panics
    /// When there is no response, with the log.
    pub fn request(&self, method: &str, path: &str) -> Response {
        (self.send_request)(method, path)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}\n{}", self.log()))
    }

    /// Returns the response to a GET request.
    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path)
    }

    /// Sends a POST request without a body.
    pub fn post(&self, path: &str) -> Response {
        self.request("POST", path)
    }

    /// Requests a path and parses its body as JSON.
    pub fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path).body).unwrap()
    }

    /// Scrapes the metrics page.
    pub fn page(&self) -> MetricsPage {
        MetricsPage::parse(&self.get("/metrics").body)
    }

    /// Scrapes until the page fulfils a condition, and returns that page.
    ///
    /// # Panics
    /// After [`DEADLINE`], with the last page and the log.
    pub fn page_when(&self, what: &str, is_so: impl Fn(&MetricsPage) -> bool) -> MetricsPage {
        self.page_within(DEADLINE, what, is_so)
    }

    /// [`Self::page_when`] with another deadline.
    pub fn page_within(
        &self,
        deadline: Duration,
        what: &str,
        mut is_so: impl FnMut(&MetricsPage) -> bool,
    ) -> MetricsPage {
        let start = Instant::now();
        loop {
            let page = self.page();
            if is_so(&page) {
                return page;
            }
            assert!(start.elapsed() < deadline, "timed out waiting for: {what}\n{page}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Path of a file beside the configuration.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Path of the configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.file(CONFIG)
    }

    /// Writes the configuration file. The agent applies it at the next reload.
    pub fn rewrite(&self, config: &str) {
        fs::write(self.config_file(), config).unwrap();
    }

    /// Requests a reload over HTTP.
    pub fn reload(&self) -> Response {
        self.post("/-/reload")
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        self.program.signal(signal);
    }

    /// Waits until the process exits.
    pub fn wait(&mut self) -> ExitStatus {
        self.program.wait()
    }

    /// Everything logged so far.
    pub fn log(&self) -> String {
        self.program.output()
    }
}

impl fmt::Debug for AgentProcess<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("program", &self.program)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// Removes the environment variables that would change the behaviour of the program.
pub fn clear_environment(command: &mut Command) {
    for variable in [
        "PATHMETER_NAME",
        "PATHMETER_LABELS",
        "PATHMETER_WATCH",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
    ] {
        command.env_remove(variable);
    }
}

/// File name of the configuration in an agent's folder.
pub const CONFIG: &str = "config.yaml";
/// File name of the log in an agent's folder.
pub const LOG: &str = "log";
