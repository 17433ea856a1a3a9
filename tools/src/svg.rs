//! The picture of `qblk map --svg`: the disk as rows of cells, read like a page.
//!
//! The colour says in which image of the chain bytes are, the texture what they are, so that nobody
//! depends on telling all colours apart (they are those of Okabe and Ito). A cell with several things
//! in it shows their shares as layers; the smallest share stays visible.

use std::fmt::Write;

use qblk::Extent;

use crate::map::name_at;
use crate::open::Link;
use crate::tally::{Class, Kind, Totals};
use crate::units::{human, human_and_exact, percent, shown};

const COLUMNS: u64 = 64;
const MAX_ROWS: u64 = 32;
/// Smaller than anything that a format places.
const MIN_CELL: u64 = 4096;
/// The last colour is for all images from there on down.
const COLOURS: [&str; 7] =
    ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A6A53"];
const DEEPEST: u32 = COLOURS.len() as u32 - 1;
/// Stored classes of each depth, then zero, then unallocated.
const SLOTS: usize = COLOURS.len() * 2 + 2;

const WIDTH: u64 = 960;
const LEFT: u64 = 96;
const GRID_WIDTH: u64 = 832;
const INK: &str = "#1F2933";
const FAINT: &str = "#5F6B7A";

/// What is gathered of an image for its picture.
pub struct Picture {
    offset: u64,
    end: u64,
    /// Bytes of a cell.
    cell: u64,
    /// Bytes of each slot, a cell.
    cells: Vec<[u64; SLOTS]>,
    totals: Totals,
}

/// Layers of a cell from the top down: slot and height.
type Layers = Vec<(usize, u64)>;

fn slot(class: Class) -> usize {
    let depth = class.depth as usize;
    match class.kind {
        Kind::Data => depth * 2,
        Kind::Compressed => depth * 2 + 1,
        Kind::Zero => SLOTS - 2,
        Kind::Unallocated => SLOTS - 1,
    }
}

fn fill(slot: usize) -> String {
    match slot {
        s if s == SLOTS - 1 => "#EEF1F4".into(),
        s if s == SLOTS - 2 => "url(#zero)".into(),
        s if s % 2 == 1 => format!("url(#compressed{})", s / 2),
        s => COLOURS[s / 2].into(),
    }
}

impl Picture {
    /// A picture of the bytes `offset..end`.
    pub fn new(offset: u64, end: u64) -> Self {
        let length = end - offset;
        let cell = length.div_ceil(COLUMNS * MAX_ROWS).next_power_of_two().max(MIN_CELL);
        let cells = vec![[0; SLOTS]; length.div_ceil(cell) as usize];
        Self { offset, end, cell, cells, totals: Totals::default() }
    }

    /// Put an extent in.
    pub fn add(&mut self, e: &Extent) {
        let mut class = Class::of(e);
        class.depth = class.depth.min(DEEPEST);
        self.totals.add_as(class, e);
        let slot = slot(class);
        let (mut from, to) = (e.offset - self.offset, e.offset + e.length - self.offset);
        while from < to {
            let cell = from / self.cell;
            let stop = to.min((cell + 1).saturating_mul(self.cell));
            if let Some(cell) = self.cells.get_mut(cell as usize) {
                cell[slot] += stop - from;
            }
            from = stop;
        }
    }

    /// The SVG. `links` are the images of the chain, `size` is that of the whole disk.
    pub fn render(&self, links: &[Link], size: u64) -> String {
        let mut body = String::new();
        self.heading(&mut body, links, size);
        self.bar(&mut body);
        let mut y = self.legend(&mut body, links, 130);
        if self.cells.is_empty() {
            text(
                &mut body,
                LEFT,
                y + 30,
                13,
                FAINT,
                "start",
                "The range is empty: there is nothing to draw.",
            );
            y += 50;
        } else {
            y = self.grid(&mut body, links, y + 24);
        }
        let name = escape(&name_at(links, 0));
        let height = y + 24;
        let mut out = String::new();
        let _ = write!(
            out,
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
             font-family=\"system-ui, 'DejaVu Sans', Arial, sans-serif\">\n\
             <title>Where the bytes of {name} live</title>\n<desc>{}</desc>\n{}\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#FFFFFF\"/>\n{body}</svg>\n",
            escape(&self.describe(links)),
            self.patterns(),
        );
        out
    }

