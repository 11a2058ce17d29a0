//! The wait for the routes of all flows, which are printed while they become known.

use std::time::Duration;

use anyhow::anyhow;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{DirectedReport, Direction, Trace};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::time::sleep;

use super::super::{Failure, print_out};
use super::routes::{DirectedFlow, Routes};
use super::timeouts::{FORWARD_TIMEOUT, LINK_TIMEOUT, REJECTIONS_SPREAD, REVERSE_TIMEOUT};
use crate::clock::Clock;
use crate::loops::LoopEvent;

/// Waits for what the loops report.
pub(super) struct Watcher<'a, 'b> {
    pub(super) routes: &'a mut Routes<'b>,
    pub(super) reports: &'a mut UnboundedReceiver<DirectedReport>,
    pub(super) events: &'a mut Receiver<LoopEvent>,
    /// Whether each hop is printed as soon as it and all before it are known.
    pub(super) is_printed: bool,
}

impl Watcher<'_, '_> {
    /// Waits for the traces.
    pub(super) async fn watch(&mut self) -> Result<(), Failure> {
        for (direction, timeout) in
            [(Direction::Forward, FORWARD_TIMEOUT), (Direction::Reverse, REVERSE_TIMEOUT)]
        {
            if direction == Direction::Reverse
                && (self.routes.arguments.protocol != "udp" || !self.routes.is_reached())
            {
                break;
            }
            // What is known after that time is shown.
            let deadline = Clock::now() + timeout;
            for number in 0..u8::try_from(self.routes.arguments.flows).unwrap_or(u8::MAX) {
                self.watch_flow(DirectedFlow { direction, number }, deadline).await?;
            }
        }
        Ok(())
    }

    /// Waits for the trace of one flow, and prints its hops.
    async fn watch_flow(&mut self, flow: DirectedFlow, deadline: Timestamp) -> Result<(), Failure> {
        let is_printed = self.is_printed;
        let mut next = 1;
        loop {
            while let Some(text) = self.routes.line(flow, next).filter(|_| is_printed) {
                let title = if next == 1 { self.routes.flow_title(flow) } else { String::new() };
                print_out(&(title + &text))?;
                next += 1;
            }
            let is_complete = self.routes.trace(flow).is_some();
            if is_complete || !self.wait(deadline).await? {
                break;
            }
        }
        self.routes.fail_if_nothing_was_sent()?;
        self.await_late_rejection(flow).await?;
        self.routes.fail_if_rejected_here(flow)?;
        if is_printed {
            let title = if next == 1 { self.routes.flow_title(flow) } else { String::new() };
            print_out(&(title + &self.routes.end(flow)))?;
        }
        Ok(())
    }

    /// Waits for the next report or event, or until the deadline; returns whether there is more to wait for.
    async fn wait(&mut self, deadline: Timestamp) -> anyhow::Result<bool> {
        tokio::select! {
            Some(event) = self.events.recv() => {
                if let LoopEvent::NotStarted { reason, .. } = event {
                    return Err(anyhow!(reason));
                }
            }
            Some(report) = self.reports.recv() => self.routes.add(report),
            () = sleep(deadline.since(Clock::now())) => return Ok(false),
        }
        Ok(true)
    }

    /// If a flow did not reach the target and no probe was rejected so far, waits for that as long as is
    /// requested.
    async fn await_late_rejection(&mut self, flow: DirectedFlow) -> Result<(), Failure> {
        let is_unreached = |trace: &Trace| trace.rtt.is_none() && trace.rejection.is_none();
        let trace = self.routes.trace(flow);
        let is_open = trace.is_some_and(is_unreached);
        let has_no_answer = trace.is_some_and(|trace| trace.hops.is_empty());
        // Sockets of probes over TCP are closed before that.
        if flow.direction == Direction::Reverse || !is_open || self.routes.arguments.protocol == "tcp" {
            return Ok(());
        }
        let traced_at = self.routes.route(flow).and_then(|route| route.traced_at).unwrap_or_else(Clock::now);
        let least = if has_no_answer { LINK_TIMEOUT } else { Duration::ZERO };
        let mut deadline = traced_at + self.routes.arguments.wait.max(least);
        loop {
            if self.routes.rejection(flow).is_some() {
                deadline = deadline.min(Clock::now() + REJECTIONS_SPREAD);
            }
            if !self.wait(deadline).await? {
                break;
            }
        }
        Ok(())
    }
}
