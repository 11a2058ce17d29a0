use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Receiver;

use crate::bulk::Bulk;
use crate::clock::Clock;
use crate::config::{self, LoadContext};
use crate::datagram::{self, TimestampMatching};
use crate::event_log::EventLog;
use crate::fleet::{Addresses, Fleet, PlanInputs};
use crate::loops::{EVENTS_PENDING_MAX, LoopEvent};
use crate::metrics::{Exporter, ExpositionFormat, HttpCounts, Responders};
use crate::probe::{Loops, OwnFlowPermission};
use crate::roster::{Roster, RosterInputs};
use crate::settings::Settings;
use crate::stream;

/// A host that sends every datagram back.
struct EchoServer {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl EchoServer {
    fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let (port, stop) = (socket.local_addr().unwrap().port(), Arc::new(AtomicBool::new(false)));
        let is_stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2000];
            while !is_stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                    socket.send_to(&datagram[..length], from).unwrap();
                }
            }
        });
        Self { port, stop, thread: Some(thread) }
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The parts of a daemon that the tests need.
struct Agent {
    fleet: Fleet,
    loops: Loops,
    events: Receiver<LoopEvent>,
    log: EventLog,
    finished: usize,
}

impl Agent {
    fn start() -> Self {
        let (sender, events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let prober =
            datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), sender.clone()).unwrap();
        let streams = stream::spawn(sender).unwrap();
        let loops = Loops {
            prober,
            streams,
            probe_budget: Arc::default(),
            traces: Arc::default(),
            quoted_headers: Arc::default(),
            own_flow: OwnFlowPermission::default(),
            bulk: Bulk::default(),
        };
        Self { fleet: Fleet::new(7), loops, events, log: EventLog::default(), finished: 0 }
    }

    fn apply(&mut self, settings: &Settings) {
        let roster = Roster::new(&settings.config, &RosterInputs::default());
        let addresses: Addresses =
            [("host".to_owned(), Ok(vec!["127.0.0.1".parse().unwrap()]))].into_iter().collect();
        let identities = BTreeMap::new();
        let inputs = PlanInputs { settings, roster: &roster, addresses: &addresses, identities: &identities };
        self.fleet.apply(&inputs, &self.loops);
    }

    fn take_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            match event {
                LoopEvent::OfPath { id, event } => {
                    if let Some(key) = self.fleet.key(id) {
                        event.report(key, &self.log);
                    }
                }
                LoopEvent::Finished(_) => self.finished += 1,
                LoopEvent::Started { .. } => {}
                event @ (LoopEvent::NotStarted { .. }
                | LoopEvent::Disconnected { .. }
                | LoopEvent::PeerLeaving(_)
                | LoopEvent::ClockStepped(_)
                | LoopEvent::Suspended(_)) => panic!("{event:?}"),
            }
        }
    }

    fn until(&mut self, description: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition(self) {
            assert!(Instant::now() < deadline, "timed out waiting for: {description}");
            self.take_events();
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn page(&self, settings: &Settings) -> String {
        let exporter = Arc::new(Exporter::new(Vec::new(), Responders::default()));
        exporter.publish(self.fleet.exported(&settings.config.metrics).blocks);
        let http = HttpCounts { connections: 0, accept_errors: 0, responses: Default::default(), tls: None };
        let (mut page, mut text) = (exporter.page(&http, ExpositionFormat::Classic), Vec::new());
        while page.next(&mut text) {}
        String::from_utf8(text).unwrap()
    }

    fn answered(&self) -> u64 {
        self.fleet.status(&BTreeMap::new())[0].measured.as_ref().unwrap().last_reply()
    }
}

fn settings(port: u16, probes: &str) -> Settings {
    let host = LoadContext {
        name_override: None,
        hostname: "here".into(),
        labels: BTreeMap::new(),
        state_dir: None,
    };
    let text = format!("targets: [{{name: host, address: host, port: {port}}}]\nprobes: {probes}\n");
    let config = config::load(text.as_bytes(), &host).unwrap_or_else(|problems| panic!("{problems}")).config;
    Settings::complete(config, text.as_bytes()).unwrap()
}

#[test]
fn new_probe_kind_is_configured_measured_exported_and_stopped_like_any_other() {
    let echo_server = EchoServer::start();
    let probe = "[{name: s, kind: sample, targets: [host], interval: 2ms, size: 64B}]";
    let configured = settings(echo_server.port, probe);
    let mut agent = Agent::start();
    agent.apply(&configured);
    agent.until("answers", |agent| agent.answered() >= 10);

    // Metrics: the declared number of lines, which counts towards the limit on series.
    let page = agent.page(&configured);
    let lines = page.lines().filter(|line| line.starts_with("pathmeter_sample_")).count();
    assert_eq!(lines, 3, "{page}");
    let mut limited = configured.config.metrics.clone();
    limited.series_max = 2;
    assert_eq!(agent.fleet.exported(&limited).dropped, 1);

    // Event, JSON and table row.
    agent.until("an event", |agent| !agent.log.after(0).is_empty());
    assert_eq!(agent.log.after(0)[0].event, "sample_answered");
    let measured = agent.fleet.status(&BTreeMap::new())[0].measured.clone().unwrap();
    assert!(measured.json()["answered"].as_u64().unwrap() >= 10);
    assert_eq!(measured.row().head, "answered");

    // An unchanged path continues; a changed one restarts with its counters kept.
    let (before, finished) = (agent.answered(), agent.finished);
    agent.apply(&configured);
    agent.until("more answers", |agent| agent.answered() > before + 5);
    assert_eq!(agent.finished, finished);
    agent.apply(&settings(echo_server.port, &probe.replace("64B", "65B")));
    assert!(agent.answered() > before);
    agent.until("the path is replaced", |agent| agent.finished == finished + 1);

    // The path receives the goodbye of its peer, and a stop waits for the path to end.
    agent.fleet.peer_leaving("host", Clock::now(), &agent.loops);
    agent.loops.stop(Duration::from_secs(30));
    agent.until("the end", |agent| agent.loops.are_finished());
    agent.take_events();
    assert_eq!(agent.finished, finished + 2, "a path that ends is reported");
    assert_eq!(agent.loops.prober.series().accounting_errors.get(), 0);
}

#[test]
fn removed_path_reports_its_end_and_balances() {
    let echo_server = EchoServer::start();
    let configured = settings(echo_server.port, "[{name: s, kind: sample, targets: [host], interval: 2ms}]");
    let mut agent = Agent::start();
    agent.apply(&configured);
    agent.until("an answer", |agent| agent.answered() >= 1);
    agent.apply(&settings(echo_server.port, "[]"));
    agent.until("the path is gone", |agent| agent.finished == 1);
    agent.loops.stop(Duration::ZERO);
    agent.until("the end", |agent| agent.loops.are_finished());
    assert_eq!(agent.loops.prober.series().accounting_errors.get(), 0);
}
