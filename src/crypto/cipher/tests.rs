//! Published vectors, and every mode against the plainest way to compute it.

use aes::cipher::{BlockCipherEncrypt, KeyInit};

use super::*;

fn unhex(s: &str) -> Vec<u8> {
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
}

fn cipher(name: &str, mode: &str, key: &[u8]) -> SectorCipher {
    SectorCipher::new(Spec::parse(name, mode).unwrap(), key).unwrap()
}

#[test]
fn xts_gives_the_vectors_of_ieee_1619() {
    let (e, pi) = (
        "2718281828459045235360287471352662497757247093699959574966967627",
        "3141592653589793238462643383279502884197169399375105820974944592",
    );
    let count: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let zeroes = "00".repeat(16);
    let (ones, twos) = ("11".repeat(16), "22".repeat(16));
    for (key, sector, plain, expect) in [
        (
            zeroes.clone() + &zeroes,
            0,
            vec![0; 32],
            "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e",
        ),
        (
            ones + &twos,
            0x33_3333_3333,
            vec![0x44; 32],
            "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
        ),
        (
            e.to_owned() + pi,
            0xff,
            count,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        ),
    ] {
        let cipher = cipher("aes", "xts-plain64", &unhex(&key));
        let mut data = plain.clone();
        cipher.encrypt(&mut data, sector);
        assert_eq!(data[..32], unhex(expect)[..]);
        cipher.decrypt(&mut data, sector);
        assert_eq!(data, plain);
    }
}

#[test]
fn cbc_is_each_block_mixed_with_the_one_before() {
    let key: Vec<u8> = (1..33).collect();
    let plain: Vec<u8> = (0..5 * SECTOR + 256).map(|i| (i * 7 / 3) as u8).collect();
    let aes = aes::Aes256::new_from_slice(&key).unwrap();
    let mut salt = [0; 32];
    Hash::Sha256.digest(&[&key], &mut salt);
    let essiv = aes::Aes256::new_from_slice(&salt).unwrap();
    for (mode, first) in
        [("cbc-plain", 0xffff_ffffu64), ("cbc-plain64", u64::MAX), ("cbc-essiv:sha256", 77)]
    {
        let mut expect = plain.clone();
        for (i, sector) in expect.chunks_mut(SECTOR).enumerate() {
            let mut number = first.wrapping_add(i as u64);
            if mode == "cbc-plain" {
                number &= 0xffff_ffff;
            }
            let mut last = [0; 16];
            last[..8].copy_from_slice(&number.to_le_bytes());
            if mode == "cbc-essiv:sha256" {
                essiv.encrypt_block((&mut last).into());
            }
            for block in sector.chunks_mut(16) {
                block.iter_mut().zip(&last).for_each(|(b, l)| *b ^= l);
                last.copy_from_slice(block);
                aes.encrypt_block((&mut last).into());
                block.copy_from_slice(&last);
            }
        }
        let cipher = cipher("aes", mode, &key);
        let mut data = plain.clone();
        cipher.encrypt(&mut data, first);
        assert!(data == expect, "{mode}");
        cipher.decrypt(&mut data, first);
        assert!(data == plain, "{mode}");
    }
}

#[test]
fn every_cipher_and_mode_gives_back_what_it_took_sector_by_sector_or_many() {
    let key: Vec<u8> = (0..64).map(|i| i * 3).collect();
    let plain: Vec<u8> = (0..21 * SECTOR).map(|i| (i * 31 / 7) as u8).collect();
    for name in ["aes", "serpent", "twofish", "cast5"] {
        for mode in
            ["xts-plain64", "cbc-plain", "cbc-essiv:sha256", "ctr-plain64", "ecb", "cbc-essiv:md5"]
        {
            let spec = Spec::parse(name, mode).unwrap();
            for len in [16, 24, 32, 48, 64] {
                if spec.check(len).is_err() {
                    continue;
                }
                let cipher = SectorCipher::new(spec, &key[..len]).unwrap();
                let (mut all, mut each) = (plain.clone(), plain.clone());
                cipher.encrypt(&mut all, 1000);
                for (i, sector) in each.chunks_mut(SECTOR).enumerate() {
                    cipher.encrypt(sector, 1000 + i as u64);
                }
                assert!(all == each && all != plain, "{name}-{mode} {len}");
                cipher.decrypt(&mut all[3 * SECTOR..], 1003);
                cipher.decrypt(&mut all[..3 * SECTOR], 1000);
                assert!(all == plain, "{name}-{mode} {len}");
            }
        }
    }
}

#[test]
fn what_is_not_known_or_can_not_be_is_refused_by_name() {
    for (cipher, mode, what) in [
        ("des", "cbc-plain64", "'des'"),
        ("aes", "lrw-benbi", "'aes-lrw-benbi'"),
        ("aes", "xts-plain65", "'aes-xts-plain65'"),
        ("aes", "cbc-essiv:whirlpool", "'aes-cbc-essiv:whirlpool'"),
        ("aes", "cbc", "'aes-cbc'"),
    ] {
        let e = Spec::parse(cipher, mode).unwrap_err();
        assert!(e.contains(what), "{e}");
    }
    let check = |cipher, mode, len| Spec::parse(cipher, mode).unwrap().check(len).is_ok();
    assert!(check("aes", "xts-plain64", 64) && check("aes", "xts-plain64", 48));
    assert!(!check("aes", "xts-plain64", 33) && !check("aes", "xts-plain64", 16));
    assert!(!check("cast5", "xts-plain64", 32) && check("cast5", "cbc-plain64", 16));
    assert!(!check("aes", "cbc-essiv:sha1", 16) && check("aes", "cbc-essiv:sha256", 16));
    assert!(!check("cast5", "cbc-essiv:sha256", 16) && check("cast5", "cbc-essiv:md5", 16));
}

/// `cargo test --release --lib crypto -- --ignored --nocapture speed`
#[test]
#[ignore = "a measurement"]
fn speed() {
    let mut data = vec![0x5a; 1 << 20];
    for (name, mode, len) in [
        ("aes", "xts-plain64", 32),
        ("aes", "xts-plain64", 64),
        ("aes", "cbc-essiv:sha256", 16),
        ("aes", "cbc-plain64", 32),
        ("serpent", "xts-plain64", 64),
    ] {
        let cipher = cipher(name, mode, &vec![7; len]);
        for encrypt in [true, false] {
            let mut best = f64::MAX;
            for _ in 0..40 {
                let start = std::time::Instant::now();
                cipher.batches(&mut data, 5, encrypt);
                best = best.min(start.elapsed().as_secs_f64());
            }
            let rate = data.len() as f64 / best / 1e9;
            println!("{name}-{mode} {} bits, encrypt={encrypt}: {rate:.2} GB/s", len * 8);
        }
    }
}
