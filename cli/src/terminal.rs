//! Standard output and standard error as this program uses them.
//!
//! Results go to standard output, and one that cannot be written is an error that says so. What goes to standard error
//! is for whoever reads along: if nobody can, the work goes on (`eprintln!` would panic).

use std::io::{self, StdoutLock, Write};

/// Writes a line to standard error, if it can be written.
macro_rules! tell {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}
pub(crate) use tell;

/// Standard output, whose errors say that they are its own.
#[derive(Debug)]
pub(crate) struct Stdout(StdoutLock<'static>);

/// Standard output, locked.
pub(crate) fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(|error| named(&error))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(|error| named(&error))
    }
}

fn named(error: &io::Error) -> io::Error {
    // `write_all` tries again after this kind.
    if error.kind() == io::ErrorKind::Interrupted {
        return error.kind().into();
    }
    io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))
}
