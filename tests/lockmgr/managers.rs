//! What a manager is told and asked, the example, and managers that lack things, fail, hang, or are
//! not there: clear errors.

use super::*;

const HEAD: &str = "#include <qblk-lockmgr.h>\n#include <errno.h>\n#include <stdio.h>\n\
    #include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n";
const RELEASE: &str = "int qblk_lockmgr_release(void *l) { free(l); return 0; }\n";
const ACQUIRE: &str = "int qblk_lockmgr_acquire(const qblk_lockmgr_owner *o, \
    const qblk_lockmgr_resource *r, size_t n, const char *const *s, void **l) \
    { (void)o, (void)r, (void)n, (void)s; BODY }\n";

fn manager(dir: &Tmp, name: &str, code: &[&str]) -> PathBuf {
    let (c, so) = (dir.join(format!("{name}.c")), dir.join(format!("{name}.so")));
    fs::write(&c, HEAD.to_owned() + &code.concat()).unwrap();
    compile(&so, &[c]);
    so
}

fn image(dir: &Tmp) -> PathBuf {
    let path = dir.join("disk.qcow2");
    create(&path, "qcow2", 1 << 20, &[]);
    path
}

#[test]
fn managers_that_are_no_good_are_clear_errors() {
    let dir = Tmp::new("mgr-bad");
    let path = image(&dir);
    let gives = ACQUIRE.replace("BODY", "*l = malloc(1); return 0;");
    let fails = |rc: &str| ACQUIRE.replace("BODY", &format!("(void)l; return {rc};"));
    let renew = |body: &str| {
        format!(
            "int qblk_lockmgr_renew(void *l, uint32_t *n, uint32_t *v) {{ (void)l, (void)n, (void)v; {body} }}\n"
        )
    };
    let text = "int qblk_lockmgr_acquire2(const qblk_lockmgr_owner *o, const qblk_lockmgr_resource *r, \
        size_t n, const char *const *s, uint32_t t, char *w, size_t z, void **l) \
        { (void)o, (void)r, (void)n, (void)s, (void)t, (void)l; \
          snprintf(w, z, \"claimed by\\n Mr. X\"); return -EBUSY; }\n";
    use ErrorKind::{Errno, Locked};
    for (name, code, kind, words) in [
        ("empty", vec![], Errno(libc::ELIBBAD), "lacks the function qblk_lockmgr_acquire"),
        (
            "half",
            vec![gives.clone()],
            Errno(libc::ELIBBAD),
            "lacks the function qblk_lockmgr_release",
        ),
        ("fails", vec![fails("-EIO"), RELEASE.into()], Errno(libc::EIO), "acquiring"),
        ("odd", vec![fails("77777"), RELEASE.into()], Errno(libc::EPROTO), "acquiring"),
        ("nothing", vec![fails("0"), RELEASE.into()], Errno(libc::EPROTO), "without a lease"),
        ("busy", vec![fails("-EBUSY"), RELEASE.into()], Locked, "somebody else has it"),
        ("told", vec![gives.clone(), text.into(), RELEASE.into()], Locked, "'claimed by\\n Mr. X'"),
        (
            "stale",
            vec![gives.clone(), renew("return -ESTALE;"), RELEASE.into()],
            Locked,
            "cannot be kept",
        ),
        (
            "hangs",
            vec![fails("(sleep(1000), 0)"), RELEASE.into()],
            Errno(libc::ETIMEDOUT),
            "no answer in 0.2 s",
        ),
        (
            "hangs later",
            vec![gives.clone(), renew("sleep(1000); return 0;"), RELEASE.into()],
            Errno(libc::ETIMEDOUT),
            "no answer",
        ),
    ] {
        let code: Vec<&str> = code.iter().map(|c| &**c).collect();
        let so = manager(&dir, name, &code);
        let o = managed(&so, &[("lock-manager-timeout", "0.2")]);
        let begun = Instant::now();
        let e = open_managed(&path, &o, RW).err().unwrap_or_else(|| panic!("{name}: opened"));
        assert!(begun.elapsed() < Duration::from_secs(20), "{name}");
        assert_eq!(e.kind(), kind, "{name}: {e}");
        let text = e.to_string();
        assert!(text.contains(words) && text.contains(&format!("{name}.so")), "{name}: {text}");
    }
    for (so, errno) in [("gone.so", libc::ENOENT), ("disk.qcow2", libc::ELIBACC)] {
        let e = open_managed(&path, &managed(&dir.join(so), &[]), RW).err().unwrap();
        assert_eq!(e.kind(), Errno(errno), "{e}");
        assert!(e.to_string().contains(so), "{e}");
    }
    let e = open_managed(&path, &options(&[("lock-manager", "loaded:12345")]), RW).err().unwrap();
    assert!(e.to_string().contains("freed"), "{e}");
    for bad in ["nonsense", "123e4567-e89b-0102-0304-05060708"] {
        let so = manager(&dir, "good", &[&gives, RELEASE]);
        let o = managed(&so, &[("lock-owner-uuid", bad)]);
        let e = open_managed(&path, &o, RW).err().unwrap();
        assert!(e.to_string().contains("lock-owner-uuid"), "{e}");
    }
}

