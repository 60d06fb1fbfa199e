//! A run as pictures: one static page of HTML, and trace events that Perfetto and Chrome open.

use crate::chronicle::{Chronicle, What};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Pixels between two lanes.
const LANE_PX: u64 = 70;
/// Where the first lane is.
const TOP_PX: u64 = 60;
/// Where time begins.
const LEFT_PX: u64 = 140;
/// Pixels of the whole time.
const WIDTH_PX: u64 = 6000;

/// When a message was sent, by whom, to whom, what it says; and when it came, if it did.
struct Arrow<'a> {
    sent_ns: u64,
    from: u32,
    to: u32,
    text: &'a str,
    came_ns: Vec<u64>,
    lost: bool,
}

fn arrows(chronicle: &Chronicle) -> BTreeMap<u64, Arrow<'_>> {
    let mut arrows: BTreeMap<u64, Arrow<'_>> = BTreeMap::new();
    for entry in chronicle.entries() {
        match &entry.what {
            What::Sent { message, to, text } => {
                let (sent_ns, from, came_ns) = (entry.at_ns, entry.lane, Vec::new());
                arrows.insert(*message, Arrow { sent_ns, from, to: *to, text, came_ns, lost: false });
            }
            What::Received { message } => {
                arrows.entry(*message).and_modify(|arrow| arrow.came_ns.push(entry.at_ns));
            }
            What::Lost { message } => {
                arrows.entry(*message).and_modify(|arrow| arrow.lost = true);
            }
            What::Fault(_) | What::State(_) | What::Note(_) => {}
        }
    }
    arrows
}

/// The page: actors as lanes, messages as arrows, faults as marks, states as colours. It needs nothing but itself.
#[must_use]
pub fn html(title: &str, chronicle: &Chronicle) -> String {
    let end_ns = chronicle.entries().last().map_or(1, |entry| entry.at_ns.max(1));
    let x = |ns: u64| {
        LEFT_PX + u64::try_from(u128::from(ns) * u128::from(WIDTH_PX) / u128::from(end_ns)).unwrap_or(0)
    };
    let y = |lane: u32| TOP_PX + u64::from(lane) * LANE_PX;
    let height = TOP_PX + chronicle.lanes().len() as u64 * LANE_PX;
    let title = escape(title);
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>\
         <h1>{title}</h1><p>{end_ns} ns of simulated time, from left to right. Hover over anything for what it is. \
         <span class=\"key sent\">message</span> <span class=\"key lost\">lost</span> \
         <span class=\"key fault\">fault</span> <span class=\"key note\">note</span></p>\
         <div><svg width=\"{}\" height=\"{height}\" role=\"img\" aria-label=\"timeline\">",
        LEFT_PX + WIDTH_PX + 40
    );
    states(&mut page, chronicle, end_ns, &x, &y);
    for (lane, name) in (0u32..).zip(chronicle.lanes()) {
        let _ = write!(page, "<text class=\"lane\" x=\"8\" y=\"{}\">{}</text>", y(lane) + 4, escape(name));
    }
    for arrow in arrows(chronicle).values() {
        let (x1, y1, y2) = (x(arrow.sent_ns), y(arrow.from), y(arrow.to));
        let what = escape(arrow.text);
        for &came_ns in &arrow.came_ns {
            let x2 = x(came_ns);
            let _ = write!(
                page,
                "<g class=\"sent\"><title>{} to {} ns: {what}</title><line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" \
                 y2=\"{y2}\"/><circle cx=\"{x2}\" cy=\"{y2}\" r=\"2\"/></g>",
                arrow.sent_ns, came_ns
            );
        }
        if arrow.came_ns.is_empty() {
            let (middle, class) = (u64::midpoint(y1, y2), if arrow.lost { "lost" } else { "sent" });
            let _ = write!(
                page,
                "<g class=\"{class}\"><title>{} ns: {what}</title><line x1=\"{x1}\" y1=\"{y1}\" x2=\"{}\" \
                 y2=\"{middle}\"/></g>",
                arrow.sent_ns,
                x1 + 4
            );
        }
    }
    for entry in chronicle.entries() {
        let (class, text) = match &entry.what {
            What::Fault(text) => ("fault", text),
            What::Note(text) => ("note", text),
            What::Sent { .. } | What::Received { .. } | What::Lost { .. } | What::State(_) => continue,
        };
        let (x, y) = (x(entry.at_ns), y(entry.lane) - 8);
        let _ = write!(
            page,
            "<g class=\"{class}\"><title>{} ns: {}</title><path d=\"M{x} {y}l-5 -9h10z\"/></g>",
            entry.at_ns,
            escape(text)
        );
    }
    page.push_str("</svg></div></html>\n");
    page
}

