//! What the HTTP port serves: routes, the agent's status, the metrics page.
//!
//! * [`routes`] — which path is answered with what, and who may ask;
//! * [`scrape`] — the metrics page, in the format and the encoding that a scraper prefers;
//! * [`status`] — the daemon's snapshot of itself, from which requests are answered.

pub mod routes;
pub mod scrape;
pub mod status;
