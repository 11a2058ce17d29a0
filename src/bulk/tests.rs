use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::bandwidth::RunEnd;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::wire::AgentKind;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, MESSAGE_BYTES, MessageSeal, RunMessage};
use pathmeter_proto::wire::load::{HANDSHAKE_BYTES, Handshake, LoadKey};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::config::bandwidth::Method;
use crate::config::{self, BandwidthRules, LoadContext};
use crate::datagram::{self, Binding, DatagramHandle, Service, ServiceTasks, Socket, TimestampMatching};
use crate::loops::EVENTS_PENDING_MAX;
use crate::stream::responder::{ResponderLimits, StreamAccess, StreamResponder};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Much longer than anything takes.
const LONG: Duration = Duration::from_secs(60);

pub(super) fn rules(yaml: &str) -> BandwidthRules {
    let host = LoadContext {
        name_override: None,
        hostname: "fra-1".to_owned(),
        labels: Default::default(),
        state_dir: None,
    };
    config::load(format!("bandwidth: {{{yaml}}}").as_bytes(), &host).unwrap().config.bandwidth
}

pub(super) fn request(direction: RunDirection, connections: u16, bytes: u64) -> LeaseRequest {
    LeaseRequest {
        lease: None,
        method: Method::Tcp,
        direction,
        connections,
        bytes_max: Some(bytes),
        seconds_max: 20,
        rate_bytes_per_second: None,
        dscp: 1,
    }
}

/// A responder on loopback.
struct Responder {
    leases: Arc<Leases>,
    address: SocketAddr,
    prober: Arc<BulkThreads>,
    _stop: watch::Sender<bool>,
    agent_port: DatagramHandle,
}

impl Responder {
    async fn start(yaml: &str) -> Self {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let leases = Arc::new(Leases::new(rules(yaml), address.port()));
        let limits =
            ResponderLimits { unverified: 4_096, unverified_per_source: 4_096, ..Default::default() };
        let responder = StreamResponder::new(StreamAccess::default(), limits, Arc::default());
        let bulk = Bulk { leases: Arc::clone(&leases), ..Bulk::default() };
        let (runs, port) = (RunResponder::new(&bulk).unwrap(), bulk.port);
        let responder = Arc::new(responder.with_bulk(runs.connections()));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(responder.serve(vec![listener], stopped));
        let binding = Binding { address, dont_fragment: false, errors: false, destinations: true };
        let socket = Socket::bind(&binding, TimestampMatching::ByPayload).unwrap();
        port.add(socket.as_fd()).unwrap();
        let tasks = vec![(AgentKind::Bandwidth, runs.handshakes())];
        let service = Service {
            sockets: vec![socket],
            tasks: ServiceTasks::AgentPort { tasks, rejected: Arc::default() },
            answers_probes: false,
        };
        let (events, _) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let agent_port =
            datagram::spawn("responder", vec![service], TimestampMatching::ByPayload, events).unwrap();
        Self { leases, address, prober: Arc::default(), _stop: stop, agent_port }
    }

    fn grant(&self, request: &LeaseRequest) -> Grant {
        match self.leases.request(HERE, request.clone()) {
            LeaseAnswer::Granted(grant) => grant,
            answer @ (LeaseAnswer::Waiting { .. } | LeaseAnswer::Refused { .. }) => panic!("{answer:?}"),
        }
    }

    fn run(&self, request: &LeaseRequest, grant: &Grant) -> Run {
        let (lease, secret) = grant.decode().unwrap();
        Run {
            to: self.address,
            source: None,
            dscp: Dscp::new(request.dscp).unwrap(),
            lease,
            secret,
            direction: request.direction,
            method: RunMethod::of(request).unwrap(),
            bytes_max: grant.bytes_max,
            duration: Duration::from_secs(request.seconds_max),
            rate_max: grant.rate_bytes_per_second,
        }
    }

    /// Runs on the thread for bulk connections of the prober.
    fn spawn(
        &self,
        run: Run,
        supervise: impl FnMut(Progress) -> Option<StopReason> + Send + 'static,
    ) -> impl Future<Output = Result<RunOutcome, RunError>> {
        let running = self.prober.runtime().unwrap().spawn(run.run(Arc::clone(&self.prober), supervise));
        async { timeout(LONG, running).await.expect("the run ends").unwrap() }
    }

