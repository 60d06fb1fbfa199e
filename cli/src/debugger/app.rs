//! What the debugger shows, and what keys make of it. It knows no terminal.

use super::tape::{Frame, Tape};
use super::tree::{Field, Tree};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::collections::BTreeSet;

/// Records or fields that a page key goes over.
const PAGE: i64 = 20;

/// Where keys go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pane {
    Records,
    State,
}

/// A question to the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Record,
    Seconds,
    Text,
}

impl Ask {
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Record => "record: ",
            Self::Seconds => "seconds since the first record: ",
            Self::Text => "find: ",
        }
    }
}

/// A tape and where it stands.
#[derive(Debug)]
pub(crate) struct Panel {
    pub(crate) tape: Tape,
    pub(crate) frame: Frame,
    pub(crate) tree: Tree,
    /// Fields that the user folded and unfolded; the rest follows what changed.
    closed: BTreeSet<String>,
    opened: BTreeSet<String>,
    /// The field under the cursor, among the visible ones.
    pub(crate) cursor: usize,
}

impl Panel {
    fn new(mut tape: Tape, at: u64) -> anyhow::Result<Self> {
        let frame = tape.frame(at)?;
        let tree = Tree::of(&frame.before, &frame.after);
        Ok(Self { tape, frame, tree, closed: BTreeSet::new(), opened: BTreeSet::new(), cursor: 0 })
    }

    fn go(&mut self, seq: u64) -> anyhow::Result<()> {
        let (first, last) = self.tape.range();
        let seq = seq.clamp(first, last);
        if seq != self.frame.seq() {
            self.frame = self.tape.frame(seq)?;
            self.tree = Tree::of(&self.frame.before, &self.frame.after);
            self.cursor = self.cursor.min(self.visible().len().saturating_sub(1));
        }
        Ok(())
    }

    /// The fields that are seen.
    pub(crate) fn visible(&self) -> Vec<Field> {
        let mut folded = self.tree.folded();
        folded.retain(|path| !self.opened.contains(path));
        folded.extend(self.closed.iter().cloned());
        self.tree.visible(&folded).cloned().collect()
    }

    fn toggle(&mut self) {
        let visible = self.visible();
        let Some(field) = visible.get(self.cursor).filter(|field| field.opens) else { return };
        let open = visible.get(self.cursor + 1).is_some_and(|next| next.depth > field.depth);
        let (from, to) =
            if open { (&mut self.opened, &mut self.closed) } else { (&mut self.closed, &mut self.opened) };
        from.remove(&field.path);
        to.insert(field.path.clone());
    }
}

/// Everything that is shown.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) panels: Vec<Panel>,
    /// The panel that keys move; the others follow its time.
    pub(crate) focus: usize,
    pub(crate) pane: Pane,
    pub(crate) ask: Option<(Ask, String)>,
    pub(crate) message: String,
    pub(crate) help: bool,
    pub(crate) done: bool,
    sought: String,
}

impl App {
    /// Shows tapes, the first at a place, the others at its time.
    pub(crate) fn new(tapes: Vec<Tape>, at: Option<u64>) -> anyhow::Result<Self> {
        let mut panels = Vec::new();
        for tape in tapes {
            let (_, last) = tape.range();
            let at = if panels.is_empty() { at.unwrap_or(last) } else { last };
            panels.push(Panel::new(tape, at)?);
        }
        let mut app = Self {
            panels,
            focus: 0,
            pane: Pane::Records,
            ask: None,
            message: "? for the keys".into(),
            help: false,
            done: false,
            sought: String::new(),
        };
        app.follow()?;
        Ok(app)
    }

    pub(crate) fn panel(&mut self) -> &mut Panel {
        &mut self.panels[self.focus]
    }

    /// The other panels go to the time of the one in focus.
    fn follow(&mut self) -> anyhow::Result<()> {
        let here = &self.panels[self.focus];
        let time = here.tape.time(here.frame.seq());
        for (at, panel) in self.panels.iter_mut().enumerate() {
            if at != self.focus {
                panel.go(panel.tape.at_time(time))?;
            }
        }
        Ok(())
    }

    fn go(&mut self, seq: u64) -> anyhow::Result<()> {
        let panel = self.panel();
        panel.go(seq)?;
        let at_end = panel.frame.seq() == panel.tape.range().1;
        if let Some(why) = panel.tape.broken().filter(|_| at_end) {
            self.message = format!("the tape ends here: {why}");
        }
        self.follow()
    }

