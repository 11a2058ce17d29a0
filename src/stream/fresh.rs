//! Fresh connections, made on a schedule of their own to measure what making one takes.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::grid::Grid;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::NtpTime;
use tokio::time::{sleep, timeout};

use super::dial::{Dial, Took};
use super::link::Link;
use super::link_event::Heard;
use super::trouble::Trouble;
use crate::clock::Clock;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::{Broken, Stage, StreamSeries};

/// Makes a connection every `every`, times it, and closes it. One that takes longer than `patience` has failed. A peer that is
/// leaving is left alone.
pub(super) async fn measure(
    dial: Arc<Dial>,
    every: Duration,
    patience: Duration,
    seed: u64,
    echo: Arc<EchoSeries>,
    series: Arc<StreamSeries>,
) {
    let mut grid = Grid::new(Clock::now(), every, seed);
    loop {
        sleep(grid.next().since(Clock::now())).await;
        if grid.take(Clock::now()).slot.is_none() || echo.is_draining() {
            continue;
        }
        let mut took = Took::default();
        let outcome = match timeout(patience, once(&dial, &mut took)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Trouble::new(Broken::Timeout, String::new())),
        };
        if let Some(span) = took.connect {
            series.connects_took(span);
        }
        for (stage, span) in took.stages {
            series.stage_took(stage, span);
        }
        if let Some(at) = took.certificate_expiry {
            series.certificate_expires(at);
        }
        if let Err(trouble) = outcome
            && !echo.is_draining()
        {
            series.connect_failed(trouble.why);
        }
    }
}

async fn once(dial: &Dial, took: &mut Took) -> Result<(), Trouble> {
    dial.resolve(took).await?;
    let mut link = dial.connect(took).await?;
    let outcome = match link {
        Link::Tcp(_) | Link::WebSocket(_) => Ok(()),
        Link::Http(_) => first_byte(&mut link, took).await,
    };
    link.close();
    outcome
}

/// What the server takes to begin its first answer.
async fn first_byte(link: &mut Link, took: &mut Took) -> Result<(), Trouble> {
    let began = Clock::now();
    link.send(Message { sequence: 0, stamp: NtpTime(0) })?;
    loop {
        match poll_fn(|context| link.poll_hear(context)).await {
            Heard::Answer(answer) | Heard::Page(answer, _) => {
                took.stages.push((Stage::FirstByte, answer.at.since(began)));
                return Ok(());
            }
            Heard::End(trouble) | Heard::Stale(_, trouble) => return Err(trouble),
            Heard::Mismatch(_) | Heard::Room | Heard::Nothing => {}
        }
    }
}