    fn classes(&self) -> impl Iterator<Item = (Class, u64)> + '_ {
        self.totals.bytes.iter().map(|(class, bytes)| (*class, *bytes))
    }

    /// The totals in words, for those who cannot see the picture.
    fn describe(&self, links: &[Link]) -> String {
        let parts: Vec<_> = self
            .classes()
            .map(|(class, bytes)| format!("{}: {}", label(class, links), human_and_exact(bytes)))
            .collect();
        parts.join("; ")
    }

    fn patterns(&self) -> String {
        let mut out = String::from("<defs>\n");
        let mut depths: Vec<_> = self
            .classes()
            .filter(|(class, _)| class.kind == Kind::Compressed)
            .map(|(class, _)| class.depth as usize)
            .collect();
        depths.dedup();
        for d in depths {
            let _ = writeln!(
                out,
                "<pattern id=\"compressed{d}\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\">\
                 <rect width=\"6\" height=\"6\" fill=\"{}\"/>\
                 <path d=\"M-1.5,1.5 l3,-3 M0,6 l6,-6 M4.5,7.5 l3,-3\" stroke=\"#FFFFFF\" \
                 stroke-width=\"1.6\"/></pattern>",
                COLOURS[d]
            );
        }
        out.push_str(
            "<pattern id=\"zero\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\">\
             <rect width=\"6\" height=\"6\" fill=\"#D3D8DE\"/>\
             <circle cx=\"3\" cy=\"3\" r=\"1.2\" fill=\"#6B7785\"/></pattern>\n</defs>\n",
        );
        out
    }

    fn heading(&self, out: &mut String, links: &[Link], size: u64) {
        let name = shorten(&name_at(links, 0), 64);
        let _ = writeln!(
            out,
            "<text x=\"32\" y=\"42\" font-size=\"22\" font-weight=\"600\" fill=\"{INK}\">{}</text>",
            escape(&name)
        );
        let mut facts = Vec::new();
        if let Some(link) = links.first() {
            facts.push(link.info.format.to_owned());
            facts.push(human_and_exact(size));
            if let Some(allocated) = link.info.allocated {
                facts.push(format!("{} in use on the host", human(allocated)));
            }
            if link.info.cluster_size > 0 {
                facts.push(format!("clusters of {}", human(link.info.cluster_size.into())));
            }
            match links.len() - 1 {
                0 => {}
                1 => facts.push("1 image below".into()),
                n => facts.push(format!("{n} images below")),
            }
        }
        if (self.offset, self.end) != (0, size) {
            facts.push(format!(
                "shown: {} from offset {}",
                human(self.end - self.offset),
                human(self.offset)
            ));
        }
        text(out, 32, 66, 13, FAINT, "start", &facts.join("  ·  "));
    }

    /// All of it in one bar, by class.
    fn bar(&self, out: &mut String) {
        let (whole, width) = (self.end - self.offset, WIDTH - 64);
        let shares: Vec<_> = self.classes().map(|(class, bytes)| (slot(class), bytes)).collect();
        let mut x = 32;
        for (slot, w) in apportion(&shares, whole, width, 3) {
            rect(out, x, 84, w, 22, &fill(slot));
            x += w;
        }
        let _ = writeln!(
            out,
            "<rect x=\"32\" y=\"84\" width=\"{width}\" height=\"22\" fill=\"none\" stroke=\"#9AA5B1\"/>"
        );
    }

    /// What the colours and textures mean, with totals; answers where it ends.
    fn legend(&self, out: &mut String, links: &[Link], mut y: u64) -> u64 {
        let whole = self.end - self.offset;
        for (class, bytes) in self.classes() {
            let _ = writeln!(
                out,
                "<g data-kind=\"{}\" data-depth=\"{}\" data-bytes=\"{bytes}\">",
                class.kind.word(),
                class.depth
            );
            let _ = writeln!(
                out,
                "<rect x=\"32\" y=\"{}\" width=\"26\" height=\"14\" fill=\"{}\" stroke=\"#9AA5B1\"/>",
                y - 11,
                fill(slot(class))
            );
            text(out, 70, y, 13, INK, "start", &shorten(&label(class, links), 78));
            text(out, 830, y, 13, INK, "end", &human(bytes));
            text(out, 928, y, 13, INK, "end", &percent(bytes, whole));
            out.push_str("</g>\n");
            y += 22;
        }
        y
    }

    fn grid(&self, out: &mut String, links: &[Link], top: u64) -> u64 {
        let count = self.cells.len() as u64;
        let columns = COLUMNS.min(count);
        let rows = count.div_ceil(columns);
        // Few rows are drawn higher, so that a small image is no thin strip.
        let height = (416 / rows).clamp(13, 44);
        let width = GRID_WIDTH / columns;
        let y0 = top + 44;
        let how = match count {
            1 => "One cell is all of it".to_owned(),
            _ => format!(
                "One cell is {}, a row {}; read like a page. What shares a cell is stacked in it, \
                 the least of it still visible.",
                human(self.cell),
                human(self.cell.saturating_mul(columns))
            ),
        };
        text(out, LEFT, top, 13, FAINT, "start", &how);
        self.column_axis(out, columns, width, y0);
        for row in 0..rows {
            let y = y0 + row * height;
            // With many rows a label each would be noise.
            if row % rows.div_ceil(8) == 0 {
                let at = self.offset + row * columns * self.cell;
                text(out, LEFT - 10, y + height / 2 + 4, 11, FAINT, "end", &axis(at));
            }
            let first = row * columns;
            self.row(out, links, first, columns.min(count - first), (y, width, height));
        }
        let bottom = y0 + rows * height;
        grid_lines(out, count, columns, (y0, width, height));
        let last = count - (rows - 1) * columns;
        let x = LEFT + last * width;
        text(
            out,
            x.max(LEFT + 60),
            bottom + 16,
            11,
            FAINT,
            "end",
            &format!("end: {}", human(self.end)),
        );
        bottom + 20
    }

    fn column_axis(&self, out: &mut String, columns: u64, width: u64, y: u64) {
        let step = columns.div_ceil(4).next_power_of_two();
        for column in (0..=columns).step_by(step as usize) {
            let x = LEFT + column * width;
            let _ = writeln!(out, "<path d=\"M{x},{} v-6\" stroke=\"#9AA5B1\"/>", y - 2);
            let text_of = format!("+{}", axis(column * self.cell));
            text(out, x, y - 12, 11, FAINT, "middle", &text_of);
        }
    }

    /// A row of cells; neighbours that look the same are one shape.
    fn row(
        &self,
        out: &mut String,
        links: &[Link],
        first: u64,
        n: u64,
        (y, width, height): (u64, u64, u64),
    ) {
        let layers: Vec<Layers> =
            (first..first + n).map(|i| self.layers(&self.cells[i as usize], height)).collect();
        let mut from = 0;
        while from < layers.len() {
            let same = layers[from..].iter().take_while(|l| **l == layers[from]).count();
            let (x, w) = (LEFT + from as u64 * width, same as u64 * width);
            let tip = self.tip(links, first + from as u64, same as u64);
            let _ = writeln!(out, "<g><title>{}</title>", escape(&tip));
            let mut top = y;
            for (slot, h) in &layers[from] {
                rect(out, x, top, w, *h, &fill(*slot));
                top += h;
            }
            out.push_str("</g>\n");
            from += same;
        }
    }

    /// The layers of a cell, the emptiest on top.
    fn layers(&self, cell: &[u64; SLOTS], height: u64) -> Layers {
        let shares: Vec<_> =
            (0..SLOTS).rev().filter(|&s| cell[s] > 0).map(|s| (s, cell[s])).collect();
        apportion(&shares, cell.iter().sum(), height, 3)
    }

    /// What is in `n` cells, in words.
    fn tip(&self, links: &[Link], first: u64, n: u64) -> String {
        let from = self.offset + first * self.cell;
        let to = self.end.min(from.saturating_add(n * self.cell));
        let mut sums = [0; SLOTS];
        for cell in &self.cells[first as usize..(first + n) as usize] {
            sums.iter_mut().zip(cell).for_each(|(sum, bytes)| *sum += bytes);
        }
        let parts: Vec<_> = (0..SLOTS)
            .filter(|&s| sums[s] > 0)
            .map(|s| format!("{} {}", human(sums[s]), slot_label(s, links)))
            .collect();
        format!("{from} to {to}: {}", parts.join(", "))
    }
}