    fn step(&mut self, by: i64) -> anyhow::Result<()> {
        match self.pane {
            Pane::Records => {
                let seq = self.panel().frame.seq();
                self.go(seq.saturating_add_signed(by))
            }
            Pane::State => {
                let panel = self.panel();
                let most = panel.visible().len().saturating_sub(1);
                let cursor = panel.cursor.saturating_add_signed(isize::try_from(by).unwrap_or(0));
                panel.cursor = cursor.min(most);
                Ok(())
            }
        }
    }

    fn find(&mut self, back: bool) -> anyhow::Result<()> {
        let sought = self.sought.clone();
        if sought.is_empty() {
            self.message = "nothing was searched for yet: / asks".into();
            return Ok(());
        }
        let from = self.panel().frame.seq();
        match self.panel().tape.find(from, &sought, back)? {
            Some(seq) => self.go(seq)?,
            None => {
                self.message = format!("no {} record has {sought:?}", if back { "earlier" } else { "later" })
            }
        }
        Ok(())
    }

    fn answered(&mut self, ask: Ask, text: &str) -> anyhow::Result<()> {
        match ask {
            Ask::Text => {
                text.clone_into(&mut self.sought);
                self.find(false)
            }
            Ask::Record => match text.trim().parse() {
                Ok(seq) => self.go(seq),
                Err(_) => {
                    self.message = format!("{text:?} is no number of a record");
                    Ok(())
                }
            },
            Ask::Seconds => match text.trim().parse::<f64>() {
                Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => {
                    let panel = self.panel();
                    let (first, _) = panel.tape.range();
                    let time = panel.tape.time(first) as f64 + seconds * 1e9;
                    let seq = panel.tape.at_time(time as u64);
                    self.go(seq)
                }
                _ => {
                    self.message = format!("{text:?} is no number of seconds");
                    Ok(())
                }
            },
        }
    }

    /// Takes a key.
    ///
    /// # Errors
    /// If the journal cannot be folded, which opening it has ruled out.
    pub(crate) fn key(&mut self, key: KeyEvent) -> anyhow::Result<()> {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            self.done = true;
            return Ok(());
        }
        if let Some((ask, mut text)) = self.ask.take() {
            match key.code {
                KeyCode::Enter => return self.answered(ask, &text),
                KeyCode::Esc => return Ok(()),
                KeyCode::Backspace => {
                    text.pop();
                }
                KeyCode::Char(c) => text.push(c),
                _ => {}
            }
            self.ask = Some((ask, text));
            return Ok(());
        }
        if std::mem::take(&mut self.help) {
            return Ok(());
        }
        self.message.clear();
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => self.done = true,
            KeyCode::Char('?') => self.help = true,
            KeyCode::Down | KeyCode::Char('j') => self.step(1)?,
            KeyCode::Up | KeyCode::Char('k') => self.step(-1)?,
            KeyCode::PageDown => self.step(PAGE)?,
            KeyCode::PageUp => self.step(-PAGE)?,
            KeyCode::Home | KeyCode::Char('g') => self.step(i64::MIN)?,
            KeyCode::End | KeyCode::Char('G') => self.step(i64::MAX)?,
            KeyCode::Left | KeyCode::Right => {
                self.pane = if self.pane == Pane::Records { Pane::State } else { Pane::Records };
            }
            KeyCode::Tab => self.focus = (self.focus + 1) % self.panels.len(),
            KeyCode::Enter | KeyCode::Char(' ') => self.panel().toggle(),
            KeyCode::Char(':') => self.ask = Some((Ask::Record, String::new())),
            KeyCode::Char('t') => self.ask = Some((Ask::Seconds, String::new())),
            KeyCode::Char('/') => self.ask = Some((Ask::Text, String::new())),
            KeyCode::Char('n') => self.find(false)?,
            KeyCode::Char('N') => self.find(true)?,
            KeyCode::Char('d') => {
                let (_, last) = self.panel().tape.range();
                match self.panel().tape.broken() {
                    Some(_) => self.go(last)?,
                    None => self.message = "this journal folds to its end: it diverges nowhere".into(),
                }
            }
            _ => {}
        }
        Ok(())
    }
}
