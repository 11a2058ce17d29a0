//! `pathmeter demo`: three agents on loopback.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use pathmeter_proto::key::Keys;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{DemoArguments, Failure, print_out, runtime};
use crate::api::routes::AppState;
use crate::config::{self, LoadContext};
use crate::daemon::{ConfigSource, Daemon};
use crate::probe::TableRow;
use crate::settings::Settings;
use crate::systemd::Notifier;

/// Names and addresses of the agents.
const AGENTS: [(&str, &str); 3] = [("ams-1", "127.0.0.11"), ("fra-1", "127.0.0.12"), ("lon-1", "127.0.0.13")];

/// Ports for HTTP and STAMP, in the order in which they are tried. The agent port is one higher.
const PORTS: [u16; 5] = [9_862, 19_862, 29_862, 39_862, 49_862];

pub(super) fn demo(arguments: &DemoArguments) -> Result<(), Failure> {
    runtime()?.block_on(async {
        let port = free_port()?;
        let keys = Arc::new(keys()?);
        let (stop, stopped) = watch::channel(false);
        let mut agents = JoinSet::new();
        let mut states = Vec::new();
        for (name, _) in AGENTS {
            let daemon = start(name, port, &keys)?;
            states.push((name, daemon.app_state()));
            agents.spawn(daemon.run(stopped.clone()));
        }
        let urls: Vec<String> =
            AGENTS.iter().map(|(_, address)| format!("http://{address}:{port}/metrics")).collect();
        print_out(&format!("three agents measure each other 100 times per second: {}\n", urls.join("  ")))?;
        let outcome = print_tables(arguments, &states).await;
        let _ = stop.send(true);
        while agents.join_next().await.is_some() {}
        outcome
    })
}

/// Prints the table of all paths: every second on a terminal, and at the end.
async fn print_tables(arguments: &DemoArguments, states: &[(&str, Arc<AppState>)]) -> Result<(), Failure> {
    let is_live = io::stdout().is_terminal();
    let end = tokio::time::sleep(Duration::from_secs(arguments.seconds.unwrap_or(u64::MAX / 4)));
    tokio::pin!(end);
    let mut ticker = tokio::time::interval(Duration::from_secs(1));
    ticker.tick().await;
    let mut lines = 0;
    loop {
        let is_over = tokio::select! {
            () = &mut end => true,
            _ = tokio::signal::ctrl_c() => true,
            _ = ticker.tick() => false,
        };
        if is_live || is_over {
            let table = table(states);
            let cursor_up = if is_live && lines > 0 { format!("\x1b[{lines}A\x1b[J") } else { String::new() };
            lines = table.lines().count();
            print_out(&(cursor_up + &table))?;
        }
        if is_over {
            return Ok(());
        }
    }
}

/// One table for each kind of probe, then the paths that are not measured.
fn table(states: &[(&str, Arc<AppState>)]) -> String {
    let mut tables: BTreeMap<&'static str, String> = BTreeMap::new();
    let mut unmeasured = String::new();
    for (from, state) in states {
        for path in &state.status.load().paths {
            let names = format!("{from:<8} {:<8} {:<10}", path.key.peer, path.key.probe);
            match &path.measured {
                Some(measured) => {
                    let TableRow { head, cells } = measured.row();
                    let new = || format!("{:<8} {:<8} {:<10} {head}\n", "from", "to", "probe");
                    let _ = writeln!(tables.entry(head).or_insert_with(new), "{names} {cells}");
                }
                None => {
                    let reason = path.reason.as_deref().unwrap_or("not measured");
                    let _ = writeln!(unmeasured, "{names} {reason}");
                }
            }
        }
    }
    tables.into_values().chain([unmeasured]).collect()
}

fn start(name: &str, port: u16, keys: &Arc<Keys>) -> anyhow::Result<Daemon> {
    let text = configuration(name, port);
    let host = LoadContext {
        name_override: None,
        hostname: name.to_owned(),
        labels: BTreeMap::new(),
        state_dir: None,
    };
    let loaded = config::load(text.as_bytes(), &host)
        .map_err(|problems| anyhow!("configuration of the demo: {problems}"))?;
    let mut settings = Settings::complete(loaded.config, text.as_bytes())?;
    settings.keys.mesh = Some(Arc::clone(keys));
    Daemon::start(settings, ConfigSource::Fixed, None, Notifier::silent()).context("starting an agent")
}

/// The configuration file of one agent.
fn configuration(name: &str, port: u16) -> String {
    let next = port + 1;
    let index = AGENTS.iter().position(|(known, _)| *known == name).unwrap_or_default();
    let (_, address) = AGENTS[index];
    let (neighbour, _) = AGENTS[(index + 1) % AGENTS.len()];
    let mut text = format!(
        "agent: {{name: {name}, grace: 1s}}\n\
         listen: {{http: \"{address}:{port}\", stamp: \"{address}:{port}\", agent: \"{address}:{next}\"}}\n\
         probes:\n  - {{name: udp, interval: 10ms, flows: 4, source: {address}}}\n  - {{name: route, kind: trace, follows: udp, interval: 2s}}\n"
    );
    // Each agent measures only its neighbour: paths between all agents would not fit on a screen.
    for protocol in ["tcp", "websocket", "http", "icmp"] {
        let _ = writeln!(
            text,
            "  - {{name: {protocol}, protocol: {protocol}, interval: 10ms, source: {address}, peers: [{neighbour}]}}"
        );
    }
    // A small part of what loopback carries, so that the delay of the other paths stays what it is.
    for method in ["tcp, bytes: 20MB", "train", "check, rate: 100Mbit/s"] {
        let (name, _) = method.split_once(',').unwrap_or((method, ""));
        let _ = writeln!(
            text,
            "  - {{name: bw-{name}, kind: bandwidth, method: {method}, interval: 10s, source: {address}, \
             peers: [{neighbour}]}}"
        );
    }
    // The runs of a demo need not wait for each other.
    text.push_str("bandwidth: {runs_max: 100}\npeers:\n");
    for (name, address) in AGENTS {
        let _ = writeln!(text, "  - {{name: {name}, address: {address}}}");
    }
    text
}

fn free_port() -> anyhow::Result<u16> {
    let is_free = |port: &u16| {
        let both = |address: &str| {
            let udp = |port| std::net::UdpSocket::bind((address, port)).is_ok();
            TcpListener::bind((address, *port)).is_ok() && udp(*port) && udp(*port + 1)
        };
        AGENTS.iter().all(|(_, address)| both(address))
    };
    PORTS
        .into_iter()
        .find(is_free)
        .ok_or_else(|| anyhow!("ports {PORTS:?} are all in use on 127.0.0.11 to 127.0.0.13"))
}

fn keys() -> anyhow::Result<Keys> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| anyhow!("reading random bytes for the key: {error}"))?;
    Ok(Keys::only(pathmeter_proto::key::Key::new(&secret)))
}
