//! `qblk layers`, and layers in the names that commands are given.

use crate::support::*;

#[test]
fn layers_are_listed_with_their_settings() {
    let dir = Dir::new();
    let list = dir.qblk("layers").good();
    for name in ["delay", "error", "fua", "log", "nozero", "offset", "protect", "rate", "stats"] {
        assert!(list.lines().any(|l| l.starts_with(&format!("{name} "))), "{name}: {list}");
    }
    let mut sorted: Vec<_> = list.lines().collect();
    sorted.sort_unstable();
    assert!(list.lines().eq(sorted), "in order: {list}");
    let one = dir.qblk("layers offset").good();
    let settings: Vec<_> = one.lines().skip(1).map(|l| l.split_whitespace().next()).collect();
    assert_eq!(settings, [Some("offset"), Some("range")], "{one}");
    let one = dir.qblk("layers --json fua").json();
    assert!(one["settings"]["mode"].as_str().unwrap().contains("emulate"), "{one}");
    let all = dir.qblk("layers --json").json();
    assert_eq!(all.as_array().unwrap().len(), list.lines().count());
    dir.qblk("layers nothing").bad(2, &["'nothing'", "offset"]);
}

/// What is meant is guessed at, and no words of the C library are for people.
#[test]
fn what_is_misspelt_or_out_of_place_is_said() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 4M").good();
    dir.qblk("info layer:cow:a.qcow2").bad(1, &["'layer:cow:a.qcow2'", "no scheme 'layer'"]);
    dir.qblk("info file:layer:cow:a.qcow2").bad(1, &["'layer:cow:a.qcow2': open: No such file"]);
    dir.qblk("info -o offset.offset=1M a.qcow2").bad(2, &["no layer 'offset' in the option"]);
    dir.qblk("info -o ofset.offset=1M a.qcow2").bad(2, &["unknown option 'ofset.offset'"]);
    dir.qblk("write layers:readonly:a.qcow2 0 --pattern 1 --length 1")
        .bad(1, &["'a.qcow2'", "a layer on it refuses changes", "Read-only"]);
    dir.qblk("check layers:readonly:a.qcow2").bad(2, &["leave its layers out"]);
}

/// A layer that keeps changes is an image of its own: what is below it lies deeper, and is named so.
#[test]
fn a_map_names_what_lies_below_an_overlay() {
    let dir = Dir::new();
    dir.qblk("create base.qcow2 4M").good();
    dir.qblk("write -q --pattern 1 --length 64k base.qcow2 0").good();
    dir.qblk("create -b base.qcow2 top.qcow2").good();
    dir.qblk("write -q --pattern 1 --length 64k top.qcow2 1M").good();
    let name = "layers:cow:top.qcow2";
    let lines = |text: String| -> Vec<String> {
        let data = text.lines().filter(|l| l.starts_with("data in"));
        data.map(|l| l.split(':').rev().skip(1).collect::<Vec<_>>().join(":")).collect()
    };
    let map = lines(dir.qblk(&format!("map {name}")).good());
    assert_eq!(map, ["data in top.qcow2", "data in base.qcow2"]);
    let map = lines(dir.qblk("map -o layers=cow,readahead,cow top.qcow2").good());
    assert_eq!(map, ["data in top.qcow2", "data in base.qcow2"]);
    let images = &dir.qblk(&format!("map --json {name}")).json()["images"];
    let names: Vec<_> = images.as_array().unwrap().iter().map(|i| &i["filename"]).collect();
    assert_eq!(names, [name, "top.qcow2", "base.qcow2"]);
    let svg = dir.qblk(&format!("map --svg - {name}")).good();
    assert!(svg.contains("data in top.qcow2 (1 below)"), "{svg}");
    // A layer that keeps nothing is none.
    let map = lines(dir.qblk("map -o layers=readahead top.qcow2").good());
    assert_eq!(map, ["data in top.qcow2", "data in base.qcow2"]);
}

/// Each has its page, and the page each of its settings.
#[test]
fn every_layer_has_its_page() {
    let dir = Dir::new();
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/layers");
    let text = |name: &str| {
        let path = docs.join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let table = text("README.md");
    for layer in dir.qblk("layers --json").json().as_array().unwrap() {
        let name = layer["name"].as_str().unwrap();
        assert!(table.contains(&format!("| [{name}]({name}.md) | ")), "{name}");
        let page = text(&format!("{name}.md"));
        for key in layer["settings"].as_object().unwrap().keys() {
            let row =
                |l: &str| l.split('|').nth(1).is_some_and(|c| c.contains(&format!("`{key}`")));
            assert!(page.lines().any(row), "{name}: {key}");
        }
    }
}

#[test]
fn commands_take_names_with_layers() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 4M").good();
    dir.qblk("write --pattern 0x61 --length 4k a.qcow2 1M").good();
    // Where it matters which part is meant.
    let part = "layers:offset;offset=1M;range=1M:a.qcow2";
    let info = dir.qblk(&format!("info --json {part}")).json();
    assert_eq!((&info["size"], &info["format"]), (&(1 << 20).into(), &"qcow2".into()), "{info}");
    assert_eq!(info["properties"]["layers"], "offset", "{info}");
    let info = dir.qblk("info --json -o layers=offset -o offset.offset=3M a.qcow2").json();
    assert_eq!(info["size"], 1 << 20, "{info}");
    assert_eq!(dir.qblk(&format!("read --raw {part} 0 3")).good(), "aaa");
    let map = dir.qblk(&format!("map --json {part}")).json();
    assert_eq!(map["extents"][0]["length"], 65536, "{map}");
    dir.qblk(&format!("write --pattern 0x62 --length 1 {part} 1")).good();
    assert_eq!(dir.qblk("read --raw a.qcow2 1M 3").good(), "aba");
    dir.qblk(&format!("copy -O raw {part} part.img")).good();
    assert_eq!(dir.read("part.img")[..4], *b"abaa");
    assert_eq!(dir.read("part.img").len(), 1 << 20);
    dir.qblk(&format!("bench -c 10 {part}")).good();
    // An image to copy to must be there; then its layers are written through.
    let to = "layers:offset;offset=2M,log;file=calls:a.qcow2";
    dir.qblk(&format!("copy part.img {to}")).bad(2, &["--no-create"]);
    dir.qblk(&format!("copy --no-create -f raw part.img {to}")).good();
    assert_eq!(dir.qblk("read --raw a.qcow2 2M 3").good(), "aba");
    let calls = String::from_utf8(dir.read("calls")).unwrap();
    assert!(calls.contains(" write offset=0 "), "{calls}");
    dir.qblk(&format!("copy {part} a.qcow2 --force")).bad(1, &["same"]);
    // What is for images is refused.
    dir.qblk(&format!("resize {part} 8M")).bad(1, &["not support"]);
    dir.qblk("create layers:offset:b.qcow2 1M").bad(1, &["make that"]);
    assert!(!dir.exists("b.qcow2") && !dir.exists("layers:offset:b.qcow2"));
    dir.qblk("info layers:nothing:a.qcow2").bad(2, &["no layer 'nothing'"]);
    dir.qemu_img("check -q a.qcow2");
}
