//! Backing chains: which files are opened, how, and which are not.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::image::state;
use qblk::{OpenFlags, Options};

const SIZE: u64 = 256 << 10;

/// An overlay whose header names whatever is asked for.
fn names(dir: &Tmp, image: &str, backing: &str, format: Option<&str>) -> PathBuf {
    let path = dir.join(image);
    create(&path, "qcow2", SIZE, &[]);
    match format {
        Some(f) => qemu_img!("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", f, path),
        None => {
            let plain = dir.join("plain-base");
            create(&path, "qcow2", SIZE, &[("compat", "0.10")]);
            let _ = plain;
            name_by_hand(&path, backing);
            String::new()
        }
    };
    path
}

/// qemu-img no longer makes images that do not record the format.
fn name_by_hand(path: &Path, backing: &str) {
    poke(path, 1024, backing.as_bytes());
    poke(path, 8, &1024u64.to_be_bytes());
    poke(path, 16, &(backing.len() as u32).to_be_bytes());
    // No extensions: the end marker.
    poke(path, 72, &[0; 8]);
}

fn policy(path: &Path, opts: &Options, flags: OpenFlags, words: &[&str]) {
    let e = open_error(path, opts, flags);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    for word in words {
        assert!(e.to_string().contains(word), "{word:?} not in: {e}");
    }
    // Without what it names it can always be had.
    let image = open(path, OpenFlags::NO_BACKING);
    assert_eq!(read_all(&image), vec![0; SIZE as usize]);
    assert_ne!(image.info().unwrap().state & state::HAS_BACKING, 0);
    assert_eq!(image.info().unwrap().backing_depth, 0);
}

#[test]
fn a_relative_name_is_seen_from_the_image() {
    let dir = Tmp::in_memory("relative");
    fs::create_dir_all(dir.join("images/deep")).unwrap();
    fs::create_dir_all(dir.join("bases")).unwrap();
    fs::write(dir.join("bases/base"), [0x61; 100_000]).unwrap();
    let path = dir.join("images/deep/image");
    let pairs = [("backing-file", "../../bases/base"), ("backing-fmt", "raw")];
    create(&path, "qcow2", SIZE, &pairs);
    let image = open(&path, RO);
    assert_eq!(read_range(&image, 99_999, 3), [0x61, 0, 0]);
    assert_eq!(image.property("backing-filename").unwrap().unwrap(), b"../../bases/base");
    drop(image);
    // By another way to the same image, and by descriptor.
    let way = dir.join("bases/../images/deep/image");
    assert_eq!(read_range(&open(&way, RO), 0, 1), [0x61]);
    let mut file = b"file:".to_vec();
    file.extend(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()));
    let file: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&file[..]);
    let image = qblk::Image::open(file, &Options::new(), RO).unwrap();
    assert_eq!(read_range(&image, 0, 1), [0x61]);
    let fd = fs::File::open(&path).unwrap().into();
    let image = qblk::Image::open_fd(fd, &Options::new(), RO).unwrap();
    assert_eq!(read_range(&image, 0, 1), [0x61]);
    // A name with `file:` in the image is a path, too.
    let path = names(
        &dir,
        "with-scheme",
        &format!("file:{}", dir.join("bases/base").display()),
        Some("raw"),
    );
    assert_eq!(read_range(&open(&path, RO), 0, 1), [0x61]);
    // As is one with a colon behind a slash.
    fs::write(dir.join("bases/a:b"), [0x62; 512]).unwrap();
    let path = names(&dir, "colon", "./bases/a:b", Some("raw"));
    assert_eq!(read_range(&open(&path, RO), 0, 1), [0x62]);
}

#[test]
fn the_recorded_format_is_believed_and_not_the_content() {
    let dir = Tmp::in_memory("recorded");
    // A qcow2 image that is used as raw: a guest could have written it.
    create(&dir.join("inner"), "qcow2", 1 << 20, &[]);
    let path = names(&dir, "image", "inner", Some("raw"));
    let image = open(&path, RO);
    let bytes = fs::read(dir.join("inner")).unwrap();
    let n = bytes.len().min(SIZE as usize);
    assert_same(&read_range(&image, 0, n as u64), &bytes[..n], 0, "raw");
    drop(image);
    // And the other way round it is an error, not raw.
    fs::write(dir.join("flat"), [0x33; 70_000]).unwrap();
    let path = names(&dir, "other", "flat", Some("qcow2"));
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Format, "{e}");
    assert!(e.to_string().contains("flat"), "{e}");
}

