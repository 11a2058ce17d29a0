//! What the HTTP port serves: routes, the agent's status, the metrics page.
//!
//! * [`routes`] — which path is answered with what, and who may ask;
//! * [`scrape`] — in which format and encoding a scraper gets the metrics page;
//! * [`renderer`] — renders that page on threads of its own, and shares it;
//! * [`status`] — the daemon's snapshot of itself, from which requests are answered.

pub mod renderer;
pub mod routes;
pub mod scrape;
pub mod status;
