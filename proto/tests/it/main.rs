//! What must hold in every world: verdicts against a ledger of the truth.

mod byhand;
mod conservation;
mod foreign;
mod forged;
mod hostile;
mod stamp_suite;
