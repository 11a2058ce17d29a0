//! Integration tests of the protocol machines, most of them simulations that are compared with a ledger of
//! the true events.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    reason = "the lints do not recognise helpers of tests as tests; SIM_SEED selects one world"
)]

mod conservation;
mod corpus;
mod delay_growth;
mod dispersion;
mod enumerator;
mod forged;
#[path = "../fuzzed/mod.rs"]
mod fuzzed;
mod hostile;
mod icmp;
mod leases;
mod manual;
mod prober;
mod rejection;
mod stamp_suite;
mod stream;
mod third_party;
mod trace;
mod trace_reports;