/// A call that returns when nobody waits for it any more: what it got is given back.
#[test]
fn what_comes_too_late_is_released() {
    let dir = Tmp::new("mgr-late");
    let path = image(&dir);
    let mark = dir.join("released");
    let slow = ACQUIRE.replace("BODY", "usleep(300000); *l = malloc(1); return 0;");
    let release = format!(
        "int qblk_lockmgr_release(void *l) {{ free(l); fclose(fopen(\"{}\", \"w\")); return 0; }}\n",
        mark.display()
    );
    let so = manager(&dir, "slow", &[&slow, &release]);
    let o = managed(&so, &[("lock-manager-timeout", "0.05")]);
    let e = open_managed(&path, &o, RW).err().unwrap();
    assert!(e.to_string().contains("no answer"), "{e}");
    assert!(!mark.exists());
    wait_for("the release", || mark.exists());
}

/// A manager that writes down what it is asked.
fn recorder(dir: &Tmp, more: &str) -> (PathBuf, PathBuf) {
    let log = dir.join("log");
    let code = format!(
        "static FILE *log_(void) {{ return fopen(\"{}\", \"a\"); }}\n\
         static void show(const char *what, const qblk_lockmgr_resource *r) {{\n\
           FILE *f = log_(); const char *b = strrchr(r->path, '/');\n\
           fprintf(f, \"%s %s %s %u\\n\", what, r->path[0] == '/' ? b + 1 : \"?\", r->format, r->flags); fclose(f); }}\n\
         __attribute__((constructor)) static void begin(void) {{ FILE *f = log_(); fprintf(f, \"begin\\n\"); fclose(f); }}\n\
         int qblk_lockmgr_release(void *l) {{ FILE *f = log_(); fprintf(f, \"release\\n\"); fclose(f); free(l); return 0; }}\n\
         int qblk_lockmgr_acquire(const qblk_lockmgr_owner *o, const qblk_lockmgr_resource *r, size_t n,\n\
           const char *const *s, void **l) {{\n\
           FILE *f = log_(); fprintf(f, \"owner %s %d %02x%02x %d\\n\", o->name, o->pid == getpid(), o->uuid[0], o->uuid[15], o->id != 0);\n\
           for (; *s; s++) fprintf(f, \"setting %s\\n\", *s);\n\
           fclose(f); for (size_t i = 0; i < n; i++) show(\"acquire\", &r[i]);\n\
           *l = malloc(1); return 0; }}\n{more}",
        log.display()
    );
    (manager(dir, "recorder", &[&code]), log)
}

const ADD: &str = "int qblk_lockmgr_add(void *l, const qblk_lockmgr_resource *r) { (void)l; show(\"add\", r); return strstr(r->path, \"forbidden\") ? -EBUSY : 0; }\n\
    int qblk_lockmgr_remove(void *l, const qblk_lockmgr_resource *r) { (void)l; show(\"remove\", r); return 0; }\n";

