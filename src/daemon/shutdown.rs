//! Stops the agent.

use std::time::Duration;

use tracing::{error, info};

use super::Daemon;

impl Daemon {
    /// Sends goodbyes, waits for pending verdicts, and stops. Scrapes are answered until the end.
    pub(super) async fn shutdown(mut self) {
        info!("stopping");
        self.supervision.notifier.stopping();
        self.publish_status(true);
        // Pending and further requests for a reload fail, which tells the requesters that the agent is
        // stopping.
        self.channels.reloads.close();
        while self.channels.reloads.try_recv().is_ok() {}
        self.channels.trace_requests.close();
        while self.channels.trace_requests.try_recv().is_ok() {}
        let grace = self.settings.config.agent.grace;
        let deadline = tokio::time::Instant::now() + grace;
        if self.settings.keys.mesh.is_some() {
            // Stop answering first: a reply after the goodbye would show peers that this agent is back.
            self.servers.stop_answering();
            self.send_goodbyes().await;
        }
        self.measuring.loops.stop(deadline.saturating_duration_since(tokio::time::Instant::now()));
        self.observability.events.close();
        let (timeout, app_state) = (grace + Duration::from_secs(1), self.app_state());
        let drained = tokio::time::timeout(timeout, self.drain());
        let (drained, ()) = tokio::join!(drained, app_state.websocket.leave(timeout));
        if drained.is_err() {
            error!("the prober did not stop in time");
        }
        self.servers.stop().await;
        self.stored_state.finish().await;
        info!("stopped");
    }

    /// Waits until the measuring threads end. Goodbyes of peers that leave at the same time are still
    /// handled.
    async fn drain(&mut self) {
        let mut ticker = tokio::time::interval(Duration::from_millis(5));
        while !self.measuring.loops.are_finished() {
            tokio::select! {
                Some(event) = self.channels.events.recv() => self.on_event(event),
                _ = ticker.tick() => {}
            }
        }
    }
}
