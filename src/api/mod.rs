//! HTTP API: routes, the agent's status, the metrics page.
//!
//! * [`routes`] — routes requests and checks authorisation;
//! * `endpoints` — lists the paths;
//! * [`scrape`] — negotiates the format and encoding of the metrics page;
//! * [`renderer`] — renders that page on dedicated threads, and shares it among scrapers;
//! * `response` — builds responses;
//! * `bandwidth`, `events`, `flow_routes`, `traces` — what their paths respond;
//! * [`status`] — the snapshot of the daemon from which requests are answered.

mod bandwidth;
mod endpoints;
mod events;
mod flow_routes;
pub mod renderer;
mod response;
pub mod routes;
pub mod scrape;
pub mod status;
mod traces;
