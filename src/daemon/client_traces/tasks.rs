//! The tasks that watch traces.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};

use crate::paths::PathId;

/// Tasks, each of which belongs to a path.
#[derive(Debug)]
pub(super) struct PathTasks<T> {
    tasks: JoinSet<T>,
    paths: HashMap<Id, PathId>,
}

/// A task that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::daemon) struct EndedTask<T> {
    pub(super) path: PathId,
    /// `None` if it has panicked.
    pub(super) result: Option<T>,
}

impl<T: Send + 'static> PathTasks<T> {
    pub(super) fn new() -> Self {
        Self { tasks: JoinSet::new(), paths: HashMap::new() }
    }

    /// Starts the task of a path.
    pub(super) fn spawn(&mut self, path: PathId, task: impl Future<Output = T> + Send + 'static) {
        let handle = self.tasks.spawn(task);
        self.paths.insert(handle.id(), path);
    }

    /// Waits for the end of a task. `None`: none is running.
    pub(super) async fn next_ended(&mut self) -> Option<EndedTask<T>> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok((id, result)) => (id, Some(result)),
            Err(error) => (error.id(), None),
        };
        Some(EndedTask { path: self.paths.remove(&id)?, result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn path_is_returned_also_if_its_task_panics_or_is_cancelled() {
        let mut tasks = PathTasks::new();
        let ended = |path, result| Some(EndedTask { path: PathId(path), result });
        assert_eq!(tasks.next_ended().await, None);
        tasks.spawn(PathId(1), async { panic!("expected by the test") });
        assert_eq!(tasks.next_ended().await, ended(1, None));
        tasks.spawn(PathId(2), std::future::pending());
        tasks.tasks.abort_all();
        assert_eq!(tasks.next_ended().await, ended(2, None));
        tasks.spawn(PathId(3), async {});
        assert_eq!(tasks.next_ended().await, ended(3, Some(())));
        assert!(tasks.paths.is_empty());
    }
}
