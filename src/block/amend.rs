//! What an image that there is already may be told to be from now on.

use zeroize::Zeroizing;

/// Changes of what an image is like; `None` leaves a thing as it is.
#[derive(Default)]
pub struct Amend {
    /// qcow2: version 3, else 2.
    pub v3: Option<bool>,
    /// qcow2: width of refcounts, 2^order bits.
    pub refcount_order: Option<u32>,
    /// qcow2: refcounts may be updated late.
    pub lazy: Option<bool>,
    /// The name of the backing file to record; empty for none.
    pub backing: Option<Vec<u8>>,
    /// The format of the backing file to record; empty for none.
    pub backing_format: Option<Vec<u8>>,
    /// qcow2: the data file is a raw image by itself.
    pub data_file_raw: Option<bool>,
    /// Key slots of an encrypted image.
    pub keys: Option<AmendKeys>,
}

/// A change of the key slots of an encrypted image.
#[derive(Default)]
pub struct AmendKeys {
    /// A passphrase is added, else one is taken away.
    pub activate: bool,
    /// The slot; `None`: a free one, or those that `old` opens.
    pub slot: Option<u32>,
    /// The passphrase to be added.
    pub new: Option<Zeroizing<Vec<u8>>>,
    /// The passphrase to be taken away; for adding one, one that opens the image.
    pub old: Option<Zeroizing<Vec<u8>>>,
    /// A passphrase that opens the image, where `old` does not say.
    pub unlock: Option<Zeroizing<Vec<u8>>>,
    /// How long trying the new passphrase is to take, milliseconds.
    pub ms: u64,
}

impl Amend {
    /// Whether nothing but key slots is to change.
    pub fn is_keys_only(&self) -> bool {
        let rest = self.v3.is_some() || self.lazy.is_some() || self.data_file_raw.is_some();
        let names = self.backing.is_some() || self.backing_format.is_some();
        !rest && !names && self.refcount_order.is_none()
    }
}
