//! `lite-llm debug`: a terminal over journals. [`tape`] winds, [`tree`] compares states, [`app`] is what keys do, [`draw`]
//! shows it.

mod app;
mod draw;
mod tape;
mod tree;

use anyhow::Context;
use app::App;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
pub(crate) use tape::Tape;
use tree::Tree;

/// Shows journals on the terminal until the user leaves.
///
/// # Errors
/// If the terminal cannot be read or written.
pub(crate) fn show(tapes: Vec<Tape>, at: Option<u64>) -> anyhow::Result<()> {
    let mut app = App::new(tapes, at)?;
    let mut terminal = ratatui::try_init().context("cannot take the terminal")?;
    let shown = (|| {
        while !app.done {
            terminal.draw(|frame| draw::draw(frame, &app))?;
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
            {
                app.key(key)?;
            }
        }
        anyhow::Ok(())
    })();
    ratatui::restore();
    shown
}

/// What is at a place, and the state there, as lines of text.
///
/// # Errors
/// If it is not on the tape.
pub(crate) fn print(tape: &mut Tape, at: u64) -> anyhow::Result<Vec<String>> {
    let frame = tape.frame(at)?;
    let mut lines = frame.lines();
    lines.push("state".into());
    lines.extend(Tree::of(&frame.before, &frame.after).lines());
    Ok(lines)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