const STYLE: &str = "body{font:14px system-ui,sans-serif;margin:1em;background:#fff;color:#222}div{overflow-x:auto}\
h1{font-size:1.2em}.lane{font-weight:600}line{stroke:#3568b0;stroke-width:1}circle{fill:#3568b0}\
.lost line{stroke:#c33;stroke-dasharray:3 2}.fault path{fill:#c33}.note path{fill:#2a8a3e}\
g:hover line{stroke-width:3}.key{padding:0 .5em;border-left:.7em solid #3568b0;margin-right:.6em}\
.key.lost,.key.fault{border-color:#c33}.key.note{border-color:#2a8a3e}.band{opacity:.35}";

/// A band in each lane for each stretch of a state.
fn states(
    page: &mut String,
    chronicle: &Chronicle,
    end_ns: u64,
    x: &impl Fn(u64) -> u64,
    y: &impl Fn(u32) -> u64,
) {
    for lane in (0u32..).take(chronicle.lanes().len()) {
        let changes = chronicle.entries().iter().filter(|entry| entry.lane == lane).filter_map(|entry| {
            if let What::State(state) = &entry.what { Some((entry.at_ns, state.as_str())) } else { None }
        });
        let changes: Vec<(u64, &str)> = changes.chain([(end_ns, "")]).collect();
        for pair in changes.windows(2) {
            let ((from_ns, state), (until_ns, _)) = (pair[0], pair[1]);
            let (left, width) = (x(from_ns), (x(until_ns) - x(from_ns)).max(1));
            let _ = write!(
                page,
                "<rect class=\"band\" x=\"{left}\" y=\"{}\" width=\"{width}\" height=\"16\" fill=\"{}\">\
                 <title>{from_ns} ns: {}</title></rect>",
                y(lane) - 8,
                colour(state),
                escape(state)
            );
        }
    }
}