fn told(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap();
    fs::write(log, "").unwrap();
    text
}

#[test]
fn a_manager_is_told_of_the_whole_chain_in_one_order() {
    let dir = Tmp::new("mgr-chain");
    let (so, log) = recorder(&dir, ADD);
    create(&dir.join("z.raw"), "raw", 1 << 20, &[]);
    create(&dir.join("a"), "qcow2", 1 << 20, &[("backing-file", "z.raw"), ("backing-fmt", "raw")]);
    let top = dir.join("m");
    create(&top, "qcow2", 1 << 20, &[("backing-file", "a"), ("backing-fmt", "qcow2")]);
    let uuid = "aa3e4567-e89b-0102-0304-0506070809bb";
    let o = managed(
        &so,
        &[("lock-owner", "vm7"), ("lock-owner-uuid", uuid), ("lock-manager.colour", "red")],
    );
    let image = open_managed(&top, &o, RW).unwrap();
    let all = "acquire a qcow2 1\nacquire m qcow2 0\nacquire z.raw raw 1\n";
    let head = "begin\nowner vm7 1 aabb 1\nsetting colour=red\n";
    assert_eq!(told(&log), format!("{head}{all}"));
    assert!(image.info().unwrap().state & qblk::image::state::LOCKED != 0);
    assert_eq!(image.property("lock-manager").unwrap().unwrap(), so.as_os_str().as_encoded_bytes());
    let e = image.property("lock-lease").unwrap_err();
    assert!(e.to_string().contains("qblk_lockmgr_inquire"), "{e}");

    // Reopening keeps the lease, and changes what has to be changed only.
    image.reopen(None, RO).unwrap();
    assert_eq!(told(&log), "add m qcow2 1\n");
    image.reopen(None, RO).unwrap();
    assert_eq!(told(&log), "");
    image.reopen(None, RW).unwrap();
    assert_eq!(told(&log), "add m qcow2 0\n");
    image.reopen(Some(&o.clone().with("backing-file", "")), RW).unwrap();
    assert_eq!(told(&log), "remove a qcow2 1\nremove z.raw raw 1\n");
    image.reopen(Some(&o), RW).unwrap();
    assert_eq!(told(&log), "add a qcow2 1\nadd z.raw raw 1\n");
    // One that comes to nothing is undone.
    let forbidden = dir.join("forbidden");
    create(&forbidden, "qcow2", 1 << 20, &[]);
    let bad = o.clone().with("backing-file", forbidden.as_os_str().as_encoded_bytes());
    let e = image.reopen(Some(&bad.with("backing.format", "qcow2")), RO).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
    assert_eq!(told(&log), "add forbidden qcow2 1\n");
    image.write_at(b"still", 0, NONE).unwrap();
    image.close().unwrap();
    assert_eq!(told(&log), "release\n");

    // A failure after the lease was got gives it back; and nobody is asked for a description.
    let third = Third::hold_all(&top);
    let e = open_managed(&top, &o.clone().with("lock", "on"), RW).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Locked);
    drop(third);
    assert_eq!(told(&log).lines().last(), Some("release"));
    drop(open_managed(&top, &o, OpenFlags::INFO_ONLY).unwrap());
    drop(open_managed(&top, &o, RW | OpenFlags::NO_LOCK).unwrap());
    assert_eq!(fs::read_to_string(&log).unwrap().lines().filter(|l| *l != "begin").count(), 0);
    told(&log);
    // Creating asks too.
    let new = dir.join("new");
    qblk::image::create(new.as_os_str(), "raw", 512, &managed(&so, &[])).unwrap();
    let text = told(&log);
    assert!(text.contains("acquire new raw 0\n") && text.ends_with("release\n"), "{text}");
}

