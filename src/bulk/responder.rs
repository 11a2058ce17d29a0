//! The responder of bandwidth runs: it assigns connections to leases and runs its end.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pathmeter_proto::admission::rate_limit_key;
use pathmeter_proto::bandwidth::lease::{AttachError, LeaseId};
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, MESSAGE_BYTES, MessageSeal, RunEnd, RunMessage};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use super::control::{Control, MESSAGE_TIME_MAX, write_all};
use super::endpoint::{self, EndpointPlan};
use super::leases::{LeasedRun, Leases};
use super::transfer;
use crate::stream::bulk::BulkConnection;

/// Accepts the connections of runs.
#[derive(Debug)]
pub(super) struct BulkResponder {
    leases: Arc<Leases>,
    /// Runs whose control connection is open, and where their data connections go.
    runs: Mutex<HashMap<LeaseId, mpsc::Sender<TcpStream>>>,
    /// Connections that have not proven a lease yet, by source.
    unproven: Mutex<HashMap<IpAddr, usize>>,
}

/// Maximum connections that have not proven a lease; further ones are closed. Chosen: those of all runs that
/// a responder can have begin within a moment.
pub(crate) const UNPROVEN_MAX: usize = 1_024;

/// The same of each source address, or IPv6 /64.
pub(crate) const UNPROVEN_PER_SOURCE: usize = 256;

impl BulkResponder {
    pub(super) fn new(leases: Arc<Leases>) -> Self {
        Self { leases, runs: Mutex::default(), unproven: Mutex::default() }
    }

    /// Handles a connection until the end of its run.
    pub(super) async fn accept(self: Arc<Self>, connection: BulkConnection) {
        let source = connection.source;
        if let Err(error) = self.serve(connection).await {
            debug!(%source, %error, "connection of a bandwidth run ended");
        }
    }

    async fn serve(&self, connection: BulkConnection) -> anyhow::Result<()> {
        let unproven = Unproven::new(self, connection.source.ip())?;
        let mut stream = TcpStream::from_std(connection.stream)?;
        let mut first = [0; MESSAGE_BYTES];
        let (read, rest) = first.split_at_mut(connection.greeting.len());
        read.copy_from_slice(&connection.greeting);
        timeout(MESSAGE_TIME_MAX, stream.read_exact(rest)).await??;
        let RunMessage::Activate { lease, connection: number } = RunMessage::decode(&first)? else {
            anyhow::bail!("the first message does not activate a lease");
        };
        let Some(run) = self.leases.leased(lease) else {
            return refuse(&stream, lease, ActivationStatus::Invalid).await;
        };
        let mut received = MessageSeal::new(&run.secret, RunEnd::Prober);
        if received.decode(&first).is_err() {
            return refuse(&stream, lease, ActivationStatus::Unauthentic).await;
        }
        let of_run = self.runs().get(&lease).cloned();
        if number > 0 && of_run.is_none() {
            return refuse(&stream, lease, ActivationStatus::Invalid).await;
        }
        if let Err(error) = self.leases.attach(lease, number) {
            return refuse(&stream, lease, status_of(error)).await;
        }
        drop(unproven);
        let control = Control::accepted(stream, &run.secret, received);
        match of_run.filter(|_| number > 0) {
            Some(of_run) => join(control, lease, &run, &of_run).await,
            None => self.begin(control, lease, run).await,
        }
    }

    /// Begins a run with its control connection, and stays until its end.
    async fn begin(&self, control: Control, lease: LeaseId, run: LeasedRun) -> anyhow::Result<()> {
        let (sender, connections) = mpsc::channel(run.request.connections.into());
        self.runs().insert(lease, sender);
        // Also when this future is dropped.
        let _registered = Registered { responder: self, lease };
        self.run(control, lease, run, connections).await
    }

