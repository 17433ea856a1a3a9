use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::*;

/// base.raw (4 MiB, data in its second), mid.qcow2 (compressed by qemu-img), top.qcow2 on both.
fn chain() -> Dir {
    let dir = Dir::new();
    dir.sparse("base.raw", 4 << 20, &[(1 << 20, &noise(1, 1 << 20))]);
    dir.qblk("create -b base.raw -F raw top.qcow2 8M").good();
    dir.qblk("write -q top.qcow2 1M --pattern 1 --length 64k").good();
    dir.qblk("write -q top.qcow2 1600k --zero --length 64k").good();
    dir
}

fn totals(json: &Value) -> BTreeMap<String, u64> {
    let object = json["totals"].as_object().unwrap();
    object.iter().map(|(k, v)| (k.clone(), v.as_u64().unwrap())).collect()
}

#[test]
fn map_covers_the_image_without_gaps() {
    let dir = chain();
    let json = dir.qblk("map --json top.qcow2").json();
    assert_eq!(json["size"], 8 << 20);
    assert_eq!(json["images"][1]["filename"], "base.raw");
    let mut at = 0;
    let mut sums = BTreeMap::new();
    for e in json["extents"].as_array().unwrap() {
        assert_eq!(e["offset"], at);
        let length = e["length"].as_u64().unwrap();
        *sums.entry(e["kind"].as_str().unwrap().to_owned()).or_insert(0) += length;
        at += length;
        let stored = e["kind"] == "data";
        assert_eq!((stored, stored), (e["data"] == true, e["zero"] == false), "{e}");
    }
    assert_eq!(at, 8 << 20);
    let expected = [("data", (1 << 20) - (64 << 10)), ("zero", 64 << 10), ("unallocated", 7 << 20)];
    assert_eq!(sums, expected.map(|(k, v)| (k.to_owned(), v)).into());
    sums.insert("compressed".into(), 0);
    assert_eq!(totals(&json), sums);
    assert_eq!(json["next_offset"], Value::Null);
}

#[test]
fn map_agrees_with_qemu_img() {
    let dir = chain();
    let theirs = dir.qemu_img("map --output=json top.qcow2");
    let theirs: Value = serde_json::from_str(&theirs).unwrap();
    // Where data is, in which image, and where in its file, megabyte by megabyte and cluster by cluster.
    let flatten = |extents: &Value, offset: &str| -> BTreeMap<u64, (u64, u64)> {
        let mut all = BTreeMap::new();
        for e in extents.as_array().unwrap().iter().filter(|e| e["data"] == true) {
            let [start, length, host] = ["start", "length", offset]
                .map(|k| e.get(k).unwrap_or(&e["offset"]).as_u64().unwrap());
            for i in (0..length).step_by(65536) {
                all.insert(start + i, (e["depth"].as_u64().unwrap(), host + i));
            }
        }
        all
    };
    let ours = dir.qblk("map --json top.qcow2").json();
    let ours = flatten(&ours["extents"], "host_offset");
    assert_eq!(ours, flatten(&theirs, "offset"));
    assert_eq!(ours.len(), 15);
}

#[test]
fn map_prints_a_table_and_can_stop() {
    let dir = chain();
    let text = dir.qblk("map top.qcow2").good();
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["offset", "length", "what", "there", "at", "in"]);
    assert_eq!(rows[1], ["0", "1048576", "1", "MiB", "unallocated", "-", "-"]);
    assert_eq!(rows[2][..5], ["1048576", "65536", "64", "KiB", "data"]);
    assert_eq!(rows[2][6], "top.qcow2");
    assert_eq!(rows[3][4..], ["data", "1114112", "base.raw"]);
    assert_eq!(rows[4][4..], ["zero", "-", "top.qcow2"]);
    assert!(text.contains("data in base.raw: 896 KiB (917504 bytes)"), "{text}");

    let json = dir.qblk("map --json --max-extents 2 top.qcow2").json();
    assert_eq!(json["extents"].as_array().unwrap().len(), 2);
    assert_eq!(json["next_offset"], (1 << 20) + 65536);
    let json = dir.qblk("map --json --offset 1052672 --length 8k top.qcow2").json();
    let extent = &json["extents"][0];
    assert_eq!((&extent["offset"], &extent["length"]), (&1_052_672.into(), &8192.into()));
    dir.qblk("map --offset 8M --length 1 top.qcow2").bad(1, &["'top.qcow2'", "8388608"]);
    let empty = dir.qblk("map --json --offset 8M top.qcow2").json();
    assert_eq!(empty["extents"].as_array().unwrap().len(), 0);
}

/// The totals that a picture's legend holds, by kind and depth.
fn legend(svg: &str) -> BTreeMap<(String, u32), u64> {
    let xml = roxmltree::Document::parse(svg).unwrap_or_else(|e| panic!("{e}\n{svg}"));
    let entries = xml.descendants().filter(|n| n.has_attribute("data-bytes"));
    entries
        .map(|n| {
            let get = |key| n.attribute(key).unwrap();
            let key = (get("data-kind").to_owned(), get("data-depth").parse().unwrap());
            (key, get("data-bytes").parse().unwrap())
        })
        .collect()
}

