//! The responder of bandwidth runs: it assigns connections to leases and runs its end.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use pathmeter_proto::admission::rate_limit_key;
use pathmeter_proto::bandwidth::RunEnd;
use pathmeter_proto::bandwidth::lease::{AttachError, LeaseId};
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, MESSAGE_BYTES, MessageSeal, RunMessage};
use pathmeter_proto::wire::load::{HANDSHAKE_BYTES, Handshake, LoadKey};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use super::Bulk;
use super::control::{Control, MESSAGE_TIME_MAX, write_all};
use super::endpoint;
use super::handshake::{self, Cookies};
use super::leases::LeasedRun;
use super::load;
use super::payload::Payload;
use super::plan::{EndpointPlan, RunMethod};
use super::streams::Streams;
use super::transfer;
use crate::stream::bulk::BulkConnection;

/// Accepts the connections of runs.
#[derive(Debug)]
pub(super) struct BulkResponder {
    bulk: Bulk,
    cookies: Cookies,
    /// Runs whose control connection is open, and where their data connections go.
    runs: Mutex<HashMap<LeaseId, mpsc::Sender<DataPath>>>,
    /// Connections that have not proven a lease yet, by source.
    unproven: Mutex<HashMap<IpAddr, usize>>,
}

/// What carries the data of a run.
#[derive(Debug)]
enum DataPath {
    /// A connection.
    Stream(TcpStream),
    /// The address and port of a prober that it has proven, and the local address that it sends to.
    Datagrams { prober: SocketAddr, local: Option<IpAddr> },
}

/// The number under which a load attaches to its lease.
const DATAGRAMS: u16 = 1;

/// Maximum connections that have not proven a lease; further ones are closed. Chosen: those of all runs that
/// a responder can have begin within a moment.
pub(crate) const UNPROVEN_MAX: usize = 1_024;

/// The same of each source address, or IPv6 /64.
pub(crate) const UNPROVEN_PER_SOURCE: usize = 256;

impl BulkResponder {
    /// # Errors
    /// The kernel provides no random bytes.
    pub(super) fn new(bulk: Bulk) -> io::Result<Self> {
        let (runs, unproven) = (Mutex::default(), Mutex::default());
        Ok(Self { bulk, cookies: Cookies::new()?, runs, unproven })
    }

    /// Answers a request of a prober to use its address and port. Returns a reply, which is as long as the
    /// request; `None`: it is not answered here.
    pub(super) fn on_request(
        &self,
        lease: LeaseId,
        datagram: &[u8],
        prober: SocketAddr,
        local: Option<IpAddr>,
    ) -> Option<[u8; HANDSHAKE_BYTES]> {
        let run = self.bulk.leases.leased(lease).filter(|run| run.request.method.is_udp())?;
        let request = Handshake::decode(datagram, &LoadKey::new(&run.secret, RunEnd::Prober)).ok()?;
        let Handshake::Request { cookie } = request else { return None };
        if !cookie.is_some_and(|cookie| self.cookies.is_valid(&cookie, lease, prober)) {
            let cookie = self.cookies.cookie(lease, prober);
            return Some(
                Handshake::Cookie(cookie).encode(lease, &LoadKey::new(&run.secret, RunEnd::Responder)),
            );
        }
        let of_run = self.runs().get(&lease).cloned()?;
        // A repeated request finds the place taken. The socket of the run answers the next one.
        if self.bulk.leases.attach(lease, DATAGRAMS).is_ok() {
            let _ = of_run.try_send(DataPath::Datagrams { prober, local });
        }
        None
    }

