//! LUKS as a format of its own.

use std::fs;
use std::process::Stdio;

use qblk::block::ErrorKind;

use super::*;

/// Everything that qemu-img can make, little of each. (Of aes-192-cbc it only says so: QEMU 10.0
/// aborts, since the split key is no whole number of sectors. cryptsetup does not mind.)
const CIPHERS: [(&str, &str); 16] = [
    ("aes-256", "xts,ivgen-alg=plain64"),
    ("aes-192", "xts,ivgen-alg=plain64"),
    ("aes-128", "xts,ivgen-alg=plain"),
    ("aes-256", "cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256"),
    ("aes-128", "cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1"),
    ("aes-128", "cbc,ivgen-alg=plain64,hash-alg=sha512"),
    ("aes-256", "cbc,ivgen-alg=plain,hash-alg=ripemd160"),
    ("aes-256", "xts,ivgen-alg=plain64,hash-alg=sha1"),
    ("aes-256", "xts,ivgen-alg=plain64,hash-alg=sha512"),
    ("aes-256", "xts,ivgen-alg=plain64,hash-alg=md5"),
    ("aes-256", "xts,ivgen-alg=plain64,hash-alg=sha224"),
    ("aes-256", "xts,ivgen-alg=plain64,hash-alg=sha384"),
    ("serpent-256", "xts,ivgen-alg=plain64"),
    ("twofish-128", "cbc,ivgen-alg=plain64"),
    ("cast5-128", "cbc,ivgen-alg=plain64"),
    ("aes-256", "ctr,ivgen-alg=plain64"),
];

/// Options of `qemu-img create` as those of `create`.
fn own(opts: &str) -> Vec<(&str, &str)> {
    opts.split(',').map(|o| o.split_once('=').unwrap()).chain([("key", KEY)]).collect()
}

#[test]
fn images_with_every_cipher_and_hash_go_both_ways() {
    let dir = Tmp::in_memory("luks");
    for (i, (alg, rest)) in CIPHERS.iter().enumerate() {
        let opts = format!("cipher-alg={alg},cipher-mode={rest},iter-time=10");
        eprintln!("{opts}");
        let (theirs, ours) = (dir.join(format!("theirs{i}")), dir.join(format!("ours{i}")));
        let bytes = Rng::new(i as u64).bytes(300 << 10);
        let size = bytes.len() as u64;
        qemu_create(&theirs, "luks", &format!("{opts},key-secret=s"), "300k");
        create(&ours, "luks", size, &own(&opts));
        for image in [&theirs, &ours] {
            qemu_io_key(image, "luks", &["write -P 7 0 300k", "write -P 9 100k 512"]);
            let open = open_key(image, RW);
            assert_eq!(open.size().unwrap(), size);
            let mut expect = vec![7; bytes.len()];
            expect[100 << 10..][..512].fill(9);
            assert!(read_all(&open) == expect, "{opts}");
            open.write_at(&bytes, 0, NONE).unwrap();
            open.close().unwrap();
            qemu_reads(image, "luks", &bytes, &dir.join("raw"));
            fs::remove_file(image).unwrap();
        }
    }
}

fn cryptsetup(args: &[&str], stdin: &str) -> (bool, String) {
    use std::io::Write;
    let mut child = match std::process::Command::new("cryptsetup")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(e) => panic!("install cryptsetup (apt-get install cryptsetup-bin): {e}"),
    };
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let told =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), told)
}

fn cryptsetup_ok(args: &[&str], stdin: &str) -> String {
    let (ok, told) = cryptsetup(args, stdin);
    assert!(ok, "cryptsetup {args:?}: {told}");
    told
}

