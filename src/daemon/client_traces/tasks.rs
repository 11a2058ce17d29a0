//! The tasks that watch traces.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};

use crate::paths::PathId;

/// Tasks, each of which belongs to a path.
#[derive(Debug, Default)]
pub(super) struct PathTasks {
    tasks: JoinSet<()>,
    paths: HashMap<Id, PathId>,
}

impl PathTasks {
    /// Starts the task of a path.
    pub(super) fn spawn(&mut self, path: PathId, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.tasks.spawn(task);
        self.paths.insert(handle.id(), path);
    }

    /// Waits for the end of a task, also of one that panics, and returns its path. `None`: no task is
    /// running.
    pub(super) async fn next_ended(&mut self) -> Option<PathId> {
        let id = match self.tasks.join_next_with_id().await? {
            Ok((id, ())) => id,
            Err(error) => error.id(),
        };
        self.paths.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn path_is_returned_also_if_its_task_panics_or_is_cancelled() {
        let mut tasks = PathTasks::default();
        assert_eq!(tasks.next_ended().await, None);
        tasks.spawn(PathId(1), async { panic!("expected by the test") });
        assert_eq!(tasks.next_ended().await, Some(PathId(1)));
        tasks.spawn(PathId(2), std::future::pending());
        tasks.tasks.abort_all();
        assert_eq!(tasks.next_ended().await, Some(PathId(2)));
        tasks.spawn(PathId(3), async {});
        assert_eq!(tasks.next_ended().await, Some(PathId(3)));
        assert!(tasks.paths.is_empty());
    }
}
