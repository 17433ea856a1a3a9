//! Changing what an image is like: the options, and opening it anew where it is of another kind then.

use super::whole::Taken;
use super::{Image, Options, Tree, Use, key, life};
use crate::block::*;
use crate::crypto::Secret;

/// What is amended in qcow2, and in nothing else.
const QCOW2_ONLY: &[&str] = &[
    "backing-file",
    "backing-fmt",
    "compat",
    "data-file-raw",
    "encrypt.iter-time",
    "encrypt.keyslot",
    "encrypt.new-secret",
    "encrypt.new-secret-file",
    "encrypt.old-secret",
    "encrypt.old-secret-file",
    "encrypt.state",
    "lazy-refcounts",
    "refcount-bits",
];
/// What is amended in LUKS, and in nothing else.
const LUKS_ONLY: &[&str] = &[
    "iter-time",
    "keyslot",
    "new-secret",
    "new-secret-file",
    "old-secret",
    "old-secret-file",
    "state",
];

impl Image {
    /// Change what the image is like, as `options` say: all of it or nothing. Calls of other threads wait
    /// meanwhile.
    pub fn amend(&self, options: &Options, progress: Progress<'_>) -> Result<()> {
        options.check(Use::Amend)?;
        let mut old: Option<Box<Tree>> = None;
        self.with_tree(true, |tree| {
            let to = read(options, tree)?;
            let mut taken = Taken::new(&self.shared);
            if !tree.top.driver().amend(&to, progress)? {
                return Ok(());
            }
            // One that refuses writes holds nothing that it could still give.
            match life::close_tree(tree) {
                Ok(()) | Err(Error::Failed { .. }) => {}
                Err(e) => return Err(e),
            }
            let new =
                super::chain::reopen(tree, &tree.options, tree.flags, &self.shared.calls.shared());
            let new = new.map_err(|e| unopened(e, &tree.name))?;
            // It is dropped when the reference to it that this function was given is over.
            old = Some(taken.put(Box::new(new)));
            Ok(())
        })
    }
}

/// It was changed, and then could not be opened.
fn unopened(e: Error, name: &Name) -> Error {
    crate::log::log(
        crate::log::Level::Warn,
        format_args!(
            "{name}: was amended, but can not be opened as it is now; it is to be reopened"
        ),
    );
    e
}

/// What the options say for the image that `tree` is.
fn read(options: &Options, tree: &Tree) -> Result<Amend> {
    let prefix = match tree.top.driver().kind() {
        "qcow2" => {
            options.refuse("format qcow2, whose options begin with 'encrypt.'", &[LUKS_ONLY])?;
            "encrypt."
        }
        "luks" => {
            options.refuse("format luks", &[QCOW2_ONLY])?;
            ""
        }
        _ => return Err(Error::NotSupported("amending")),
    };
    let keys = keys(options, prefix, tree)?;
    if keys.is_none() {
        options.refuse("no option 'state' of a key slot", &[&["key", "key-file"]])?;
    }
    let text = |key: &str| options.get(key).map(<[u8]>::to_vec);
    let backing_format = text("backing-fmt");
    if let Some(format) = backing_format.as_ref().filter(|f| !f.is_empty()) {
        let known = std::str::from_utf8(format).ok().and_then(crate::format::by_name);
        known.ok_or_else(|| {
            let expected = crate::format::EXPECTED;
            Error::invalid(format!("option 'backing-fmt': found {}, {expected}", quoted(format)))
        })?;
    }
    let widths = ["1", "2", "4", "8", "16", "32", "64"];
    Ok(Amend {
        v3: options.one_of("compat", &["0.10", "v2", "1.1", "v3"])?.map(|i| i >= 2),
        refcount_order: options.one_of("refcount-bits", &widths)?.map(|i| i as u32),
        lazy: options.switch("lazy-refcounts")?,
        backing: text("backing-file"),
        backing_format,
        data_file_raw: options.switch("data-file-raw")?,
        keys,
    })
}

fn keys(options: &Options, prefix: &str, tree: &Tree) -> Result<Option<AmendKeys>> {
    let key = |name: &str| format!("{prefix}{name}");
    let secret = |name: &str| -> Result<Option<Secret>> {
        key::read_from(options, &key(name), &key(&format!("{name}-file")))
    };
    let Some(state) = options.one_of(&key("state"), &["active", "inactive"])? else {
        let others = [
            "iter-time",
            "keyslot",
            "new-secret",
            "new-secret-file",
            "old-secret",
            "old-secret-file",
        ]
        .map(&key);
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        options.refuse(&format!("no option '{}'", key("state")), &[&others])?;
        return Ok(None);
    };
    let unlock = match key::read(options)? {
        Some(key) => Some(key),
        None => key::read(&tree.options)?,
    };
    Ok(Some(AmendKeys {
        activate: state == 0,
        slot: options.number(&key("keyslot"), 0..=7)?,
        new: secret("new-secret")?,
        old: secret("old-secret")?,
        unlock,
        ms: options.number(&key("iter-time"), 1..=60_000)?.unwrap_or(2000).into(),
    }))
}
