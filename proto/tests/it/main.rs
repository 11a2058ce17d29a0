//! What must hold in every world: verdicts against a ledger of the truth.

mod byhand;
mod conservation;
mod forged;
mod hostile;