#[test]
fn the_picture_is_well_formed_and_its_totals_are_right() {
    let dir = chain();
    dir.qblk("map top.qcow2 --svg map.svg").good();
    let svg = String::from_utf8(dir.read("map.svg")).unwrap();
    let expected = [
        (("data".to_owned(), 0), 64 << 10),
        (("data".to_owned(), 1), (1 << 20) - (128 << 10)),
        (("zero".to_owned(), 0), 64 << 10),
        (("unallocated".to_owned(), 0), 7 << 20),
    ];
    assert_eq!(legend(&svg), expected.into());
    assert_eq!(dir.qblk("map top.qcow2 --svg -").good(), svg);
    // The cells of the grid fill it: 8 MiB in cells of 4 KiB are 32 rows of 64.
    let xml = roxmltree::Document::parse(&svg).unwrap();
    let number = |n: roxmltree::Node, key| n.attribute(key).unwrap().parse::<u64>().unwrap();
    let area: u64 = xml
        .descendants()
        .filter(|n| n.has_tag_name(("http://www.w3.org/2000/svg", "rect")))
        .filter(|n| {
            n.parent_element()
                .unwrap()
                .first_element_child()
                .unwrap()
                .has_tag_name(("http://www.w3.org/2000/svg", "title"))
        })
        .filter(|n| n.parent_element().unwrap().tag_name().name() == "g")
        .map(|n| number(n, "width") * number(n, "height"))
        .sum();
    assert_eq!(area, 832 * 416);
    let text: String = xml.descendants().filter_map(|n| n.text()).collect();
    for word in ["top.qcow2", "data in base.raw (1 below)", "8 MiB", "reads as zeroes"] {
        assert!(text.contains(word), "{word:?} is not in the picture");
    }
}

#[test]
fn pictures_of_compressed_huge_small_and_empty_images() {
    let dir = Dir::new();
    dir.write("src.raw", &noise(5, 2 << 20).repeat(2));
    dir.qemu_img("convert -c -f raw -O qcow2 src.raw c.qcow2");
    dir.qemu_img("create -q -f qcow2 huge.qcow2 64T");
    dir.qblk("write -q huge.qcow2 63T --pattern 1 --length 1").good();
    dir.write("one.raw", b"x");
    dir.write("empty.raw", b"");
    for (name, expected) in [
        ("huge.qcow2", vec![(("data", 0), 65536), (("unallocated", 0), (64 << 40) - 65536)]),
        ("one.raw", vec![(("data", 0), 1)]),
        ("empty.raw", vec![]),
    ] {
        let svg = dir.qblk(&format!("map --svg - {name}")).good();
        let expected = expected.into_iter().map(|((k, d), b)| ((k.to_owned(), d), b)).collect();
        assert_eq!(legend(&svg), expected, "{name}");
    }
    let svg = dir.qblk("map --svg - c.qcow2").good();
    let found = legend(&svg);
    assert_eq!(found.values().sum::<u64>(), 4 << 20);
    let json = dir.qblk("map --json c.qcow2").json();
    assert_eq!(
        found.get(&("compressed".into(), 0)).copied().unwrap_or(0),
        totals(&json)["compressed"]
    );
    assert!(totals(&json)["compressed"] > 0, "noise of odd bytes only compresses a little");
    assert!(svg.contains("url(#compressed0)"));
}

#[test]
fn a_picture_of_a_deep_chain_puts_the_deepest_together() {
    let dir = Dir::new();
    dir.sparse("0.img", 1 << 20, &[(0, &[1; 4096])]);
    for i in 1..10u64 {
        let format = if i == 1 { "raw" } else { "qcow2" };
        dir.qblk(&format!("create -b {}.img -F {format} {i}.img", i - 1)).good();
        dir.qblk(&format!("write -q {i}.img {} --pattern 1 --length 64k", i << 16)).good();
    }
    let found = legend(&dir.qblk("map --svg - 9.img").good());
    assert_eq!(found[&("data".into(), 0)], 65536);
    // Those at depths 6, 7 and 8 have a cluster each, and the raw one at depth 9 a block.
    assert_eq!(found[&("data".into(), 6)], 3 * 65536 + 4096);
    assert_eq!(found.len(), 8);
    assert_eq!(found.values().sum::<u64>(), 1 << 20);
    let json = dir.qblk("map --json 9.img").json();
    assert_eq!(json["extents"][0]["depth"], 9);
}

#[test]
fn a_picture_of_a_strange_name_is_still_xml_and_harms_no_image() {
    let dir = Dir::new();
    let name = "a<b>&\"c\"\u{7}\u{202e}.qcow2";
    dir.run(["create", name, "1M"]).good();
    let svg = dir.run(["map", "--svg", "-", name]).good();
    let xml = roxmltree::Document::parse(&svg).unwrap();
    let text: String = xml.descendants().filter_map(|n| n.text()).collect();
    assert!(text.contains("a<b>&\"c\"\u{fffd}\u{fffd}.qcow2"), "{text}");
    dir.qblk("create base.qcow2 1M").good();
    dir.qblk("create -b base.qcow2 top.qcow2").good();
    for target in ["top.qcow2", "base.qcow2"] {
        let before = dir.read(target);
        dir.qblk(&format!("map top.qcow2 --svg {target}")).bad(1, &[target, "not overwritten"]);
        assert!(dir.read(target) == before);
    }
    dir.qblk("map top.qcow2 --svg no/where.svg").bad(1, &["'no/where.svg'", "No such file"]);
}
