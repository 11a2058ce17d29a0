//! What must hold in every world: verdicts against a ledger of the truth.

mod conservation;
mod hostile;