#[test]
fn cryptsetup_and_this_library_open_each_others_key_slots() {
    let dir = Tmp::in_memory("luks");
    let (ours, theirs) = (dir.join("ours"), dir.join("theirs"));
    create(&ours, "luks", 1 << 20, &[("key", KEY), ("iter-time", "10")]);
    let told = cryptsetup_ok(&["luksDump", ours.to_str().unwrap()], "");
    assert!(told.contains("xts-plain64") && told.contains("sha256"), "{told}");
    let test = |image: &Path, key: &str| {
        let image = image.to_str().unwrap();
        cryptsetup(&["open", "--test-passphrase", "--key-file=-", image], key).0
    };
    assert!(test(&ours, KEY) && !test(&ours, "open sesamE"));
    fs::remove_file(&ours).unwrap();
    create(&ours, "luks", 1 << 20, &own("cipher-alg=aes-192,cipher-mode=cbc,iter-time=10"));
    assert!(test(&ours, KEY));
    open_key(&ours, RO);
    fs::write(&theirs, vec![0; 4 << 20]).unwrap();
    let path = theirs.to_str().unwrap();
    let quick = "--pbkdf-force-iterations=1000";
    let quiet = ["--type=luks1", "--batch-mode", quick, "--key-file=-", path];
    cryptsetup_ok(&[&["luksFormat"][..], &quiet].concat(), KEY);
    // More slots, the first taken away, so that the one that opens is not the first.
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, KEY).unwrap();
    fs::write(&second, "a second\nkey\n").unwrap();
    let key = format!("--key-file={}", first.display());
    let add = ["luksAddKey", "--batch-mode", quick, &key, path, second.to_str().unwrap()];
    cryptsetup_ok(&add, "");
    cryptsetup_ok(&add, "");
    cryptsetup_ok(&["luksKillSlot", "--batch-mode", &key, path, "1"], "");
    let bytes = Rng::new(1).bytes(100_000);
    open_key(&theirs, RW).write_at(&bytes, 777, NONE).unwrap();
    cryptsetup_ok(&["luksRemoveKey", "--batch-mode", path, first.to_str().unwrap()], "");
    assert_eq!(error(&theirs, &with_key(KEY), RO).kind(), ErrorKind::BadKey);
    let second = Options::new().with("key-file", second.as_os_str().as_encoded_bytes());
    let image = open_with(&theirs, &second, RO);
    assert_eq!(image.property("luks.key-slots").unwrap().unwrap(), b"2");
    assert!(read_range(&image, 777, 100_000) == bytes);
}

#[test]
fn without_a_key_or_with_another_nothing_but_the_description_is_had() {
    let dir = Tmp::in_memory("luks");
    let path = dir.join("image");
    create(&path, "luks", 1 << 20, &[("key", KEY), ("iter-time", "10")]);
    let luks = |o: Options| o.with("format", "luks");
    for flags in [RO, RW] {
        let e = error(&path, &luks(Options::new()), flags);
        assert!(e.kind() == ErrorKind::NeedKey && e.to_string().contains("'key-file'"), "{e}");
        assert_eq!(error(&path, &luks(with_key("other")), flags).kind(), ErrorKind::BadKey);
        assert_eq!(error(&path, &luks(with_key("")), flags).kind(), ErrorKind::BadKey);
    }
    // The format is found by probing.
    assert_eq!(error(&path, &Options::new(), RO).kind(), ErrorKind::NeedKey);
    let info = open_with(&path, &Options::new(), OpenFlags::INFO_ONLY);
    let about = info.info().unwrap();
    assert_eq!((about.format, about.size), ("luks", 1 << 20));
    assert_ne!(about.state & qblk::image::state::ENCRYPTED, 0);
    assert_eq!(info.property("luks.cipher-alg").unwrap().unwrap(), b"aes-256");
    assert_eq!(info.property("luks.cipher-mode").unwrap().unwrap(), b"xts-plain64");
    // A key file's bytes are the key as they are.
    let file = dir.join("key");
    let by_file = || Options::new().with("key-file", file.as_os_str().as_encoded_bytes());
    fs::write(&file, KEY).unwrap();
    open_with(&path, &by_file(), RO);
    fs::write(&file, format!("{KEY}\n")).unwrap();
    assert_eq!(error(&path, &by_file(), RO).kind(), ErrorKind::BadKey);
    assert_eq!(
        error(&path, &by_file().with("key", KEY), RO).kind(),
        ErrorKind::Errno(libc::EINVAL)
    );
    fs::remove_file(&file).unwrap();
    let e = error(&path, &by_file(), RO);
    assert!(
        e.kind() == ErrorKind::Errno(libc::ENOENT) && e.to_string().contains("key file"),
        "{e}"
    );
    // Where nothing is encrypted a key is a mistake.
    let raw = dir.join("raw");
    create(&raw, "raw", 4096, &[]);
    let e = error(&raw, &with_key(KEY), RO);
    assert!(
        e.kind() == ErrorKind::Errno(libc::EINVAL) && e.to_string().contains("not encrypted"),
        "{e}"
    );
}

