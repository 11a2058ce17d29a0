//! What must hold in every world: verdicts against a ledger of the truth.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    reason = "helpers of tests are no tests to the lints; SIM_SEED chooses one world"
)]

mod byhand;
mod conservation;
mod corpus;
mod foreign;
mod forged;
#[path = "../fuzzed/mod.rs"]
mod fuzzed;
mod hostile;
mod icmp;
mod prober;
mod stamp_suite;
mod stream;
