//! A run as a page: where the time of each step went, and how near the roof it came.

use super::course::Course;
use super::figures::Figures;
use std::fmt::Write;

/// Width of a drawing, in its own units.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 240.0;
const COMPUTE: &str = "#3b7dd8";
const WAIT: &str = "#d8743b";
const OTHER: &str = "#9a9a9a";

/// The page, complete in itself.
pub(crate) fn page(title: &str, course: &Course, figures: &Figures) -> String {
    let mut page = String::new();
    let title = escaped(title);
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n<style>\
         body{{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;\
         background:#fff}}svg{{width:100%;height:auto}}text{{font:13px system-ui,sans-serif;fill:#222}}\
         pre{{overflow-x:auto}}.key b{{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em}}</style></head>\
         <body>\n<h1>{title}</h1>\n<pre>{}</pre>\n",
        escaped(&figures.to_string())
    );
    page.push_str("<h2>Where the time of each step went</h2>\n");
    let _ = writeln!(
        page,
        "<p class=\"key\"><b style=\"background:{COMPUTE}\"></b>computing<b style=\"background:{WAIT}\"></b>waiting for \
         experts<b style=\"background:{OTHER}\"></b>else</p>"
    );
    steps(&mut page, course);
    page.push_str("<h2>Held against what was possible</h2>\n");
    let rate = |name, value: f64| (name, value, format!("{:.1} %", value * 100.0));
    bars(
        &mut page,
        &[
            rate("memory: read, of what plain reading has", figures.roofline_share),
            rate("experts: there when needed", figures.hit_rate),
            rate("experts: there with the best eviction", figures.belady_hit_rate),
            rate("experts: there with plain recency", figures.lru_hit_rate),
            rate("experts: there if all were alike", figures.uniform_hit_rate),
        ],
    );
    page.push_str("</body></html>\n");
    page
}

/// A column for each step that decodes.
fn steps(page: &mut String, course: &Course) {
    let steps: Vec<_> = course.decode().collect();
    let most = steps.iter().map(|step| step.wall_ns).max().unwrap_or(1).max(1) as f64;
    let width = WIDTH / steps.len().max(1) as f64;
    let _ = writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">", HEIGHT + 20.0);
    for (at, step) in steps.iter().enumerate() {
        let parts = [
            (COMPUTE, step.took_ns.saturating_sub(step.waited_ns)),
            (WAIT, step.waited_ns),
            (OTHER, step.wall_ns.saturating_sub(step.took_ns)),
        ];
        let mut top = HEIGHT;
        for (colour, ns) in parts {
            let height = ns as f64 / most * (HEIGHT - 16.0);
            top -= height;
            let x = at as f64 * width;
            let _ = writeln!(
                page,
                "<rect x=\"{x:.2}\" y=\"{top:.2}\" width=\"{:.2}\" height=\"{height:.2}\" fill=\"{colour}\"/>",
                (width - 0.5).max(0.5)
            );
        }
    }
    let _ = writeln!(
        page,
        "<text x=\"0\" y=\"12\">{:.1} ms</text><text x=\"0\" y=\"{}\">step 1</text>\
         <text x=\"{WIDTH}\" y=\"{}\" text-anchor=\"end\">step {}</text></svg>",
        most / 1e6,
        HEIGHT + 16.0,
        HEIGHT + 16.0,
        steps.len()
    );
}

/// A bar for each share of a whole.
fn bars(page: &mut String, bars: &[(&str, f64, String)]) {
    let (row, left) = (28.0, 420.0);
    let _ = writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">", row * bars.len() as f64);
    for (at, (name, share, value)) in bars.iter().enumerate() {
        let y = at as f64 * row;
        let whole = WIDTH - left - 80.0;
        let length = share.clamp(0.0, 1.0) * whole;
        let _ = writeln!(
            page,
            "<text x=\"0\" y=\"{:.0}\">{}</text><rect x=\"{left}\" y=\"{:.0}\" width=\"{whole}\" height=\"16\" \
             fill=\"#e8e8e8\"/><rect x=\"{left}\" y=\"{:.0}\" width=\"{length:.1}\" height=\"16\" fill=\"{COMPUTE}\"/>\
             <text x=\"{WIDTH}\" y=\"{:.0}\" text-anchor=\"end\">{value}</text>",
            y + 18.0,
            escaped(name),
            y + 5.0,
            y + 5.0,
            y + 18.0
        );
    }
    page.push_str("</svg>\n");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
