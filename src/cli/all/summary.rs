//! The results of `probe all`, and the parts that have failed.

use anyhow::anyhow;
use pathmeter_proto::bandwidth::RunDirection;
use serde::Serialize;
use serde_json::Value;

use super::super::Failure;
use super::super::echo::SummaryJson;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Part {
    Latency,
    Route,
    /// From the target.
    Download,
    /// To the target.
    Upload,
}

impl Part {
    /// The parts in the order in which they are measured: those of the idle path, then those that load it.
    pub(super) const IN_ORDER: [Self; 4] = [Self::Latency, Self::Route, Self::Download, Self::Upload];

    /// The part that loads this direction.
    pub(super) const fn of_direction(direction: RunDirection) -> Self {
        match direction {
            RunDirection::Forward => Self::Upload,
            RunDirection::Reverse => Self::Download,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Route => "route",
            Self::Download => "download",
            Self::Upload => "upload",
        }
    }
}

/// The object of `--json`: of each part what its own command prints.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    target: String,
    pub(super) latency: Option<SummaryJson>,
    pub(super) route: Option<Value>,
    pub(super) download: Option<Value>,
    pub(super) upload: Option<Value>,
    errors: Vec<PartError>,
}

/// Why a part has failed.
#[derive(Debug, Serialize)]
struct PartError {
    part: Part,
    message: String,
}

impl Summary {
    pub(super) fn new(target: &str) -> Self {
        let target = target.to_owned();
        Self { target, latency: None, route: None, download: None, upload: None, errors: Vec::new() }
    }

    /// Adds that a part has failed.
    pub(super) fn fail(&mut self, part: Part, message: String) {
        self.errors.push(PartError { part, message });
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// Returns an error if a part has failed, or nothing was measured before an interruption.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let Self { latency, route, download, upload, errors, .. } = self;
        if !errors.is_empty() {
            let failed: Vec<&str> = errors.iter().map(|error| error.part.name()).collect();
            let (count, all, failed) = (failed.len(), Part::IN_ORDER.len(), failed.join(", "));
            return Err(anyhow!("{count} of {all} parts failed: {failed}").into());
        }
        let is_empty = latency.is_none() && [route, download, upload].iter().all(|part| part.is_none());
        if is_empty { Err(Failure::AlreadyReported) } else { Ok(()) }
    }
}
