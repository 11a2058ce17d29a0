//! A tokio runtime that may be dropped anywhere.

use std::io;
use std::ops::Deref;

use tokio::runtime::{Builder, Runtime};

/// A runtime whose drop waits for nothing: tokio's own panics when it is dropped by a task, as the last owner often is.
#[derive(Debug)]
pub struct DetachedRuntime(Option<Runtime>);

impl DetachedRuntime {
    /// Builds it.
    ///
    /// # Errors
    /// When the operating system gives no event descriptors.
    pub fn build(builder: &mut Builder) -> io::Result<Self> {
        builder.build().map(|runtime| Self(Some(runtime)))
    }
}

impl Deref for DetachedRuntime {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until the drop")
    }
}

impl Drop for DetachedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
