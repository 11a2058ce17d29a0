//! Small estimators that every kind of probe shares.

mod loss;
mod minimum;
mod quantile;
mod sequence;

pub use loss::RecentLoss;
pub use minimum::WindowedMinimum;
pub use quantile::quantile;
pub use sequence::{ArrivalOrder, ReceivedSequences};
