//! Sector ciphers, hashes and keys: what encrypted images are made of.
//!
//! The ciphers and hashes themselves are the RustCrypto project's; here they are put together the
//! way disks use them: each sector by itself, with an initial vector made from its number
//! ([`SectorCipher`]). Nothing here knows an image format.
//!
//! Keys, passphrases and whatever leads to them are wiped when they are dropped. The ciphers wipe
//! their key schedules themselves; [`wipe_stack`] clears what computing with keys left on the stack.

mod cipher;
mod hash;

pub use cipher::{Alg, Ivgen, Mode, SECTOR, SectorCipher, Spec};
pub use hash::Hash;
pub use zeroize::{Zeroize, Zeroizing};

/// Bytes that nobody else may see: wiped when dropped.
pub type Secret = Zeroizing<Vec<u8>>;

/// A secret of `len` zeroes, to be filled in place: growing one would leave a copy behind.
pub fn blank(len: usize) -> Secret {
    Zeroizing::new(vec![0; len])
}

/// Fill `out` from the system's random source; the error is the system's number.
pub fn random(out: &mut [u8]) -> Result<(), i32> {
    getrandom::fill(out).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
}

/// Whether two secrets are the same, found out in a time that does not depend on where they differ.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    subtle::ConstantTimeEq::ct_eq(a, b).into()
}

/// Overwrite the stack that calls made from here have used: key schedules are computed there before
/// they are moved to where they stay.
#[inline(never)]
pub fn wipe_stack() {
    let mut stack = [0xffu8; 32 << 10];
    stack.zeroize();
}
