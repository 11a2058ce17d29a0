//! `pathmeter probe echo`.

use std::io::{self, IsTerminal as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::anyhow;
use pathmeter_proto::echo::{Report, Spec, StreamSpec};

use super::aim::{Aim, Course, Way};
use super::summary::{Decided, Findings};
use super::{EchoArguments, Failure, runtime, say};
use crate::datagram::{Duties, EVENTS, Event, Handle, NewPath, PathId, SourceChoice, StampNames};
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::StreamSeries;
use crate::stream::{self, Dial, NewStream};

const LATE_AFTER: Duration = Duration::from_secs(1);

/// How often the live line is written.
const LINE_EVERY: Duration = Duration::from_millis(100);

pub(super) fn echo(arguments: &EchoArguments) -> Result<(), Failure> {
    let aim = Aim::of(arguments)?;
    runtime()?.block_on(async {
        let course = aim.course(arguments).await?;
        if !arguments.json {
            let every = crate::config::units::display(arguments.interval);
            let mode = if aim.is_authenticated(&course.way) { ", authenticated" } else { "" };
            say(&format!(
                "{} ({}): {} {} every {every}{mode}\n",
                arguments.target,
                place(&course),
                arguments.count,
                arguments.protocol.units()
            ))?;
        }
        measure(arguments, course).await
    })
}

/// An address, without the port that ICMP does not have.
fn place(course: &Course) -> String {
    match course.to.port() {
        0 => course.to.ip().to_string(),
        _ => course.to.to_string(),
    }
}

/// The thread that measures.
enum Loop {
    Datagrams(Handle),
    Streams(stream::Handle, Arc<StreamSeries>),
}

impl Loop {
    fn stop(&self, grace: Duration) {
        match self {
            Self::Datagrams(handle) => handle.stop(grace),
            Self::Streams(handle, _) => handle.stop(grace),
        }
    }

    fn is_finished(&self) -> bool {
        match self {
            Self::Datagrams(handle) => handle.is_finished(),
            Self::Streams(handle, _) => handle.is_finished(),
        }
    }

    /// HTTP answers that were not the expected ones.
    fn unexpected_answers(&self) -> u64 {
        match self {
            Self::Datagrams(_) => 0,
            Self::Streams(_, series) => series.unexpected_answers(),
        }
    }
}

async fn measure(arguments: &EchoArguments, course: Course) -> Result<(), Failure> {
    let (reports, tap) = channel();
    let (sender, mut events) = tokio::sync::mpsc::channel(EVENTS);
    let address = place(&course);
    let prober = start(arguments, course, reports, sender)?;
    let mut findings = Findings::default();
    let is_live = !arguments.json && io::stdout().is_terminal();
    let mut ticker = tokio::time::interval(LINE_EVERY);
    let mut is_interrupted = false;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(Event::Failed { error, .. }) => return Err(anyhow::Error::from(error).into()),
                Some(Event::Finished(_)) | None => break,
                Some(Event::Broken { reason, .. }) => {
                    take(&tap, &mut findings, arguments)?;
                    if is_live {
                        say("\r\x1b[K")?;
                    }
                    let is_hopeless = !findings.has_answer();
                    // Whoever does not look at it does not need it.
                    let _ = writeln!(io::stderr(), "{}{reason}", if is_hopeless { "error: " } else { "" });
                    if is_hopeless {
                        // That is the answer to the question.
                        prober.stop(Duration::ZERO);
                        break;
                    }
                }
                Some(
                    Event::Started { .. }
                    | Event::PathMtu { .. }
                    | Event::Goodbye(_)
                    | Event::ClockStepped(_)
                    | Event::Suspended(_),
                ) => {}
            },
            _ = ticker.tick() => {
                take(&tap, &mut findings, arguments)?;
                if is_live {
                    say(&format!("\r\x1b[K{}", findings.line(arguments.count)))?;
                }
            }
            _ = tokio::signal::ctrl_c() => {
                let grace = if is_interrupted { Duration::ZERO } else { arguments.protocol.lost_after() };
                is_interrupted = true;
                prober.stop(grace);
            }
        }
        if prober.is_finished() {
            break;
        }
    }
    prober.stop(Duration::ZERO);
    while !prober.is_finished() {
        ticker.tick().await;
    }
    take(&tap, &mut findings, arguments)?;
    findings.unexpected = prober.unexpected_answers();
    if is_live {
        say("\r\x1b[K")?;
    }
    let summary = match arguments.json {
        true => findings.json(&arguments.target, &address).map_err(anyhow::Error::from)? + "\n",
        false => findings.text(&arguments.target, &address),
    };
    if arguments.json || findings.has_sent() {
        say(&summary)?;
    }
    if findings.has_answer() && findings.unexpected == 0 { Ok(()) } else { Err(Failure::Quiet) }
}

fn take(tap: &Receiver<Report>, findings: &mut Findings, arguments: &EchoArguments) -> Result<(), Failure> {
    let mut lines = String::new();
    for report in tap.try_iter() {
        findings.add(&report);
        if arguments.json_each
            && let Some(datagram) = Decided::of(&report)
        {
            lines += &(serde_json::to_string(&datagram).map_err(anyhow::Error::from)? + "\n");
        }
    }
    if lines.is_empty() { Ok(()) } else { say(&lines) }
}

fn start(
    arguments: &EchoArguments,
    course: Course,
    reports: mpsc::Sender<Report>,
    events: tokio::sync::mpsc::Sender<Event>,
) -> anyhow::Result<Loop> {
    let Course { to, way } = course;
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|error| anyhow!("drawing a random number: {error}"))?;
    let seed = u64::from_ne_bytes(seed);
    let (id, tap, count) = (PathId(1), Some(reports), Some(arguments.count));
    let (interval, dscp) = (arguments.interval, arguments.dscp);
    let (late_after, lost_after) = (LATE_AFTER, arguments.protocol.lost_after());
    let (target, family) = (&arguments.target, if to.is_ipv4() { "ipv4" } else { "ipv6" });
    let flows = arguments.flows.unwrap_or(1);
    let series = Arc::new(EchoSeries::new("once", target, family, flows.into()));
    match way {
        Way::Datagrams(wire) => {
            let any: IpAddr =
                if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let handle = Handle::spawn("prober", Duties::default(), StampNames::detect(), events)?;
            handle.add(NewPath {
                id,
                spec: Spec {
                    to,
                    wire,
                    interval,
                    ssids: vec![0; usize::from(flows)],
                    size: arguments.size.and_then(|bytes| bytes.try_into().ok()),
                    dscp,
                    late_after,
                    lost_after,
                    transmit_stamps: true,
                    count,
                    seed,
                },
                from: SourceChoice {
                    address: arguments.source.unwrap_or(any),
                    port: 0,
                    dont_fragment: arguments.dont_fragment,
                },
                series,
                path_mtu: None,
                absent_since: None,
                tap,
            });
            Ok(Loop::Datagrams(handle))
        }
        Way::Stream(over) => {
            let over = *over;
            let handle = stream::Handle::spawn(events)?;
            let stream = Arc::new(StreamSeries::new("once", target, family));
            handle.add(NewStream {
                id,
                spec: StreamSpec {
                    interval,
                    late_after,
                    lost_after,
                    at_once: over.at_once(),
                    on_demand: over.is_on_demand(),
                    count,
                    seed,
                },
                dial: Dial { to, host: None, source: arguments.source, dscp, over },
                fresh: None,
                series,
                stream: Arc::clone(&stream),
                absent_since: None,
                tap,
            });
            Ok(Loop::Streams(handle, stream))
        }
    }
}
