//! The connection probe: opens connections on its own schedule to measure the time to connect.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::schedule::Schedule;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::NtpTime;
use tokio::time::{sleep, timeout};

use super::connect_error::ConnectError;
use super::dial::{ConnectTimings, Dial};
use super::link::StreamLink;
use super::link_event::LinkEvent;
use crate::clock::Clock;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::{ConnectErrorKind, ConnectStage, StreamSeries};

/// Opens a connection every `connect_interval`, measures it, and closes it. An attempt that exceeds
/// `connect_timeout` has failed. There are no attempts while the peer is leaving.
pub(super) async fn measure(
    dial: Arc<Dial>,
    connect_interval: Duration,
    connect_timeout: Duration,
    seed: u64,
    echo: Arc<EchoSeries>,
    series: Arc<StreamSeries>,
) {
    let mut schedule = Schedule::new(Clock::now(), connect_interval, seed);
    loop {
        sleep(schedule.next().since(Clock::now())).await;
        if schedule.take(Clock::now()).slot.is_none() || echo.is_draining() {
            continue;
        }
        let mut timings = ConnectTimings::default();
        let outcome = match timeout(connect_timeout, connect_once(&dial, &mut timings)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ConnectError::new(ConnectErrorKind::Timeout, String::new())),
        };
        if let Some(span) = timings.connect {
            series.observe_connect(span);
        }
        for (stage, span) in timings.stages {
            series.observe_stage(stage, span);
        }
        if let Some(at) = timings.certificate_expiry {
            series.certificate_expires(at);
        }
        if let Err(error) = outcome
            && !echo.is_draining()
        {
            series.connect_failed(error.kind);
        }
    }
}

async fn connect_once(dial: &Dial, timings: &mut ConnectTimings) -> Result<(), ConnectError> {
    dial.resolve(timings).await?;
    let mut link = dial.connect(timings, false).await?;
    let outcome = match link {
        StreamLink::Tcp(_) | StreamLink::WebSocket(_) => Ok(()),
        StreamLink::Http(_) => first_byte(&mut link, timings).await,
    };
    link.close();
    outcome
}

/// Measures the time to the head of the first response.
async fn first_byte(link: &mut StreamLink, timings: &mut ConnectTimings) -> Result<(), ConnectError> {
    let start = Clock::now();
    link.send(Message { sequence: 0, timestamp: NtpTime(0) })?;
    loop {
        match poll_fn(|context| link.poll_event(context)).await {
            LinkEvent::Reply(answer) | LinkEvent::Response(answer, _) => {
                timings.stages.push((ConnectStage::FirstByte, answer.at.since(start)));
                return Ok(());
            }
            LinkEvent::Closed(error) | LinkEvent::ClosedUnsent(_, error) => return Err(error),
            LinkEvent::Mismatch(_) | LinkEvent::Writable | LinkEvent::Ignored => {}
        }
    }
}