/// A colour for a state: the same word, the same colour, in every run.
fn colour(state: &str) -> String {
    match state {
        "down" => "#444".into(),
        "up" => "#9bc29b".into(),
        other => {
            let sum = other.bytes().fold(7u64, |sum, byte| crate::decision::mix(sum, u64::from(byte)));
            format!("hsl({} 60% 60%)", sum % 360)
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Trace events in JSON: a track for each actor, states as slices, messages as flows, faults and notes as instants.
#[must_use]
pub fn trace(chronicle: &Chronicle) -> String {
    let mut events: Vec<String> = Vec::new();
    for (lane, name) in (0u32..).zip(chronicle.lanes()) {
        events.push(format!(
            r#"{{"ph":"M","pid":1,"tid":{lane},"name":"thread_name","args":{{"name":{}}}}}"#,
            json(name)
        ));
    }
    let mut open: BTreeMap<u32, ()> = BTreeMap::new();
    let mut last_ns = 0;
    for entry in chronicle.entries() {
        let (at, lane) = (micros(entry.at_ns), entry.lane);
        last_ns = entry.at_ns;
        match &entry.what {
            What::State(state) => {
                if open.insert(lane, ()).is_some() {
                    events.push(format!(r#"{{"ph":"E","pid":1,"tid":{lane},"ts":{at}}}"#));
                }
                let name = json(state);
                events.push(format!(r#"{{"ph":"B","pid":1,"tid":{lane},"ts":{at},"name":{name}}}"#));
            }
            What::Fault(text) | What::Note(text) => {
                let kind = if matches!(entry.what, What::Fault(_)) { "fault" } else { "note" };
                events.push(format!(
                    r#"{{"ph":"i","s":"t","pid":1,"tid":{lane},"ts":{at},"cat":"{kind}","name":{}}}"#,
                    json(text)
                ));
            }
            What::Sent { message, to, text } => {
                let name = json(text);
                events.push(format!(
                    r#"{{"ph":"X","pid":1,"tid":{lane},"ts":{at},"dur":1,"name":{name},"args":{{"to":{to}}}}}"#
                ));
                events.push(format!(
                    r#"{{"ph":"s","pid":1,"tid":{lane},"ts":{at},"id":{message},"cat":"message","name":"message"}}"#
                ));
            }
            What::Received { message } => {
                events
                    .push(format!(r#"{{"ph":"X","pid":1,"tid":{lane},"ts":{at},"dur":1,"name":"receive"}}"#));
                events.push(format!(
                    r#"{{"ph":"f","bp":"e","pid":1,"tid":{lane},"ts":{at},"id":{message},"cat":"message","name":"message"}}"#
                ));
            }
            What::Lost { message } => events.push(format!(
                r#"{{"ph":"i","s":"t","pid":1,"tid":{lane},"ts":{at},"cat":"lost","name":"lost {message}"}}"#
            )),
        }
    }
    let at = micros(last_ns);
    events.extend(open.keys().map(|lane| format!(r#"{{"ph":"E","pid":1,"tid":{lane},"ts":{at}}}"#)));
    format!("{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n{}\n]}}\n", events.join(",\n"))
}

/// Microseconds with the nanoseconds behind the point.
fn micros(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

fn json(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chronicle() -> Chronicle {
        let mut chronicle = Chronicle::new(true, vec!["node 0".into(), "node \"1\" <b>".into()]);
        chronicle.add(0, 0, || What::State("up".into()));
        chronicle.add(10, 0, || What::Sent { message: 1, to: 1, text: "a \"beat\" & more".into() });
        chronicle.add(20, 0, || What::Sent { message: 2, to: 1, text: "another".into() });
        chronicle.add(1500, 1, || What::Received { message: 1 });
        chronicle.add(1600, 0, || What::Lost { message: 2 });
        chronicle.add(1700, 0, || What::Fault("crash".into()));
        chronicle.add(1700, 0, || What::State("down".into()));
        chronicle.add(2000, 1, || What::Note("line\nbreak".into()));
        chronicle
    }

    #[test]
    fn the_page_shows_everything_and_asks_for_nothing() {
        let page = html("seed <7>", &chronicle());
        for part in
            ["seed &lt;7&gt;", "node &quot;1&quot; &lt;b&gt;", "beat&quot; &amp; more", "1700 ns: crash"]
        {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<g class=\"lost\">").count(), 1);
        assert_eq!(page.matches("class=\"band\"").count(), 2);
        assert!(!page.contains("http") && !page.contains("<script") && !page.contains("src="));
    }

    #[test]
    fn the_trace_is_json_and_balanced() {
        let text = trace(&chronicle());
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let events = value["traceEvents"].as_array().expect("events");
        let count = |ph: &str| events.iter().filter(|event| event["ph"] == ph).count();
        assert_eq!((count("M"), count("B"), count("E"), count("s"), count("f")), (2, 2, 2, 2, 1));
        let received = events.iter().find(|event| event["name"] == "receive").expect("it came");
        assert_eq!(received["ts"].as_f64(), Some(1.5));
    }

    #[test]
    fn nothing_happened_is_a_page_too() {
        let empty = Chronicle::new(false, vec!["node 0".into()]);
        assert!(html("empty", &empty).contains("node 0"));
        assert!(trace(&empty).contains("thread_name"));
    }
}