#[test]
fn a_format_that_is_not_recorded_is_found_by_probing_but_not_trusted() {
    let dir = Tmp::in_memory("probed");
    fs::write(dir.join("flat"), [0x33; 70_000]).unwrap();
    let path = names(&dir, "on-flat", "flat", None);
    assert_eq!(read_range(&open(&path, RO), 0, 2), [0x33; 2]);

    create(&dir.join("alone"), "qcow2", SIZE, &[]);
    qemu_io(&dir.join("alone"), "qcow2", &["write -P 0x44 0 64k"]);
    let path = names(&dir, "on-alone", "alone", None);
    assert_eq!(read_range(&open(&path, RO), 0, 2), [0x44; 2]);

    create(
        &dir.join("on-more"),
        "qcow2",
        SIZE,
        &[("backing-file", "flat"), ("backing-fmt", "raw")],
    );
    let path = names(&dir, "guessed", "on-more", None);
    policy(&path, &Options::new(), RO, &["on-more", "flat"]);
    // The caller's word settles it.
    let opts = options(&[("backing-fmt", "qcow2")]);
    assert_eq!(read_range(&open_with(&path, &opts, RO), 0, 2), [0x33; 2]);
    let opts = options(&[("backing.format", "qcow2")]);
    assert_eq!(read_range(&open_with(&path, &opts, RO), 0, 2), [0x33; 2]);
}

#[test]
fn a_chain_that_is_a_loop_is_refused() {
    let dir = Tmp::in_memory("loop");
    let one = names(&dir, "one", "two", Some("qcow2"));
    names(&dir, "two", "three", Some("qcow2"));
    names(&dir, "three", "one", Some("qcow2"));
    policy(&one, &Options::new(), RO, &["loop"]);
    policy(&one, &Options::new(), RW, &["loop"]);
    let own = names(&dir, "own", "own", Some("qcow2"));
    policy(&own, &Options::new(), RO, &["loop"]);
    // By another name for the same file.
    let path = names(&dir, "linked", "link", Some("qcow2"));
    std::os::unix::fs::symlink("linked", dir.join("link")).unwrap();
    policy(&path, &Options::new(), RO, &["loop"]);
    let path = names(&dir, "hard", "hard-link", Some("raw"));
    fs::hard_link(&path, dir.join("hard-link")).unwrap();
    policy(&path, &Options::new(), RO, &["loop"]);
}

