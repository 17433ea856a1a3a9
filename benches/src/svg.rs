//! The drawing: one bar for each thing to reach, all from one line. A bar that ends right of the
//! line has reached it; how far right or left is how far beyond or short, on a logarithmic scale.

use std::fmt::Write;

use crate::machine::Machine;
use crate::report::count;
use crate::row::{Result, Verdict};

const WIDTH: f64 = 1120.0;
/// Where bars may begin and end.
const LEFT: f64 = 520.0;
const RIGHT: f64 = 960.0;
/// The scores at those ends; beyond them a bar is cut.
const LOW: f64 = 0.25;
const HIGH: f64 = 4.0;
const STEP: f64 = 21.0;
const TOP: f64 = 118.0;
// Told apart by people who do not see red and green, and by their lightness in print.
const REACHED: &str = "#2a78a8";
const SHORT: &str = "#e07b1a";

fn x(score: f64) -> f64 {
    let part = (score.clamp(LOW, HIGH) / LOW).ln() / (HIGH / LOW).ln();
    LEFT + part * (RIGHT - LEFT)
}

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draw all things to reach.
pub fn draw(machine: &Machine, results: &[Result]) -> String {
    let bars = |r: &Result| r.verdicts.iter().filter(|v| v.score.is_some()).count();
    let lines: usize = results.iter().map(bars).sum();
    let groups = results.iter().filter(|r| bars(r) > 0).count();
    let height = TOP + lines as f64 * STEP + groups as f64 * 5.0 + 60.0;
    let bottom = height - 52.0;
    let (met, short) = count(results);
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"DejaVu Sans, Verdana, sans-serif\" font-size=\"12.5\" fill=\"#1b1f24\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"24\" y=\"36\" font-size=\"21\" font-weight=\"bold\">libqblk beside its peers: {met} of {} targets reached</text>\n",
        met + short
    );
    let about = machine.to_string();
    for (i, line) in about.lines().enumerate() {
        let _ = writeln!(
            s,
            "<text x=\"24\" y=\"{}\" fill=\"#59636e\">{}</text>",
            58 + i * 17,
            escape(line)
        );
    }
    scale(&mut s, bottom);
    let mut y = TOP;
    for (i, r) in results.iter().filter(|r| bars(r) > 0).enumerate() {
        let tall = bars(r) as f64 * STEP + 5.0;
        if i % 2 == 0 {
            let _ = writeln!(
                s,
                "<rect x=\"12\" y=\"{y}\" width=\"{}\" height=\"{tall}\" fill=\"#818b98\" fill-opacity=\"0.09\"/>",
                WIDTH - 24.0
            );
        }
        let _ = writeln!(s, "<text x=\"24\" y=\"{}\">{}</text>", y + 17.5, escape(r.title));
        for (j, v) in r.verdicts.iter().filter(|v| v.score.is_some()).enumerate() {
            bar(&mut s, v, y + 2.5 + j as f64 * STEP);
        }
        y += tall;
    }
    // Over the bars, so that it is seen where one crosses it.
    let _ = writeln!(
        s,
        "<line x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{bottom}\" stroke=\"#1b1f24\" stroke-width=\"2\"/>",
        x(1.0),
        TOP - 6.0
    );
    legend(&mut s, height - 22.0);
    s.push_str("</svg>\n");
    s
}

fn scale(s: &mut String, bottom: f64) {
    for (score, name) in [
        (0.25, "¼ of it"),
        (0.5, "half of it"),
        (1.0, "target"),
        (2.0, "twice"),
        (4.0, "four times"),
    ] {
        let at = x(score);
        let weight = if score == 1.0 { " font-weight=\"bold\"" } else { " fill=\"#59636e\"" };
        let _ = writeln!(
            s,
            "<line x1=\"{at}\" x2=\"{at}\" y1=\"{}\" y2=\"{bottom}\" stroke=\"#d1d9e0\"/>",
            TOP - 6.0
        );
        let _ = writeln!(
            s,
            "<text x=\"{at}\" y=\"{}\" text-anchor=\"middle\"{weight}>{name}</text>",
            TOP - 11.0
        );
    }
}

fn bar(s: &mut String, v: &Verdict, y: f64) {
    let score = v.score.unwrap_or(1.0);
    let (from, to) = (x(1.0), x(score));
    let color = if v.ok() { REACHED } else { SHORT };
    let (left, wide) = (from.min(to), (to - from).abs().max(1.5));
    let _ = writeln!(
        s,
        "<rect x=\"{left:.1}\" y=\"{}\" width=\"{wide:.1}\" height=\"{}\" fill=\"{color}\"/>",
        y + 3.0,
        STEP - 6.0
    );
    if !(LOW..=HIGH).contains(&score) {
        // Longer than there is room for.
        let (tip, base) = if score > HIGH { (RIGHT + 9.0, RIGHT) } else { (LEFT - 9.0, LEFT) };
        let _ = writeln!(
            s,
            "<polygon points=\"{base},{} {base},{} {tip},{}\" fill=\"{color}\"/>",
            y + 3.0,
            y + STEP - 3.0,
            y + STEP / 2.0
        );
    }
    let weight = if v.ok() { "" } else { " font-weight=\"bold\"" };
    let _ = writeln!(
        s,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\"{weight}>{}</text>",
        LEFT - 16.0,
        y + 15.0,
        escape(&v.shown)
    );
    let mark = if v.ok() { "✓" } else { "short:" };
    let _ = writeln!(
        s,
        "<text x=\"{}\" y=\"{}\" fill=\"{}\"{weight}>{mark} {}</text>",
        RIGHT + 18.0,
        y + 15.0,
        if v.ok() { "#59636e" } else { SHORT },
        escape(&v.need)
    );
}

fn legend(s: &mut String, y: f64) {
    let _ = writeln!(
        s,
        "<rect x=\"24\" y=\"{0}\" width=\"26\" height=\"12\" fill=\"{REACHED}\"/><text x=\"57\" y=\"{1}\">reached</text>\
         <rect x=\"130\" y=\"{0}\" width=\"26\" height=\"12\" fill=\"{SHORT}\"/><text x=\"163\" y=\"{1}\">short of it</text>\
         <text x=\"250\" y=\"{1}\" fill=\"#59636e\">Right of the line is better than the target asks; the scale is logarithmic. Times and memory: less is better, so is right.</text>",
        y - 11.0,
        y
    );
}
