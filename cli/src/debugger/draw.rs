//! The debugger on a screen.

use super::app::{App, Pane, Panel};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, List, ListState, Paragraph};

const KEYS: &[&str] = &[
    "up, down, j, k       a record back or on; in the state: a field",
    "page up, page down   twenty of them",
    "home, end, g, G      to the first, to the last",
    "left, right          between records and state",
    "enter, space         fold or unfold a field",
    ":  t                 to a record, to a time",
    "/  n  N              find a text in inputs and outputs, again, back",
    "d                    to where the journal diverges",
    "tab                  to the next journal; the others follow its time",
    "q, esc               leave",
];

const CHANGED: Style = Style::new().fg(Color::Yellow);
const CURSOR: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Draws everything.
pub(crate) fn draw(frame: &mut Frame<'_>, app: &App) {
    let [body, foot] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
    if app.help {
        let lines: Vec<Line<'_>> = KEYS.iter().map(|line| Line::raw(*line)).collect();
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("keys")), body);
    } else {
        let share = Constraint::Ratio(1, app.panels.len() as u32);
        let areas = Layout::horizontal(vec![share; app.panels.len()]).split(body);
        for (at, (panel, area)) in app.panels.iter().zip(areas.iter()).enumerate() {
            let pane = Some(app.pane).filter(|_| at == app.focus);
            draw_panel(frame, panel, pane, *area);
        }
    }
    let text = match &app.ask {
        Some((ask, text)) => format!("{}{text}_", ask.words()),
        None => app.message.clone(),
    };
    frame.render_widget(Paragraph::new(text), foot);
}

fn draw_panel(frame: &mut Frame<'_>, panel: &Panel, pane: Option<Pane>, area: Rect) {
    let shares = [Constraint::Ratio(3, 10), Constraint::Ratio(3, 10), Constraint::Ratio(4, 10)];
    let [records, event, state] = Layout::vertical(shares).areas(area);
    draw_records(frame, panel, pane == Some(Pane::Records), records);
    let lines: Vec<Line<'_>> = panel.frame.lines().into_iter().map(Line::raw).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("what happened")), event);
    draw_state(frame, panel, pane == Some(Pane::State), state);
}

fn title(name: String, focused: bool) -> Line<'static> {
    let style = if focused { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
    Line::styled(name, style)
}

/// The records around the present one: there may be millions.
fn draw_records(frame: &mut Frame<'_>, panel: &Panel, focused: bool, area: Rect) {
    let seq = panel.frame.seq();
    let (first, last) = panel.tape.range();
    let rows = u64::from(area.height.saturating_sub(2)).max(1);
    let from = seq.saturating_sub(rows / 2).min((last + 1).saturating_sub(rows)).max(first);
    let until = last.min(from + rows - 1);
    let items = (from..=until).map(|at| {
        let line = panel.tape.line(at).unwrap_or_else(|| "the beginning".into());
        Line::styled(format!("{at:>8}  {line}"), if at == seq { CURSOR } else { Style::new() })
    });
    let name = format!("{} ({seq} of {last})", panel.tape.name);
    frame.render_widget(List::new(items).block(Block::bordered().title(title(name, focused))), area);
}

fn draw_state(frame: &mut Frame<'_>, panel: &Panel, focused: bool, area: Rect) {
    let fields = panel.visible();
    let items = fields.iter().map(|field| {
        let more = if field.opens { "" } else { " " };
        let text = format!("{}{more}{}", "  ".repeat(field.depth), field.text);
        Line::styled(text, if field.changed { CHANGED } else { Style::new() })
    });
    let name = format!("state after record {}, {} changed", panel.frame.seq(), changed(panel));
    let list = List::new(items).block(Block::bordered().title(title(name, focused)));
    let list = if focused { list.highlight_style(CURSOR) } else { list };
    let mut position = ListState::default().with_selected(Some(panel.cursor));
    frame.render_stateful_widget(list, area, &mut position);
}

/// Fields that are new, apart from what encloses them.
fn changed(panel: &Panel) -> usize {
    panel.tree.fields.iter().filter(|field| field.changed && !field.opens).count()
}