#[test]
fn a_missing_backing_file_is_named() {
    let dir = Tmp::in_memory("missing");
    let path = names(&dir, "image", "gone/away", Some("raw"));
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let text = e.to_string();
    assert!(text.contains("gone/away") && text.contains("image"), "{text}");
    open(&path, OpenFlags::NO_BACKING);
    open(&path, OpenFlags::INFO_ONLY);
    // Creating on one that is missing makes no image.
    let path = dir.join("new");
    let opts = options(&[("backing-file", "gone"), ("backing-fmt", "raw")]);
    let e = qblk::image::create(path.as_os_str(), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    assert!(!path.exists());
}

#[test]
fn what_is_no_local_file_is_not_opened() {
    let dir = Tmp::in_memory("policy");
    for backing in [
        // Nobody listens there: with implicit-open=any it is tried.
        "nbd+unix:///x?socket=/nowhere",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
        "https://example.org/a",
        "ssh:host",
        "fat:rw:dir",
    ] {
        // An image that names a URI must be written by hand; qemu-img would connect.
        let path = dir.join("image");
        create(&path, "qcow2", SIZE, &[("compat", "0.10")]);
        name_by_hand(&path, backing);
        policy(&path, &Options::new(), RO, &[&backing[..4]]);
        let e = open_error(&path, &options(&[("implicit-open", "any")]), RO);
        let expected = match backing.starts_with("nbd") {
            true => ErrorKind::Errno(libc::ENOENT),
            false => ErrorKind::Unsupported,
        };
        assert_eq!(e.kind(), expected, "{e}");
    }
    let fifo = std::ffi::CString::new(dir.join("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a path that ends with NUL.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let path = names(&dir, "on-fifo", "fifo", Some("raw"));
    policy(&path, &Options::new(), RO, &["fifo"]);
    let path = names(&dir, "on-null", "/dev/null", Some("raw"));
    policy(&path, &Options::new(), RO, &["/dev/null"]);
    // A name with control characters is shown, not sent to the terminal.
    let path = dir.join("control");
    create(&path, "qcow2", SIZE, &[("compat", "0.10")]);
    name_by_hand(&path, "x:\u{1b}[31m");
    let e = open_error(&path, &Options::new(), RO);
    assert!(!e.to_string().contains('\u{1b}'), "{e:?}");
}

#[test]
fn what_the_caller_says_of_the_backing_file_goes() {
    let dir = Tmp::in_memory("override");
    fs::write(dir.join("base"), [0x71; SIZE as usize]).unwrap();
    fs::write(dir.join("other"), [0x72; SIZE as usize]).unwrap();
    let path = names(&dir, "image", "base", Some("raw"));
    policy(&path, &options(&[("implicit-open", "deny")]), RO, &["base"]);
    assert_eq!(read_range(&open(&path, RO), 0, 1), [0x71]);
    let other = dir.join("other");
    let other = other.to_str().unwrap();
    for deny in ["local", "deny"] {
        let pairs = [("backing-file", other), ("backing-fmt", "raw"), ("implicit-open", deny)];
        let image = open_with(&path, &options(&pairs), RO);
        assert_eq!(read_range(&image, 0, 1), [0x72]);
        assert_eq!(image.property("backing-filename").unwrap().unwrap(), b"base");
    }
    assert_eq!(read_range(&open_with(&path, &options(&[("backing-file", "")]), RO), 0, 1), [0]);
    assert_eq!(read_range(&open(&path, OpenFlags::NO_BACKING), 0, 1), [0]);

    // Hostile until the caller says otherwise.
    let e = open_error(&path, &Options::new(), OpenFlags::UNTRUSTED);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    let qcow2 = options(&[("format", "qcow2")]);
    policy(&path, &qcow2, OpenFlags::UNTRUSTED, &["base"]);
    open_with(&path, &qcow2, OpenFlags::UNTRUSTED | OpenFlags::NO_BACKING);
    let pairs = [("format", "qcow2"), ("backing-file", other), ("backing.format", "raw")];
    let image = open_with(&path, &options(&pairs), OpenFlags::UNTRUSTED);
    assert_eq!(read_range(&image, 0, 1), [0x72]);
}

#[test]
fn writing_without_the_backing_file_never_uncovers_it() {
    // Opened with NO_BACKING holes read as zeroes; what is zeroed then must be zero with it, too.
    for compat in ["0.10", "1.1"] {
        let dir = Tmp::in_memory("no-backing");
        fs::write(dir.join("base"), [0x71; SIZE as usize]).unwrap();
        let path = dir.join("image");
        let pairs = [("backing-file", "base"), ("backing-fmt", "raw"), ("compat", compat)];
        create(&path, "qcow2", SIZE, &pairs);
        let image = open(&path, RW | OpenFlags::NO_BACKING);
        image.write_at(&[5; 65536], 0, NONE).unwrap();
        image.zero(0, 65536, qblk::ReqFlags::MAY_TRIM).unwrap();
        image.zero(65536, 65536, NONE).unwrap();
        image.zero(2 * 65536 + 100, 1000, NONE).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let image = open(&path, RO);
        assert_eq!(read_range(&image, 0, 65536), [0; 65536], "{compat}: zeroed after a write");
        assert_eq!(read_range(&image, 65536, 65536), [0; 65536], "{compat}: zeroed");
        let part = read_range(&image, 2 * 65536 + 100, 1000);
        assert_eq!(part, [0; 1000], "{compat}: zeroed in part");
    }
}

#[test]
fn chains_of_200_images_work_and_deeper_ones_are_refused() {
    let dir = Tmp::in_memory("deep");
    fs::write(dir.join("0"), [0x55; 4096]).unwrap();
    for i in 1..=201 {
        let below = (i - 1).to_string();
        let format = if i == 1 { "raw" } else { "qcow2" };
        let pairs =
            [("backing-file", &below[..]), ("backing-fmt", format), ("cluster-size", "512")];
        create(&dir.join(i.to_string()), "qcow2", SIZE, &pairs);
    }
    let image = open(&dir.join("199"), RW);
    assert_eq!(image.info().unwrap().backing_depth, 199);
    assert_eq!(read_range(&image, 4095, 2), [0x55, 0]);
    image.write_at(&[1], 100, NONE).unwrap();
    assert_eq!(read_range(&image, 99, 3), [0x55, 1, 0x55]);
    let all = all_extents(&image, 0, SIZE, 10);
    assert_eq!((all[0].depth, all[0].length), (0, 512));
    assert_eq!((all[1].depth, all[1].length), (199, 4096 - 512));
    image.close().unwrap();
    for deeper in ["200", "201"] {
        let e = open_error(&dir.join(deeper), &Options::new(), RO);
        assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
        assert!(e.to_string().contains("200"), "{e}");
    }
}