    /// Handles a connection until the end of its run.
    pub(super) async fn accept(self: Arc<Self>, connection: BulkConnection) {
        let source = connection.source;
        if let Err(error) = self.serve(connection).await {
            debug!(%source, error = format!("{error:#}"), "connection of a bandwidth run ended");
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
        let Some(run) = self.bulk.leases.leased(lease) else {
            return refuse(&stream, lease, ActivationStatus::Invalid).await;
        };
        let mut received = MessageSeal::new(&run.secret, RunEnd::Prober);
        if received.decode(&first).is_err() {
            return refuse(&stream, lease, ActivationStatus::Unauthentic).await;
        }
        let of_run = self.runs().get(&lease).cloned();
        if number > 0 && (of_run.is_none() || run.request.method.is_udp()) {
            return refuse(&stream, lease, ActivationStatus::Invalid).await;
        }
        if let Err(error) = self.bulk.leases.attach(lease, number) {
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
        mut connections: mpsc::Receiver<DataPath>,
    ) -> anyhow::Result<()> {
        control.stream().set_nodelay(true)?;
        set_dscp(control.stream(), &run)?;
        control.send(&RunMessage::Activated { lease, status: ActivationStatus::Granted }).await?;
        let method = RunMethod::of(&run.request).context("the request has no rate")?;
        let mut paths = Vec::with_capacity(run.request.connections.into());
        let all = async {
            while paths.len() < usize::from(run.request.connections) {
                let Some(path) = connections.recv().await else { break };
                paths.push(path);
            }
        };
        timeout(MESSAGE_TIME_MAX, all).await?;
        let plan = EndpointPlan {
            is_prober: false,
            is_sender: run.request.direction == RunDirection::Reverse,
            bytes_max: run.bytes_max,
            rate_max: run.rate_max,
            duration: Duration::from_secs(run.request.seconds_max),
        };
        let _loading = self.bulk.loads.of(control.stream().peer_addr()?.ip()).begin();
        let payload = self.start(&mut control, lease, &run, paths, (method, &plan)).await?;
        let mut counted = 0;
        let supervise = |progress: Progress| {
            let new = progress.bytes.saturating_sub(counted);
            counted = progress.bytes;
            let is_within = self.bulk.leases.count_bytes(lease, new) && self.bulk.leases.is_valid(lease);
            (!is_within).then_some(StopReason::Lease)
        };
        let outcome = endpoint::run(control, payload, plan, supervise).await;
        self.bulk.leases.count_bytes(lease, outcome.bytes.saturating_sub(counted));
        Ok(())
    }

    /// Waits for the start message, and begins to send or to receive.
    async fn start(
        &self,
        control: &mut Control,
        lease: LeaseId,
        run: &LeasedRun,
        paths: Vec<DataPath>,
        (method, plan): (RunMethod, &EndpointPlan),
    ) -> anyhow::Result<Payload> {
        let mut streams = Vec::with_capacity(paths.len());
        for path in paths {
            match path {
                DataPath::Stream(stream) => streams.push(stream),
                DataPath::Datagrams { prober, local } => {
                    let dscp = Dscp::new(run.request.dscp).unwrap_or_default();
                    let local = local.context("the kernel does not say where a request arrived")?;
                    let local = SocketAddr::new(local, self.bulk.leases.agent_port());
                    let socket = load::open_for(&self.bulk.port, local, prober, dscp, method.reception())
                        .with_context(|| format!("opening a socket of {local} for {prober}"))?;
                    let socket = UdpSocket::from_std(socket)?;
                    tokio::select! {
                        started = receive_start(control) => started?,
                        never = handshake::accept(&socket, lease, &run.secret) => match never {},
                    }
                    let flow = self.bulk.threads.begin_load(socket.into_std()?, lease, method, plan)?;
                    return Ok(Payload::load(flow));
                }
            }
        }
        receive_start(control).await?;
        Ok(Payload::Streams(Streams::new(streams, plan)))
    }

    fn runs(&self) -> MutexGuard<'_, HashMap<LeaseId, mpsc::Sender<DataPath>>> {
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
        self.responder.bulk.leases.end(self.lease);
    }
}

/// Adds a data connection to its run.
async fn join(
    mut control: Control,
    lease: LeaseId,
    run: &LeasedRun,
    of_run: &mpsc::Sender<DataPath>,
) -> anyhow::Result<()> {
    prepare(control.stream(), run)?;
    control.send(&RunMessage::Activated { lease, status: ActivationStatus::Granted }).await?;
    // The run may have ended.
    let _ = of_run.send(DataPath::Stream(control.into_stream())).await;
    Ok(())
}

async fn receive_start(control: &mut Control) -> anyhow::Result<()> {
    let message = control.receive_soon().await?;
    anyhow::ensure!(message == RunMessage::Start, "unexpected {message:?}");
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
