//! Waiting: for a time, for a bell, for sockets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use super::socket::Socket;

/// What a socket has to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Readiness {
    /// Datagrams, stamps or complaints.
    pub(super) readable: bool,
    /// Stamps or complaints.
    pub(super) errors: bool,
}

/// The bell of a loop and its sockets, as `ppoll` takes them. To be made anew when the sockets change.
#[derive(Debug)]
pub(super) struct PollSet {
    /// The bell first, then the sockets in the order in which they were given.
    pollfds: Vec<libc::pollfd>,
}

impl PollSet {
    pub(super) fn new<'a>(wakeup: BorrowedFd<'_>, sockets: impl Iterator<Item = &'a Socket>) -> Self {
        let fds = std::iter::once(wakeup.as_raw_fd()).chain(sockets.map(|socket| socket.as_fd().as_raw_fd()));
        let pollfds = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        Self { pollfds }
    }

    /// Sleeps until the bell rings or `span` is over. True if it rang.
    pub(super) fn wait_for_wakeup(&mut self, span: Duration) -> bool {
        poll(&mut self.pollfds[..1], span)
    }

    /// Sleeps until the bell rings, a socket is ready, or `span` is over. True if anything happened.
    pub(super) fn wait(&mut self, span: Duration) -> bool {
        poll(&mut self.pollfds, span)
    }

    /// Whether the bell has rung, as of the last wait.
    pub(super) fn is_woken(&self) -> bool {
        self.pollfds[0].revents != 0
    }

    /// Looks which sockets are ready.
    pub(super) fn poll_sockets(&mut self) {
        poll(&mut self.pollfds[1..], Duration::ZERO);
    }

    /// What the `index`-th socket has, as of the last wait or look.
    pub(super) fn readiness(&self, index: usize) -> Readiness {
        let revents = self.pollfds.get(index + 1).map_or(0, |pollfd| pollfd.revents);
        Readiness { readable: revents != 0, errors: revents & libc::POLLERR != 0 }
    }
}

#[expect(unsafe_code, reason = "nix wants each descriptor borrowed anew for every call")]
fn poll(pollfds: &mut [libc::pollfd], span: Duration) -> bool {
    let count = libc::nfds_t::try_from(pollfds.len()).expect("fewer descriptors than memory");
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(span.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: span.subsec_nanos().into(),
    };
    for pollfd in pollfds.iter_mut() {
        pollfd.revents = 0;
    }
    // SAFETY: `polled` is `count` long and `time` outlives the call; a descriptor that was closed is reported, not used.
    let ready_count = unsafe { libc::ppoll(pollfds.as_mut_ptr(), count, &raw const time, std::ptr::null()) };
    if ready_count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        // What cannot be asked is looked at.
        for pollfd in pollfds.iter_mut() {
            pollfd.revents = libc::POLLIN | libc::POLLERR;
        }
    }
    ready_count != 0
}

/// Lets this thread sleep to the microsecond: without this the kernel adds up to 50 µs to every sleep.
#[expect(unsafe_code, reason = "prctl has no safe wrapper for the timer slack")]
pub(super) fn sleep_precisely() -> io::Result<()> {
    // SAFETY: PR_SET_TIMERSLACK reads one integer and touches no memory.
    let outcome = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
