//! The prober of a run: it opens the connections, or the socket of a load, and runs its end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, RunMessage};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::control::{Control, ControlError};
use super::endpoint;
use super::handshake::{self, HANDSHAKE_TIME_MAX};
use super::load;
use super::outcome::RunOutcome;
use super::payload::Payload;
use super::plan::{EndpointPlan, RunMethod};
use super::streams::Streams;
use super::threads::BulkThreads;
use super::transfer;

/// A run with a lease.
#[derive(Debug, Clone)]
pub struct Run {
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
    /// How it measures.
    pub method: RunMethod,
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
    /// The socket of a load could not be opened or used.
    #[error("using a UDP socket to {to}: {source}")]
    Socket {
        /// The agent port.
        to: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The responder does not answer over UDP.
    #[error(
        "{to} does not answer over UDP: open the agent port for UDP in the firewalls between, or use \
         --method tcp"
    )]
    Unanswered {
        /// The agent port.
        to: SocketAddr,
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

impl Run {
    /// Runs it. `supervise` is called each 10 ms with what was sent or received, and returns why the run must
    /// stop, if it must.
    ///
    /// # Errors
    /// [`RunError`] if it did not begin.
    pub async fn run(
        self,
        threads: Arc<BulkThreads>,
        mut supervise: impl FnMut(Progress) -> Option<StopReason>,
    ) -> Result<RunOutcome, RunError> {
        let mut control = self.open(0).await?;
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
        match self.method {
            RunMethod::Tcp { streams } => {
                let data = try_join_all((1..=streams).map(|number| self.open(number))).await?;
                let data = data.into_iter().map(Control::into_stream).collect();
                self.start(&mut control).await?;
                let payload = Payload::Streams(Streams::new(data, &plan));
                let end = endpoint::run(control, payload, plan, supervised).await;
                Ok(RunOutcome::new(self.direction, streams, self.rate_max, end))
            }
            RunMethod::Train | RunMethod::Check { .. } => {
                let socket = self.prove(&mut control).await?;
                self.start(&mut control).await?;
                let flow = threads
                    .begin_load(socket, self.lease, self.method, &plan)
                    .map_err(|source| self.socket_failed(source))?;
                let end = endpoint::run(control, Payload::load(flow), plan, supervised).await;
                Ok(RunOutcome::of_load(self.direction, self.method.check_rate(), end))
            }
        }
    }

    async fn start(&self, control: &mut Control) -> Result<(), RunError> {
        control.send(&RunMessage::Start).await.map_err(|error| self.failed(&error))
    }

    /// Opens the socket of a load, and shows the responder that this host receives there.
    async fn prove(&self, control: &mut Control) -> Result<std::net::UdpSocket, RunError> {
        let failed = |source| self.socket_failed(source);
        let socket = load::open(self.to, self.source, self.dscp, self.method.reception()).map_err(failed)?;
        let socket = UdpSocket::from_std(socket).map_err(failed)?;
        let proven = timeout(HANDSHAKE_TIME_MAX, handshake::prove(&socket, self.lease, &self.secret));
        tokio::select! {
            proven = proven => match proven {
                Ok(()) => {}
                Err(_) => return Err(RunError::Unanswered { to: self.to }),
            },
            // The responder has nothing to say before the start: it has given up.
            Err(error) = control.receive() => return Err(self.failed(&error)),
        }
        socket.into_std().map_err(failed)
    }

    fn socket_failed(&self, source: io::Error) -> RunError {
        RunError::Socket { to: self.to, source }
    }

    /// Opens a connection and activates the lease on it.
    async fn open(&self, connection: u16) -> Result<Control, RunError> {
        let failed = |source| RunError::Connect { to: self.to, source };
        let connected = timeout(CONNECT_TIME_MAX, self.connect()).await;
        let stream = connected.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(failed)?;
        match connection {
            0 => stream.set_nodelay(true).map_err(failed)?,
            _ => transfer::limit(&stream, self.rate_max, self.streams()).map_err(failed)?,
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

    /// Data connections.
    fn streams(&self) -> u16 {
        match self.method {
            RunMethod::Tcp { streams } => streams,
            RunMethod::Train | RunMethod::Check { .. } => 1,
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
