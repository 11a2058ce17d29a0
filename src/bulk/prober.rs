//! The prober of a run over TCP: it opens the connections and runs its end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::future::try_join_all;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, RunMessage};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::control::{Control, ControlError};
use super::endpoint::{self, EndpointPlan};
use super::outcome::RunOutcome;
use super::transfer;

/// A run over TCP with a lease.
#[derive(Debug, Clone)]
pub struct TcpRun {
    /// The agent port of the responder.
    pub to: SocketAddr,
    /// Source address; `None`: the kernel chooses.
    pub source: Option<IpAddr>,
    /// DSCP of what this host sends.
    pub dscp: Dscp,
    /// The lease.
    pub lease: LeaseId,
    /// The secret of the lease.
    pub secret: [u8; 16],
    /// The direction that is loaded.
    pub direction: RunDirection,
    /// Data connections.
    pub streams: u16,
    /// Bytes of payload after which it ends.
    pub bytes_max: u64,
    /// Time of sending after which it ends.
    pub duration: Duration,
    /// Bytes of payload per second; `None`: no limit.
    pub rate_max: Option<u64>,
}

/// Why a run did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A connection could not be opened.
    #[error("connecting to {to}: {source}")]
    Connect {
        /// The agent port.
        to: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The responder did not accept a connection.
    #[error("{to} refused the run: {reason}", reason = refusal(*.status))]
    Refused {
        /// The agent port.
        to: SocketAddr,
        /// The cause.
        status: ActivationStatus,
    },
    /// The exchange of messages failed.
    #[error("beginning a run with {to}: {reason}")]
    Control {
        /// The agent port.
        to: SocketAddr,
        /// The cause.
        reason: String,
    },
}

const fn refusal(status: ActivationStatus) -> &'static str {
    match status {
        ActivationStatus::Granted => "it granted it",
        ActivationStatus::Invalid => "the lease is not valid there, or has ended",
        ActivationStatus::Taken => "the lease has no connection left",
        ActivationStatus::Unauthentic => "the secret of the lease is wrong",
    }
}

/// How long a connection may take to be opened.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(4);

impl TcpRun {
    /// Runs it. `supervise` is called each 10 ms with what was sent or received, and returns why the run must
    /// stop, if it must.
    ///
    /// # Errors
    /// [`RunError`] if it did not begin.
    pub async fn run(
        self,
        mut supervise: impl FnMut(Progress) -> Option<StopReason>,
    ) -> Result<RunOutcome, RunError> {
        let mut control = self.open(0).await?;
        let data = try_join_all((1..=self.streams).map(|number| self.open(number))).await?;
        let data = data.into_iter().map(Control::into_stream).collect();
        control.send(&RunMessage::Start).await.map_err(|error| self.failed(&error))?;
        let plan = EndpointPlan {
            is_prober: true,
            is_sender: self.direction == RunDirection::Forward,
            bytes_max: self.bytes_max,
            rate_max: self.rate_max,
            duration: self.duration,
        };
        let is_too_much = |progress: Progress| !plan.is_sender && progress.bytes > plan.bytes_max;
        let supervised = |progress: Progress| {
            let reason = supervise(progress);
            reason.or_else(|| is_too_much(progress).then_some(StopReason::Peer))
        };
        let end = endpoint::run(control, data, plan, supervised).await;
        Ok(RunOutcome::new(self.direction, self.streams, self.rate_max, end))
    }

    /// Opens a connection and activates the lease on it.
    async fn open(&self, connection: u16) -> Result<Control, RunError> {
        let failed = |source| RunError::Connect { to: self.to, source };
        let connected = timeout(CONNECT_TIME_MAX, self.connect()).await;
        let stream = connected.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(failed)?;
        match connection {
            0 => stream.set_nodelay(true).map_err(failed)?,
            _ => transfer::limit(&stream, self.rate_max, self.streams).map_err(failed)?,
        }
        let mut control = Control::opened(stream, &self.secret);
        let activate = RunMessage::Activate { lease: self.lease, connection };
        control.send(&activate).await.map_err(|error| self.failed(&error))?;
        match control.receive_activation().await.map_err(|error| self.failed(&error))? {
            ActivationStatus::Granted => Ok(control),
            status
            @ (ActivationStatus::Invalid | ActivationStatus::Taken | ActivationStatus::Unauthentic) => {
                Err(RunError::Refused { to: self.to, status })
            }
        }
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let socket = if self.to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        transfer::set_dscp(&socket, self.to.is_ipv4(), self.dscp)?;
        if let Some(source) = self.source {
            socket.bind((source, 0).into())?;
        }
        socket.connect(self.to).await
    }

    fn failed(&self, error: &ControlError) -> RunError {
        RunError::Control { to: self.to, reason: error.to_string() }
    }
}
