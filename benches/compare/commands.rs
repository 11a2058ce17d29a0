//! The commands that were run.

use std::collections::BTreeSet;

use crate::host_pair::HostPair;
use crate::tools::Tool;

/// Installed programs, and the commands that were run.
#[derive(Default)]
pub(crate) struct Commands {
    present: BTreeSet<&'static str>,
    all: Vec<String>,
}

impl Commands {
    pub(crate) fn new(present: impl Iterator<Item = &'static str>) -> Self {
        Self { present: present.collect(), all: Vec::new() }
    }

    pub(crate) fn has(&self, program: &str) -> bool {
        self.present.contains(program)
    }

    pub(crate) fn present(&self, tools: &[Tool]) -> Vec<Tool> {
        tools.iter().filter(|tool| self.has(tool.program)).copied().collect()
    }

    /// Records the commands that were run on a pair of hosts.
    pub(crate) fn record(&mut self, pair: &HostPair) {
        for command in &pair.commands {
            self.add(command.clone());
        }
    }

    /// Records a command, as typed in a shell.
    pub(crate) fn add(&mut self, command: String) {
        if !self.all.contains(&command) {
            self.all.push(command);
        }
    }

    /// Returns the commands since the last call.
    pub(crate) fn take(&mut self) -> String {
        std::mem::take(&mut self.all).join("\n")
    }
}