/// Share out `whole` pixels by bytes; whatever is there gets at least `least` of them, or as many as
/// all can have.
fn apportion(shares: &[(usize, u64)], bytes: u64, whole: u64, least: u64) -> Vec<(usize, u64)> {
    let least = least.min(whole / shares.len().max(1) as u64);
    let exact = |b: u64| (u128::from(b) * u128::from(whole) / u128::from(bytes.max(1))) as u64;
    let mut out: Vec<_> = shares.iter().map(|&(slot, b)| (slot, exact(b).max(least))).collect();
    // The largest pay for, or take, what rounding and the least have left over.
    loop {
        let sum: u64 = out.iter().map(|(_, w)| w).sum();
        match out.iter_mut().max_by_key(|(_, w)| *w) {
            Some((_, w)) if sum > whole => *w -= 1,
            Some((_, w)) if sum < whole => *w += 1,
            _ => return out,
        }
    }
}

fn slot_label(s: usize, links: &[Link]) -> String {
    let kind = match s {
        s if s == SLOTS - 1 => Kind::Unallocated,
        s if s == SLOTS - 2 => Kind::Zero,
        s if s % 2 == 1 => Kind::Compressed,
        _ => Kind::Data,
    };
    let depth = if kind.is_stored() { (s / 2) as u32 } else { 0 };
    label(Class { kind, depth }, links)
}