#[test]
fn a_manager_is_told_of_data_files_as_of_their_images() {
    let dir = Tmp::new("mgr-data");
    let (so, log) = recorder(&dir, ADD);
    let o = managed(&so, &[("data-file", "m.data")]);
    let top = dir.join("m");
    qblk::image::create(top.as_os_str(), "qcow2", 1 << 20, &o).unwrap();
    let text = told(&log);
    assert!(text.contains("acquire m qcow2 0\nacquire m.data raw 0\n"), "{text}");
    create(&dir.join("a"), "qcow2", 1 << 20, &[("data-file", "a.data")]);
    let opts = managed(&so, &[("backing-file", "a"), ("data-file", "m.data")]);
    qblk::image::create(top.as_os_str(), "qcow2", 1 << 20, &opts).unwrap();
    told(&log);
    // The one below is only read, and so is what holds its data.
    let image = open_managed(&top, &managed(&so, &[]), RW).unwrap();
    let all = "acquire a qcow2 1\nacquire a.data raw 1\nacquire m qcow2 0\nacquire m.data raw 0\n";
    let text = told(&log);
    assert!(text.ends_with(all), "{text}");
    image.close().unwrap();
}

/// Somebody else's file lock.
struct Third(#[allow(dead_code)] Image);

impl Third {
    fn hold_all(path: &Path) -> Self {
        Self(open_with(path, &options(&[("lock-manager", "")]), RW))
    }
}

#[test]
fn a_manager_that_cannot_change_a_lease_says_so() {
    let dir = Tmp::new("mgr-fixed");
    let (so, log) = recorder(&dir, "");
    let path = image(&dir);
    let image = open_managed(&path, &managed(&so, &[]), RO).unwrap();
    let e = image.reopen(None, RW).unwrap_err();
    assert!(e.to_string().contains("qblk_lockmgr_add"), "{e}");
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP));
    image.reopen(None, RO).unwrap();
    let e = open_managed(&path, &managed(&so, &[("lock-adopt", "x")]), RO).err().unwrap();
    assert!(e.to_string().contains("qblk_lockmgr_adopt"), "{e}");
    drop(image);
    assert!(told(&log).ends_with("release\n"));
}

#[test]
fn the_example_keeps_writers_apart() {
    let dir = Tmp::new("mgr-example");
    let so = dir.join("lockmgr-file.so");
    compile(&so, &[source("examples/lockmgr-file.c")]);
    let path = image(&dir);
    let o = managed(&so, &[("lock-manager.dir", dir.path().to_str().unwrap())]);
    let writer = open_managed(&path, &o, RW).unwrap();
    let text = is_locked(open_managed(&path, &o, RO));
    assert!(text.contains("lockmgr-file.so"), "{text}");
    drop(open_managed(&path, &o, OpenFlags::SHARED).unwrap());
    std::thread::scope(|s| {
        let waiter = s.spawn(|| open_managed(&path, &o.clone().with("lock-wait", "60"), RO));
        std::thread::sleep(Duration::from_millis(30));
        writer.close().unwrap();
        let reader = waiter.join().unwrap().unwrap();
        drop(open_managed(&path, &o, RO).unwrap());
        is_locked(open_managed(&path, &o, RW));
        drop(reader);
    });
    drop(open_managed(&path, &o, RW).unwrap());
    let e = open_managed(&path, &managed(&so, &[]), RW).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
}

/// The site's default is read at each open, by a process of its own.
#[test]
fn the_environment_names_a_manager() {
    let dir = Tmp::new("mgr-env");
    if let Some(path) = std::env::var_os("QBLK_TEST_OPEN") {
        drop(open(Path::new(&path), RO));
        let none = options(&[("lock-manager", "")]);
        drop(open_with(Path::new(&path), &none, RO));
        return;
    }
    let (so, log) = recorder(&dir, "");
    let path = image(&dir);
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "managers::the_environment_names_a_manager"])
        .env("QBLK_TEST_OPEN", &path)
        .env("QBLK_LOCK_MANAGER", format!("{},a=1,b=2", so.display()))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    let text = told(&log);
    assert!(text.contains("setting a=1\nsetting b=2\nacquire disk.qcow2 qcow2 1\n"), "{text}");
    assert_eq!(text.matches("acquire").count(), 1, "{text}");
}
