//! The supervisor of one node's process (spec 002, "Crash Recovery"): watches its signs of life, records what happened
//! when it dies, and starts it again while that makes sense.
//!
//! The decisions are plain values without clock or process: [`Watch`] judges beats, [`Policy`] judges deaths,
//! [`Delivered`] removes what a new life sends again. [`Supervisor`] gives them a process. The failure time and the end
//! of the log are recorded before the next life begins.

mod delivered;
mod policy;
mod process;
mod report;
mod watch;

pub use delivered::{Delivered, DeliveryError};
pub use policy::{Decision, Exit, Policy, RestartBudget};
pub use process::{Outcome, Supervisor, SupervisorError, SupervisorHandle, SupervisorOptions};
pub use report::{CrashReport, JournalTail, TailRecord};
pub use watch::{Beat, Verdict, Watch, WatchLimits};
