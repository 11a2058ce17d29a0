//! Ctrl-C, for commands that then print what they have.

/// Waits for Ctrl-C.
pub(super) struct Interrupt(tokio::sync::watch::Receiver<bool>);

impl Interrupt {
    /// Begins to wait. The signal no longer ends the process by itself.
    pub(super) fn watch() -> Self {
        let (sender, has_come) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            // Without a handler for the signal it ends the process.
            while tokio::signal::ctrl_c().await.is_ok() {
                sender.send_replace(true);
            }
        });
        Self(has_come)
    }

    /// Whether it has come.
    pub(super) fn has_come(&self) -> bool {
        *self.0.borrow()
    }

    /// Completes when it comes.
    pub(super) async fn wait(&mut self) {
        if self.0.wait_for(|has_come| *has_come).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