#[test]
fn any_offset_and_count_works_as_on_plain_bytes() {
    let rng = &mut Rng::new(seed("any_offset"));
    let dir = Tmp::in_memory("luks");
    let path = dir.join("image");
    create(&path, "luks", 3 << 20, &[("key", KEY), ("iter-time", "10")]);
    let image = open_key(&path, RW);
    let mut model = read_all(&image);
    assert!(model == read_all(&image), "what was never written is the same at every read");
    scribble(&image, &mut model, rng, 300);
    // What a resize adds reads as zeroes.
    image.resize(5 << 20, &Options::new(), false).unwrap();
    model.resize(5 << 20, 0);
    scribble(&image, &mut model, rng, 50);
    image.resize(2 << 20, &Options::new(), true).unwrap();
    model.truncate(2 << 20);
    scribble(&image, &mut model, rng, 50);
    let e = image.resize(1_000_001, &Options::new(), true).unwrap_err();
    assert!(e.to_string().contains("512"), "{e}");
    let mut extents = [qblk::Extent::default(); 4];
    assert_eq!(image.extents(0, 2 << 20, &mut extents).unwrap(), 1);
    assert!(extents[0].has(qblk::Extent::DATA) && !extents[0].has(qblk::Extent::HOST));
    image.close().unwrap();
    qemu_reads(&path, "luks", &model, &dir.join("raw"));
}

#[test]
fn keys_are_gone_from_memory_after_close() {
    let dir = Tmp::in_memory("luks");
    let rng = &mut Rng::new(seed("keys_are_gone"));
    for format in ["luks", "qcow2"] {
        let path = dir.join(format);
        let pass: String = (0..40).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
        // Kept apart from what is searched for, changed.
        let veiled: Vec<u8> = pass.bytes().map(|b| b ^ VEIL).collect();
        let time = if format == "luks" { "iter-time" } else { "encrypt.iter-time" };
        let mut how = Options::new().with("key", &pass).with(time, "10");
        if format == "qcow2" {
            how = how.with("encrypt.format", "luks");
        }
        qblk::image::create(path.as_os_str(), format, 1 << 20, &how).unwrap();
        let mut keys = vec![veiled];
        if format == "luks" {
            // The half of the master key that is AES's own: its first round keys are that key.
            let (file, pass_file) = (dir.join("master"), dir.join("pass"));
            fs::write(&pass_file, &pass).unwrap();
            let args = [
                "luksDump",
                "--batch-mode",
                "--dump-volume-key",
                "--volume-key-file",
                file.to_str().unwrap(),
                "--key-file",
                pass_file.to_str().unwrap(),
                path.to_str().unwrap(),
            ];
            cryptsetup_ok(&args, "");
            let mut master = fs::read(&file).unwrap();
            assert_eq!(master.len(), 64);
            keys.push(master[..32].iter().map(|b| b ^ VEIL).collect());
            wipe(&mut master);
        }
        drop(how);
        let image = open_with(&path, &Options::new().with("key", &pass), RW);
        image.write_at(&[1; 5000], 100, NONE).unwrap();
        wipe(&mut pass.into_bytes());
        for key in &keys {
            // For reopening, and for encrypting.
            assert!(in_memory(key), "{format}: the search finds nothing");
        }
        image.close().unwrap();
        for (i, key) in keys.iter().enumerate() {
            assert!(!in_memory(key), "{format}: key {i} is still in memory");
        }
    }
}

const VEIL: u8 = 0x55;

fn wipe(bytes: &mut [u8]) {
    for b in bytes {
        // SAFETY: a byte of the slice.
        unsafe { std::ptr::write_volatile(b, 0) };
    }
}

/// Whether the bytes that these are when changed back are anywhere in this program's memory.
fn in_memory(veiled: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open("/proc/self/mem").unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut chunk = vec![0u8; 1 << 20];
    for line in maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|p| p.starts_with("rw"))) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let from = u64::from_str_radix(from, 16).unwrap();
        let to = u64::from_str_radix(to, 16).unwrap();
        let mut at = from;
        while at < to {
            let n = ((to - at) as usize).min(chunk.len());
            let Ok(got) = memory.read_at(&mut chunk[..n], at) else { break };
            let found = chunk[..got]
                .windows(veiled.len())
                .any(|w| w.iter().zip(veiled).all(|(a, b)| a ^ VEIL == *b));
            if found {
                // What was searched must not be found by the next search.
                wipe(&mut chunk);
                return true;
            }
            at += (n - veiled.len().min(n - 1)).max(1) as u64;
            if got < n || to - at <= veiled.len() as u64 {
                break;
            }
        }
    }
    wipe(&mut chunk);
    false
}
