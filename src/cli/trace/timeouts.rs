//! How long `pathmeter probe trace` waits.

use std::time::Duration;

/// How long to wait for the traces to the target.
pub(super) const FORWARD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the traces back, after those to the target. A target that cannot trace them does not
/// say so in every case.
pub(super) const REVERSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to wait for a rejection by this host after a trace without any answer. It looks for the next host
/// for three seconds before (ARP and neighbour discovery of Linux: three requests, one per second).
pub(super) const LINK_TIMEOUT: Duration = Duration::from_millis(3_500);

/// How long to wait for further rejections after the first of these: those of all probes come together.
pub(super) const REJECTIONS_SPREAD: Duration = Duration::from_millis(100);
