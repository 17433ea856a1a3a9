//! What all `--json` outputs have in common.

use std::io::Write;

use serde_json::{Map, Value, json};

use crate::failure::Result;

/// Put a name under `key`. JSON is text and a name need not be: where it is not, `key` holds it with
/// replacement characters and `key_bytes` its bytes.
pub fn put_name(object: &mut Map<String, Value>, key: &str, name: &[u8]) {
    match std::str::from_utf8(name) {
        Ok(text) => drop(object.insert(key.into(), text.into())),
        Err(_) => {
            object.insert(key.into(), String::from_utf8_lossy(name).into());
            object.insert(format!("{key}_bytes"), json!(name));
        }
    }
}

/// Print a value, indented.
pub fn print(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value:#}")?;
    Ok(out.flush()?)
}