fn label(class: Class, links: &[Link]) -> String {
    let name = match links.get(class.depth as usize) {
        Some(link) => {
            let path = std::path::Path::new(&link.name);
            shown(path.file_name().unwrap_or(&link.name))
        }
        None => format!("image {} below", class.depth),
    };
    let raw = links.first().is_some_and(|link| link.info.format == "raw");
    match class.kind {
        Kind::Zero if raw => format!("hole in {name} (reads as zeroes)"),
        Kind::Zero => format!("zeroes, by {name}"),
        Kind::Unallocated => "in no image (reads as zeroes)".into(),
        kind => match class.depth {
            DEEPEST if links.len() > COLOURS.len() => {
                format!("{} in the images from {DEEPEST} below on", kind.word())
            }
            0 => format!("{} in {name}", kind.word()),
            d => format!("{} in {name} ({d} below)", kind.word()),
        },
    }
}

/// Thin lines between cells, over whole rows and over the last, shorter one.
fn grid_lines(out: &mut String, count: u64, columns: u64, (y, width, height): (u64, u64, u64)) {
    let (full, rest) = (count / columns, count % columns);
    let mut path = String::new();
    for column in 1..columns {
        let rows = full + u64::from(column < rest);
        if rows > 0 {
            let _ = write!(path, "M{},{y} v{} ", LEFT + column * width, rows * height);
        }
    }
    for row in 1..full + u64::from(rest > 0) {
        let cells = if row < full { columns } else { rest };
        let _ = write!(path, "M{LEFT},{} h{} ", y + row * height, cells * width);
    }
    let _ = writeln!(
        out,
        "<path d=\"{}\" stroke=\"#FFFFFF\" stroke-width=\"1\" fill=\"none\"/>",
        path.trim_end()
    );
}

/// A place on an axis.
fn axis(offset: u64) -> String {
    if offset == 0 { "0".into() } else { human(offset) }
}

fn rect(out: &mut String, x: u64, y: u64, w: u64, h: u64, fill: &str) {
    let _ =
        writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" fill=\"{fill}\"/>");
}

fn text(out: &mut String, x: u64, y: u64, size: u64, colour: &str, anchor: &str, words: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" fill=\"{colour}\" text-anchor=\"{anchor}\">{}</text>",
        escape(words)
    );
}

/// A text whose middle is left out if it is too long: names differ at their ends.
fn shorten(text: &str, max: usize) -> String {
    let n = text.chars().count();
    if n <= max {
        return text.to_owned();
    }
    let head: String = text.chars().take(max / 3).collect();
    let tail: String = text.chars().skip(n - (max - max / 3 - 1)).collect();
    format!("{head}…{tail}")
}

/// Text for XML. Control characters, which XML cannot have, were replaced by `shown`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fill_the_whole_and_none_disappears() {
        let shares = [(0, 1), (1, 1 << 40), (2, 5)];
        let out = apportion(&shares, (1 << 40) + 6, 13, 3);
        assert_eq!(out.iter().map(|s| s.1).sum::<u64>(), 13);
        assert!(out.iter().all(|s| s.1 >= 3), "{out:?}");
        // Two large and three small, and more than there is room for.
        let many: Vec<_> = (0..SLOTS).map(|slot| (slot, 1)).collect();
        for shares in [&[(0, 400), (1, 400), (2, 1), (3, 1), (4, 1)][..], &many[..7], &many] {
            let bytes = shares.iter().map(|s| s.1).sum();
            let out = apportion(shares, bytes, 13, 3);
            assert_eq!(out.iter().map(|s| s.1).sum::<u64>(), 13, "{out:?}");
            assert!(shares.len() > 13 || out.iter().all(|s| s.1 >= 1), "{out:?}");
        }
    }

    #[test]
    fn cells_cover_the_range_whatever_its_size() {
        for end in [0, 1, 512, 4096, 1 << 20, (1 << 20) + 1, 10 << 30, 1 << 40, i64::MAX as u64] {
            let mut picture = Picture::new(0, end);
            if end > 0 {
                picture.add(&Extent::data(0, end));
            }
            let sum: u64 = picture.cells.iter().flatten().sum();
            assert_eq!(sum, end);
            assert!(picture.cells.len() as u64 <= COLUMNS * MAX_ROWS, "{end}");
            assert!(picture.render(&[], end).ends_with("</svg>\n"));
        }
    }

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(escape("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
        assert_eq!(shorten("abcdefghij", 6), "ab…hij");
    }
}
