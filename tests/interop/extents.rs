//! Extents beside `qemu-img map`.

use std::fs;
use std::path::Path;

use super::common::*;
use qblk::Extent;

/// What is known of a range; neighbours that are alike become one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Told {
    start: u64,
    length: u64,
    depth: u64,
    zero: bool,
    compressed: bool,
    host: Option<u64>,
}

fn merge(all: impl IntoIterator<Item = Told>) -> Vec<Told> {
    let mut out: Vec<Told> = Vec::new();
    for mut t in all {
        if t.zero {
            // Which image says that a range is zero is told differently where none has it at all;
            // where space is kept for zeroes, too.
            (t.depth, t.host) = (0, None);
        }
        if t.compressed {
            t.host = None;
        }
        if let Some(last) = out.last_mut()
            && (last.depth, last.zero, last.compressed) == (t.depth, t.zero, t.compressed)
            && last.host.map(|h| h + last.length) == t.host
        {
            last.length += t.length;
            continue;
        }
        out.push(t);
    }
    out
}

fn by_qemu(path: &Path) -> Vec<Told> {
    let text = qemu_img!("map", "-f", "qcow2", "--output=json", path);
    let field = |line: &str, name: &str| -> Option<String> {
        let rest = line.split(&format!("\"{name}\": ")).nth(1)?;
        Some(rest.split([',', '}']).next().unwrap().trim().to_owned())
    };
    let lines: Vec<&str> = text.lines().filter(|l| l.contains("\"start\"")).collect();
    assert!(!lines.is_empty(), "{text}");
    merge(lines.into_iter().map(|l| Told {
        start: field(l, "start").unwrap().parse().unwrap(),
        length: field(l, "length").unwrap().parse().unwrap(),
        depth: field(l, "depth").unwrap().parse().unwrap(),
        zero: field(l, "zero").unwrap() == "true",
        compressed: field(l, "compressed").unwrap() == "true",
        host: field(l, "offset").map(|o| o.parse().unwrap()),
    }))
}

fn by_us(path: &Path, bite: usize) -> Vec<Told> {
    let image = open(path, RO);
    let size = image.size().unwrap();
    let all = all_extents(&image, 0, size, bite);
    for e in &all {
        assert_eq!(e.has(Extent::DATA), !e.has(Extent::ZERO), "{e:?}");
    }
    merge(all.iter().map(|e| Told {
        start: e.offset,
        length: e.length,
        depth: u64::from(e.depth),
        zero: e.has(Extent::ZERO),
        compressed: e.has(Extent::COMPRESSED),
        host: e.has(Extent::HOST).then_some(e.host_offset),
    }))
}

#[test]
fn extents_are_those_that_qemu_tells() {
    let mut rng = Rng::new(8);
    for round in 0..24 {
        // On a disk: the holes of raw files are compared, too.
        let dir = Tmp::new("extents");
        let size = 8 << 20;
        let (raw, mid, top) = (dir.join("raw"), dir.join("mid"), dir.join("top"));
        let file = fs::File::create(&raw).unwrap();
        file.set_len(size - 5000 * (round % 3)).unwrap();
        drop(file);
        for _ in 0..5 {
            let data = rng.bytes(1 + rng.clone().below(100_000) as usize);
            poke(&raw, rng.below(size - 200_000), &data);
        }
        let cluster = rng.pick(&["4k", "64k", "512k"]);
        let compat = rng.pick(&["0.10", "1.1"]);
        let mid_size = size - if round % 2 == 0 { 1 << 20 } else { 0 };
        let extended = if cluster == "4k" { "off" } else { rng.pick(&["off", "on"]) };
        let pairs = [
            ("backing-file", "raw"),
            ("backing-fmt", "raw"),
            ("cluster-size", cluster),
            ("extended-l2", extended),
        ];
        create(&mid, "qcow2", mid_size, &pairs);
        let cluster = rng.pick(&["512", "64k", "2M"]);
        let can = cluster != "512" && compat == "1.1";
        let extended = if can { rng.pick(&["off", "on"]) } else { "off" };
        let pairs = [
            ("backing-file", "mid"),
            ("backing-fmt", "qcow2"),
            ("cluster-size", cluster),
            ("compat", compat),
            ("extended-l2", extended),
        ];
        create(&top, "qcow2", size, &pairs);
        for (path, size) in [(&mid, mid_size), (&top, size)] {
            let mut commands = Vec::new();
            for _ in 0..12 {
                let at = rng.below(size / 512) * 512;
                let n = (rng.range(1, 400) * 512).min(size - at);
                commands.push(match rng.below(5) {
                    0 => format!("write -z {at} {n}"),
                    1 => format!("write -zu {at} {n}"),
                    2 => format!("discard {at} {n}"),
                    _ => format!("write -P 7 {at} {n}"),
                });
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu_io(path, "qcow2", &commands);
            // A last cluster, compressed.
            let at = size / (2 << 20) * (2 << 20) - (2 << 20);
            let n = if path == &top && cluster != "2M" { 65536 } else { 2 << 20 };
            let compressed = format!("write -c -P 9 {at} {n}");
            let _ = run("qemu-io", &[&"-f", &"qcow2", &"-c", &compressed, &path]);
        }
        let expected = by_qemu(&top);
        for bite in [1, 3, 1000] {
            assert_eq!(by_us(&top, bite), expected, "round {round}, {cluster} {compat} {extended}");
        }
    }
}
