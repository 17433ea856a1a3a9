//! Hashes by name, and the keys that are made with them from passphrases.

use hmac::EagerHash;
use sha2::Digest;

/// A hash that LUKS headers name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Hash {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

/// Do the same with the type of a hash, whichever it is.
macro_rules! with_type {
    ($hash:expr, $do:ident($($arg:expr),*)) => {
        match $hash {
            Hash::Md5 => $do::<md5::Md5>($($arg),*),
            Hash::Sha1 => $do::<sha1::Sha1>($($arg),*),
            Hash::Sha224 => $do::<sha2::Sha224>($($arg),*),
            Hash::Sha256 => $do::<sha2::Sha256>($($arg),*),
            Hash::Sha384 => $do::<sha2::Sha384>($($arg),*),
            Hash::Sha512 => $do::<sha2::Sha512>($($arg),*),
            Hash::Ripemd160 => $do::<ripemd::Ripemd160>($($arg),*),
        }
    };
}

impl Hash {
    /// All names, as QEMU and cryptsetup write them.
    pub const NAMES: [&'static str; 7] =
        ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"];
    const ALL: [Self; 7] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
    ];

    /// The hash of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().position(|n| n.eq_ignore_ascii_case(name)).map(|i| Self::ALL[i])
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// Bytes of a digest.
    pub fn size(self) -> usize {
        fn size<D: Digest>() -> usize {
            <D as Digest>::output_size()
        }
        with_type!(self, size())
    }

    /// Put the digest of `parts`, one after the other, into the first bytes of `out`; at most as many
    /// as it has.
    pub fn digest(self, parts: &[&[u8]], out: &mut [u8]) {
        fn digest<D: Digest>(parts: &[&[u8]], out: &mut [u8]) {
            let mut d = D::new();
            for part in parts {
                d.update(part);
            }
            let mut done = d.finalize();
            let n = out.len().min(done.len());
            out[..n].copy_from_slice(&done[..n]);
            zeroize::Zeroize::zeroize(&mut done[..]);
        }
        with_type!(self, digest(parts, out));
    }

    /// PBKDF2 with HMAC of this hash (RFC 8018): fill `out` from a passphrase.
    pub fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        fn derive<D: EagerHash>(passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
            pbkdf2::pbkdf2_hmac::<D>(passphrase, salt, iterations, out);
        }
        with_type!(self, derive(passphrase, salt, iterations, out));
    }

    /// How many iterations of [`Hash::pbkdf2`] for a key of `len` bytes take `ms` milliseconds of this
    /// host's time, about.
    pub fn iterations_in(self, ms: u64, len: usize) -> u64 {
        let mut out = super::blank(len);
        let mut iterations = 1u32 << 12;
        loop {
            let before = cpu_time();
            self.pbkdf2(b"passphrase", &[0x5a; 32], iterations, &mut out);
            // The thread's own time: on a busy host a clock on the wall makes keys that are weak.
            let ns = cpu_time().saturating_sub(before).max(1);
            if ns >= 50_000_000 || iterations >= 1 << 30 {
                let all = u128::from(iterations) * u128::from(ms) * 1_000_000 / u128::from(ns);
                return u64::try_from(all).unwrap_or(u64::MAX);
            }
            iterations *= 2;
        }
    }
}

/// Nanoseconds that this thread has computed.
fn cpu_time() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a timespec that the call fills.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn pbkdf2_gives_the_published_vectors() {
        // RFC 6070 for SHA-1; RFC 7914 section 11 for SHA-256.
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
        assert_eq!(hex(&out), "4b007901b765489abead49d926f721d065a429c1");
        let mut out = [0; 25];
        let (pass, salt) = (b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt");
        Hash::Sha1.pbkdf2(pass, salt, 4096, &mut out);
        assert_eq!(hex(&out), "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038");
        let mut out = [0; 64];
        Hash::Sha256.pbkdf2(b"passwd", b"salt", 1, &mut out);
        assert_eq!(
            hex(&out),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }

    #[test]
    fn digests_are_those_of_abc() {
        let mut out = [0; 64];
        for (hash, expect) in [
            (Hash::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
            (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ] {
            hash.digest(&[b"a", b"", b"bc"], &mut out);
            assert_eq!(hex(&out[..hash.size()]), expect);
            assert_eq!(Hash::by_name(hash.name()), Some(hash));
        }
        assert_eq!((Hash::Sha512.size(), Hash::Sha384.size(), Hash::Sha224.size()), (64, 48, 28));
    }
}