    async fn run(
        &self,
        mut control: Control,
        lease: LeaseId,
        run: LeasedRun,
        mut connections: mpsc::Receiver<TcpStream>,
    ) -> anyhow::Result<()> {
        control.stream().set_nodelay(true)?;
        set_dscp(control.stream(), &run)?;
        control.send(&RunMessage::Activated { lease, status: ActivationStatus::Granted }).await?;
        let mut data = Vec::with_capacity(run.request.connections.into());
        let all = async {
            while data.len() < usize::from(run.request.connections) {
                let Some(stream) = connections.recv().await else { break };
                data.push(stream);
            }
        };
        timeout(MESSAGE_TIME_MAX, all).await?;
        let message = control.receive_soon().await?;
        anyhow::ensure!(message == RunMessage::Start, "unexpected {message:?}");
        let plan = EndpointPlan {
            is_prober: false,
            is_sender: run.request.direction == RunDirection::Reverse,
            bytes_max: run.bytes_max,
            rate_max: run.rate_max,
            duration: Duration::from_secs(run.request.seconds_max),
        };
        let mut counted = 0;
        let supervise = |progress: Progress| {
            let new = progress.bytes.saturating_sub(counted);
            counted = progress.bytes;
            let is_within = self.leases.count_bytes(lease, new) && self.leases.is_valid(lease);
            (!is_within).then_some(StopReason::Lease)
        };
        let outcome = endpoint::run(control, data, plan, supervise).await;
        self.leases.count_bytes(lease, outcome.bytes.saturating_sub(counted));
        Ok(())
    }

    fn runs(&self) -> MutexGuard<'_, HashMap<LeaseId, mpsc::Sender<TcpStream>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that has not proven a lease yet.
struct Unproven<'a> {
    responder: &'a BulkResponder,
    source: IpAddr,
}

impl<'a> Unproven<'a> {
    /// Counts a connection.
    fn new(responder: &'a BulkResponder, source: IpAddr) -> anyhow::Result<Self> {
        let source = rate_limit_key(source);
        let mut unproven = responder.unproven.lock().unwrap_or_else(PoisonError::into_inner);
        anyhow::ensure!(
            unproven.values().sum::<usize>() < UNPROVEN_MAX,
            "too many connections have no lease"
        );
        let of_source = unproven.entry(source).or_default();
        anyhow::ensure!(
            *of_source < UNPROVEN_PER_SOURCE,
            "too many connections of this source have no lease"
        );
        *of_source += 1;
        Ok(Self { responder, source })
    }
}

impl Drop for Unproven<'_> {
    fn drop(&mut self) {
        let mut unproven = self.responder.unproven.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_source) = unproven.get_mut(&self.source) {
            *of_source -= 1;
            if *of_source == 0 {
                unproven.remove(&self.source);
            }
        }
    }
}

/// A run whose control connection is open. Dropping it ends the lease.
struct Registered<'a> {
    responder: &'a BulkResponder,
    lease: LeaseId,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.responder.runs().remove(&self.lease);
        self.responder.leases.end(self.lease);
    }
}

/// Adds a data connection to its run.
async fn join(
    mut control: Control,
    lease: LeaseId,
    run: &LeasedRun,
    of_run: &mpsc::Sender<TcpStream>,
) -> anyhow::Result<()> {
    prepare(control.stream(), run)?;
    control.send(&RunMessage::Activated { lease, status: ActivationStatus::Granted }).await?;
    // The run may have ended.
    let _ = of_run.send(control.into_stream()).await;
    Ok(())
}

/// Sets the options of a data connection.
fn prepare(stream: &TcpStream, run: &LeasedRun) -> io::Result<()> {
    set_dscp(stream, run)?;
    transfer::limit(stream, run.rate_max, run.request.connections)
}

fn set_dscp(stream: &TcpStream, run: &LeasedRun) -> io::Result<()> {
    let dscp = Dscp::new(run.request.dscp).unwrap_or_default();
    // An IPv4 client of a socket for both families has the options of IPv4.
    let is_v4 = stream.local_addr()?.ip().to_canonical().is_ipv4();
    transfer::set_dscp(stream, is_v4, dscp)
}

/// Answers with a refusal, which is not signed: the client may not know the secret.
async fn refuse(stream: &TcpStream, lease: LeaseId, status: ActivationStatus) -> anyhow::Result<()> {
    write_all(stream, &RunMessage::Activated { lease, status }.encode()).await.map_err(io::Error::other)?;
    anyhow::bail!("refused: {status:?}")
}

const fn status_of(error: AttachError) -> ActivationStatus {
    match error {
        AttachError::Invalid => ActivationStatus::Invalid,
        AttachError::Taken => ActivationStatus::Taken,
    }
}
