use std::path::Path;
use std::process::Command;

use crate::support::*;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn every_option_key_is_in_options_md() {
    let (code, text) = (file("src/image/options.rs"), file("docs/options.md"));
    let table = code.split("const KEYS").nth(1).unwrap().split("];").next().unwrap();
    let keys: Vec<_> = table.split("(\"").skip(1).filter_map(|s| s.split('"').next()).collect();
    assert!(keys.len() >= 26, "{keys:?}");
    for key in keys {
        // In the first column of a table, perhaps with others.
        let column = |line: &str| line.split('|').nth(1).map(str::to_owned).unwrap_or_default();
        assert!(text.lines().any(|line| column(line).contains(&format!("`{key}`"))), "{key}");
    }
}

#[test]
fn every_flag_is_in_the_man_page() {
    let (dir, page) = (Dir::new(), file("docs/qblk.1"));
    for command in &crate::usage::COMMANDS {
        let section = page.split(&format!(".Ss qblk {command}\n")).nth(1).expect(command);
        let section = section.split("\n.Ss qblk ").next().unwrap();
        let general = page.split(".Ss Opening an image").nth(1).unwrap();
        let general = general.split(".Ss qblk info").next().unwrap();
        let shared = page.split(".Ss Flags of all commands").nth(1).unwrap();
        let mut help = dir.qblk(&format!("{command} --help")).good();
        if *command == "bitmap" {
            for action in ["list", "add", "remove", "enable", "disable", "clear", "merge"] {
                help += &dir.qblk(&format!("{command} {action} --help")).good();
            }
        }
        let flags = help.split_whitespace().filter_map(|w| w.strip_prefix("--"));
        let mut seen = 0;
        for flag in flags.map(|f| f.trim_end_matches([',', ')', ']', ';', ':'])) {
            let (name, listed) = (format!("-{flag}"), |s: &str| {
                s.split([' ', '\n']).any(|word| word == format!("-{flag}"))
            });
            assert!(listed(section) || listed(general) || listed(shared), "{command} -{name}");
            seen += 1;
        }
        assert!(seen > 1, "{help}");
    }
}

#[test]
fn the_man_page_is_clean() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/qblk.1");
    let mut mandoc = Command::new("mandoc");
    mandoc.args(["-Tlint", "-Wwarning"]).arg(&page);
    match mandoc.output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && text.is_empty(), "{text}");
        }
        Err(e) => panic!("mandoc: {e}; this test needs it: apt-get install mandoc"),
    }
}