    async fn until_idle(&self) {
        let deadline = Instant::now() + LONG;
        while self.leases.counts().0 > 0 {
            assert!(Instant::now() < deadline, "the lease does not end");
            sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test]
async fn all_bytes_arrive_in_both_directions_over_any_number_of_connections() {
    let responder = Responder::start("").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        for connections in [1, 3, 16] {
            let request = request(direction, connections, 20_000_003);
            let grant = responder.grant(&request);
            let outcome = responder.spawn(responder.run(&request, &grant), |_| None).await.unwrap();
            let case = format!("{direction:?} {connections}: {outcome:?}");
            assert_eq!((outcome.bytes, outcome.stop_reason), (20_000_003, StopReason::Bytes), "{case}");
            assert!(outcome.throughput().is_some_and(|rate| rate > 0), "{case}");
            assert!(!outcome.sender.congestion_control.is_empty(), "{case}");
            responder.until_idle().await;
        }
    }
}

#[tokio::test]
async fn run_ends_when_its_time_is_over() {
    let responder = Responder::start("").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let request = LeaseRequest { bytes_max: None, seconds_max: 1, ..request(direction, 2, 1) };
        let grant = responder.grant(&request);
        let run = responder.run(&request, &grant);
        // Slow, so that the time ends it and not the bytes.
        let run = Run { rate_max: Some(10_000_000), duration: Duration::from_millis(300), ..run };
        let outcome = responder.spawn(run, |_| None).await.unwrap();
        let is_over = matches!(outcome.stop_reason, StopReason::Time | StopReason::Bytes);
        assert!(is_over && outcome.bytes > 0, "{outcome:?}");
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn end_of_the_lease_stops_both_ends() {
    let allowed = "run_bytes_max: 900GB, bytes_per_day: 900GB, path_bytes_per_day: 900GB";
    let responder = Responder::start(allowed).await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let request = request(direction, 4, 400_000_000_000);
        let grant = responder.grant(&request);
        let leases = Arc::clone(&responder.leases);
        let supervise = move |progress: Progress| {
            if progress.bytes > 0 {
                leases.set_rules(rules("enabled: false"));
            }
            None
        };
        let outcome = responder.spawn(responder.run(&request, &grant), supervise).await.unwrap();
        assert_eq!(outcome.stop_reason, StopReason::Lease, "{outcome:?}");
        responder.until_idle().await;
        responder.leases.set_rules(rules(allowed));
    }
    // The bytes that were not used are available again when the responder has noticed the end.
    let deadline = Instant::now() + LONG;
    while responder.leases.bytes_left(&HERE.to_string()).unwrap() < 800_000_000_000 {
        assert!(Instant::now() < deadline, "the bytes are not given back");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn prober_can_stop_a_run_and_both_ends_name_the_reason() {
    let responder = Responder::start("").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let request = request(direction, 1, 2_000_000_000);
        let grant = responder.grant(&request);
        let supervise = |progress: Progress| (progress.bytes > 0).then_some(StopReason::Delay);
        let outcome = responder.spawn(responder.run(&request, &grant), supervise).await.unwrap();
        assert_eq!(outcome.stop_reason, StopReason::Delay, "{outcome:?}");
        assert_eq!(outcome.limited_by, LimitedBy::Path);
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn death_of_the_prober_ends_the_lease_and_the_next_run_works() {
    let responder =
        Responder::start("run_bytes_max: 900GB, bytes_per_day: 900GB, path_bytes_per_day: 900GB").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let big = request(direction, 2, 100_000_000_000);
        let grant = responder.grant(&big);
        let (sender, mut has_begun) = watch::channel(false);
        let supervise = move |progress: Progress| {
            sender.send_replace(progress.bytes > 0);
            None
        };
        let runtime = responder.prober.runtime().unwrap();
        let running =
            runtime.spawn(responder.run(&big, &grant).run(Arc::clone(&responder.prober), supervise));
        timeout(LONG, has_begun.wait_for(|begun| *begun)).await.unwrap().unwrap();
        running.abort();
        responder.until_idle().await;
        let small = request(direction, 1, 1_000_000);
        let grant = responder.grant(&small);
        let outcome = responder.spawn(responder.run(&small, &grant), |_| None).await.unwrap();
        assert_eq!(outcome.bytes, 1_000_000);
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn death_of_the_responder_ends_the_run() {
    // A responder that accepts everything and then closes.
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let to = listener.local_addr().unwrap();
    let responder = Responder::start("").await;
    let request = request(RunDirection::Forward, 1, 2_000_000_000);
    let grant = responder.grant(&request);
    let run = Run { to, ..responder.run(&request, &grant) };
    let relay = tokio::spawn(relay(listener, responder.address, 5_000_000));
    let outcome = responder.spawn(run, |_| None).await.unwrap();
    assert_eq!(outcome.stop_reason, StopReason::Peer, "{outcome:?}");
    relay.abort();
}

/// Passes on the bytes of two connections, until one has passed on so many; then all are closed.
async fn relay(listener: TcpListener, to: SocketAddr, bytes_max: usize) {
    let mut pairs = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (mut from, _) = listener.accept().await.unwrap();
        let mut to = TcpStream::connect(to).await.unwrap();
        pairs.spawn(async move {
            let (mut sent, mut down, mut up) = (0, vec![0; 65_536], vec![0; 65_536]);
            while sent < bytes_max {
                tokio::select! {
                    read = from.read(&mut up) => match read {
                        Ok(count) if count > 0 => {
                            sent += count;
                            to.write_all(&up[..count]).await.unwrap();
                        }
                        _ => return,
                    },
                    read = to.read(&mut down) => match read {
                        Ok(count) if count > 0 => from.write_all(&down[..count]).await.unwrap(),
                        _ => return,
                    },
                }
            }
        });
    }
    pairs.join_next().await;
}

#[tokio::test]
async fn connections_without_a_valid_lease_are_refused() {
    let responder = Responder::start("").await;
    let request = request(RunDirection::Reverse, 1, 1_000_000);
    let grant = responder.grant(&request);
    let run = responder.run(&request, &grant);
    let unknown = Run { lease: LeaseId(run.lease.0 ^ 1), ..run.clone() };
    let forged = Run { secret: [0; 16], ..run.clone() };
    let many = Run { method: RunMethod::Tcp { streams: 2 }, ..run.clone() };
    for (run, expected) in [
        (unknown, ActivationStatus::Invalid),
        (forged, ActivationStatus::Unauthentic),
        (many, ActivationStatus::Taken),
    ] {
        let error = responder.spawn(run, |_| None).await.unwrap_err();
        let RunError::Refused { status, .. } = error else { panic!("{error}") };
        assert_eq!(status, expected);
    }
    // The run with too many connections has used the lease.
    responder.until_idle().await;
    let error = responder.spawn(run, |_| None).await.unwrap_err();
    assert!(matches!(error, RunError::Refused { status: ActivationStatus::Invalid, .. }), "{error}");
}

#[tokio::test]
async fn rate_is_kept_and_used_whatever_it_is() {
    let responder = Responder::start("").await;
    for rate_max in [12_500, 250_000, 2_500_000, 25_000_000] {
        for direction in [RunDirection::Forward, RunDirection::Reverse] {
            let rate_bytes_per_second = Some(rate_max);
            let request = LeaseRequest { rate_bytes_per_second, ..request(direction, 2, rate_max / 2) };
            let grant = responder.grant(&request);
            let outcome = responder.spawn(responder.run(&request, &grant), |_| None).await.unwrap();
            let case = format!("{rate_max} {direction:?}: {outcome:?}");
            assert_eq!((outcome.bytes, outcome.stop_reason), (rate_max / 2, StopReason::Bytes), "{case}");
            // Half a second of bytes cannot leave sooner, but for what is sent at once.
            assert!(outcome.duration >= Duration::from_millis(380), "{case}");
            assert!(outcome.duration <= Duration::from_secs(4), "{case}");
            responder.until_idle().await;
        }
    }
}

#[tokio::test]
async fn client_that_sends_more_than_its_lease_allows_is_stopped() {
    let responder = Responder::start("").await;
    let request = request(RunDirection::Forward, 1, 1_000_000);
    let grant = responder.grant(&request);
    let run = Run { bytes_max: u64::MAX, ..responder.run(&request, &grant) };
    let outcome = responder.spawn(run, |_| None).await.unwrap();
    assert_eq!(outcome.stop_reason, StopReason::Lease, "{outcome:?}");
    responder.until_idle().await;
}

#[tokio::test]
async fn eight_clients_run_together_and_further_ones_wait() {
    let responder = Responder::start("runs_max: 8").await;
    let request = request(RunDirection::Forward, 1, 200_000_000);
    let grants: Vec<Grant> = (0..8).map(|_| responder.grant(&request)).collect();
    let ninth = responder.leases.request(HERE, request.clone());
    assert!(matches!(ninth, LeaseAnswer::Waiting { position: 1, .. }), "{ninth:?}");
    let (sender, mut begun) = watch::channel(0_u32);
    let sender = Arc::new(sender);
    let runs: Vec<_> = grants
        .iter()
        .map(|grant| {
            let (sender, mut has_begun) = (Arc::clone(&sender), false);
            responder.spawn(responder.run(&request, grant), move |progress: Progress| {
                if progress.bytes > 0 && !std::mem::replace(&mut has_begun, true) {
                    sender.send_modify(|count| *count += 1);
                }
                None
            })
        })
        .collect();
    timeout(LONG, begun.wait_for(|count| *count == 8)).await.unwrap().unwrap();
    for run in runs {
        assert_eq!(run.await.unwrap().bytes, 200_000_000);
    }
    responder.until_idle().await;
}

#[tokio::test]
async fn silent_connections_do_not_keep_runs_away() {
    let responder = Responder::start("").await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(responder.address).await.unwrap();
        stream.write_all(b"pmbw\x01\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").await.unwrap();
        silent.push(stream);
    }
    let request = request(RunDirection::Reverse, 1, 1_000_000);
    let grant = responder.grant(&request);
    let outcome = responder.spawn(responder.run(&request, &grant), |_| None).await.unwrap();
    assert_eq!(outcome.bytes, 1_000_000);
}

#[tokio::test]
async fn end_that_floods_messages_does_not_hold_up_its_own_end_or_others() {
    let responder = Responder::start("runs_max: 2").await;
    let first = request(RunDirection::Forward, 1, 1_000_000);
    let grant = responder.grant(&first);
    let (lease, secret) = grant.decode().unwrap();
    let mut seal = MessageSeal::new(&secret, RunEnd::Prober);
    let mut control = TcpStream::connect(responder.address).await.unwrap();
    let mut data = TcpStream::connect(responder.address).await.unwrap();
    control.write_all(&seal.encode(&RunMessage::Activate { lease, connection: 0 })).await.unwrap();
    control.read_exact(&mut [0; MESSAGE_BYTES]).await.unwrap();
    let activate = RunMessage::Activate { lease, connection: 1 };
    data.write_all(&MessageSeal::new(&secret, RunEnd::Prober).encode(&activate)).await.unwrap();
    data.read_exact(&mut [0; MESSAGE_BYTES]).await.unwrap();
    control.write_all(&seal.encode(&RunMessage::Start)).await.unwrap();
    let flood = tokio::spawn(async move {
        let progress = RunMessage::Progress { bytes: 1, nanos: 1 };
        loop {
            let many: Vec<u8> = (0..1_000).flat_map(|_| seal.encode(&progress)).collect();
            if control.write_all(&many).await.is_err() {
                return;
            }
        }
    });
    // The responder closes the connection.
    timeout(LONG, flood).await.unwrap().unwrap();
    let second = request(RunDirection::Reverse, 1, 1_000_000);
    let grant = responder.grant(&second);
    let outcome = responder.spawn(responder.run(&second, &grant), |_| None).await.unwrap();
    assert_eq!(outcome.bytes, 1_000_000);
    responder.until_idle().await;
}

/// A request of a run over UDP.
fn load_request(method: Method, direction: RunDirection, rate: Option<u64>) -> LeaseRequest {
    let bytes_max = rate.map_or(300_000, |rate| rate + 1_200);
    LeaseRequest {
        method,
        bytes_max: Some(bytes_max),
        seconds_max: 1,
        rate_bytes_per_second: rate,
        ..request(direction, 1, 1)
    }
}

#[tokio::test]
async fn steady_load_is_counted_in_both_directions() {
    let responder = Responder::start("").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let request = load_request(Method::Check, direction, Some(2_000_000));
        let grant = responder.grant(&request);
        let outcome = responder.spawn(responder.run(&request, &grant), |_| None).await.unwrap();
        let case = format!("{direction:?}: {outcome:?}");
        let load = outcome.load.expect(&case);
        assert_eq!(load.sent, Some(outcome.bytes), "{case}");
        assert!(!load.result.is_host_limited, "{case}");
        assert!((1..=2_021_200).contains(&outcome.bytes), "{case}");
        assert!(outcome.throughput().is_some(), "{case}");
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn trains_arrive_in_both_directions() {
    let responder = Responder::start("").await;
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let request = load_request(Method::Train, direction, None);
        let grant = responder.grant(&request);
        let outcome = responder.spawn(responder.run(&request, &grant), |_| None).await.unwrap();
        let case = format!("{direction:?}: {outcome:?}");
        assert_eq!((outcome.bytes, outcome.load.unwrap().sent), (300_000, Some(300_000)), "{case}");
        assert_eq!((outcome.stop_reason, outcome.is_capacity()), (StopReason::Bytes, false), "{case}");
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn load_stops_when_either_end_is_told_to() {
    for direction in [RunDirection::Forward, RunDirection::Reverse] {
        let responder = Responder::start("").await;
        let request = LeaseRequest {
            bytes_max: Some(100_000_000),
            seconds_max: 20,
            ..load_request(Method::Check, direction, Some(2_000_000))
        };
        let grant = responder.grant(&request);
        let supervise = |progress: Progress| (progress.bytes > 100_000).then_some(StopReason::Delay);
        let outcome = responder.spawn(responder.run(&request, &grant), supervise).await.unwrap();
        assert_eq!(outcome.stop_reason, StopReason::Delay, "{outcome:?}");
        assert!(outcome.bytes > 0 && outcome.load.is_some(), "{outcome:?}");
        responder.until_idle().await;
        let grant = responder.grant(&request);
        let leases = Arc::clone(&responder.leases);
        let supervise = move |progress: Progress| {
            if progress.bytes > 100_000 {
                leases.stop_all();
            }
            None
        };
        let outcome = responder.spawn(responder.run(&request, &grant), supervise).await.unwrap();
        assert_eq!(outcome.stop_reason, StopReason::Lease, "{outcome:?}");
        responder.until_idle().await;
    }
}

#[tokio::test]
async fn request_over_udp_without_its_lease_gets_no_answer() {
    let responder = Responder::start("").await;
    let request = load_request(Method::Train, RunDirection::Forward, None);
    let grant = responder.grant(&request);
    let run = responder.run(&request, &grant);
    let socket = std::net::UdpSocket::bind((HERE, 0)).unwrap();
    socket.connect(responder.address).unwrap();
    let keys = [RunEnd::Prober, RunEnd::Responder].map(|end| LoadKey::new(&run.secret, end));
    let ask = |lease: LeaseId, key: &LoadKey, cookie| {
        let datagram = Handshake::Request { cookie }.encode(lease, key);
        socket.send(&datagram).unwrap();
    };
    let answer = || {
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(length, HANDSHAKE_BYTES, "as long as the request");
        Handshake::decode(&buffer[..length], &keys[1]).unwrap()
    };
    ask(LeaseId(run.lease.0 ^ 1), &keys[0], None);
    ask(run.lease, &LoadKey::new(&[0; 16], RunEnd::Prober), None);
    ask(run.lease, &keys[1], None);
    ask(run.lease, &keys[0], None);
    // The first answer is that of the last request.
    let Handshake::Cookie(cookie) = answer() else { panic!() };
    // A cookie of another address is answered with the right one.
    ask(run.lease, &keys[0], Some([9; 16]));
    assert_eq!(answer(), Handshake::Cookie(cookie));
    // Without a control connection there is no run.
    ask(run.lease, &keys[0], Some(cookie));
    ask(run.lease, &keys[0], None);
    assert_eq!(answer(), Handshake::Cookie(cookie));
    drop(responder.agent_port);
}
