//! Waits for a timeout, a wakeup or sockets (ppoll(2)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use super::socket::Socket;

/// What can be read from a socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Readiness {
    /// Datagrams, transmit timestamps or errors.
    pub(super) readable: bool,
    /// The error queue: transmit timestamps or errors.
    pub(super) errors: bool,
}

/// The wakeup descriptor (eventfd) of a loop and its sockets, in the form that `ppoll` takes. Must be rebuilt
/// when the sockets change.
#[derive(Debug)]
pub(super) struct PollSet {
    /// The wakeup descriptor, then the sockets in the given order.
    pollfds: Vec<libc::pollfd>,
}

impl PollSet {
    pub(super) fn new<'a>(wakeup: BorrowedFd<'_>, sockets: impl Iterator<Item = &'a Socket>) -> Self {
        let fds = std::iter::once(wakeup.as_raw_fd()).chain(sockets.map(|socket| socket.as_fd().as_raw_fd()));
        let pollfds = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        Self { pollfds }
    }

    /// Sleeps until a wakeup or until `span` has passed. Returns whether there was a wakeup.
    pub(super) fn wait_for_wakeup(&mut self, span: Duration) -> bool {
        poll(&mut self.pollfds[..1], span)
    }

    /// Sleeps until a wakeup, until a socket is ready, or until `span` has passed. Returns false on timeout.
    pub(super) fn wait(&mut self, span: Duration) -> bool {
        poll(&mut self.pollfds, span)
    }

    /// Whether the last wait saw a wakeup.
    pub(super) fn is_woken(&self) -> bool {
        self.pollfds[0].revents != 0
    }

    /// Polls the sockets without waiting.
    pub(super) fn poll_sockets(&mut self) {
        poll(&mut self.pollfds[1..], Duration::ZERO);
    }

    /// The readiness of the `index`-th socket, as of the last wait or poll.
    pub(super) fn readiness(&self, index: usize) -> Readiness {
        let revents = self.pollfds.get(index + 1).map_or(0, |pollfd| pollfd.revents);
        Readiness { readable: revents != 0, errors: revents & libc::POLLERR != 0 }
    }
}

#[expect(unsafe_code, reason = "nix requires borrowing each descriptor for every call")]
fn poll(pollfds: &mut [libc::pollfd], span: Duration) -> bool {
    let count = libc::nfds_t::try_from(pollfds.len()).expect("fewer descriptors than memory");
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(span.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: span.subsec_nanos().into(),
    };
    for pollfd in pollfds.iter_mut() {
        pollfd.revents = 0;
    }
    // SAFETY: `polled` is `count` long and `time` outlives the call; a descriptor that was closed is
    // reported, not used.
    let ready_count = unsafe { libc::ppoll(pollfds.as_mut_ptr(), count, &raw const time, std::ptr::null()) };
    if ready_count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        // If poll fails, all sockets are treated as ready.
        for pollfd in pollfds.iter_mut() {
            pollfd.revents = libc::POLLIN | libc::POLLERR;
        }
    }
    ready_count != 0
}

/// Sets the timer slack of this thread to 1 ns: by default the kernel extends every sleep by up to 50 µs.
#[expect(unsafe_code, reason = "prctl has no safe wrapper for the timer slack")]
pub(crate) fn sleep_precisely() -> io::Result<()> {
    // SAFETY: PR_SET_TIMERSLACK reads one integer and touches no memory.
    let outcome = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
