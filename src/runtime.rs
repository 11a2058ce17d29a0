//! A tokio runtime that can be dropped from asynchronous code.

use std::io;
use std::ops::Deref;

use tokio::runtime::{Builder, Runtime};

/// A runtime whose drop does not block. [`Runtime`] panics when a task drops it, and the last owner often is
/// a task.
#[derive(Debug)]
pub struct DetachedRuntime(Option<Runtime>);

impl DetachedRuntime {
    /// Builds the runtime.
    ///
    /// # Errors
    /// When the operating system refuses the event descriptors.
    pub fn build(builder: &mut Builder) -> io::Result<Self> {
        builder.build().map(|runtime| Self(Some(runtime)))
    }
}

impl Deref for DetachedRuntime {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("the runtime is present until the drop")
    }
}

impl Drop for DetachedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
